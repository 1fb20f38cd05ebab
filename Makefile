# make run   installs into .venv and lets the demo model answer      make test  runs all checks and tests
# Needs Python 3.10 or newer with venv, a C++17 compiler and make; everything else comes as Python packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_FOUND := $(firstword $(foreach c,$(CXX) c++ g++ clang++,$(shell command -v $(c) 2>/dev/null)))

QUESTION := Who is the CEO of Google?
NATIVE := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# The sanitized extension lives in a copy of the package, beside and not inside the virtual environment.
SANITIZED := build/sanitize
SITE = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
BASE_PYTHON = $(shell $(BIN)/python -c 'import sys; print(sys._base_executable)')
PRELOAD = $(shell $(CXX_FOUND) -print-file-name=libasan.so):$(shell $(CXX_FOUND) -print-file-name=libstdc++.so)

.DEFAULT_GOAL := help
.PHONY: help run test test-npu lint format sanitize selftest clean distclean

help:
	@echo "make run       install, then let the demo model answer: $(QUESTION)"
	@echo "make test      install what the tests need, then lint, types and all tests"
	@echo "make test-npu  the NPU backend's tests alone, on an emulator, in an environment of their own"
	@echo "make lint      ruff and mypy alone"
	@echo "make format    let ruff format the code"
	@echo "make sanitize  the kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make selftest  the kernels without Python; CROSS=aarch64-linux-gnu for another processor, emulated by qemu"
	@echo "make clean     remove what was built      make distclean  and the virtual environment"

run: $(VENV)/installed
	$(BIN)/eightfold run demo "$(QUESTION)"

test: lint
	$(BIN)/python -m pytest
	@$(MAKE) --no-print-directory test-npu

# torch_npu lives in an environment of its own (tests/npu/environment.py says why); it is skipped, loudly, where it can't be had.
test-npu: $(VENV)/installed-test
	@python=$$($(BIN)/python tests/npu/environment.py $(VENV)-npu); status=$$?; \
	if [ $$status = 3 ]; then exit 0; elif [ $$status != 0 ]; then exit 1; fi; \
	echo "the NPU backend, on the emulator:"; \
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 timeout 600 "$$python" -m pytest tests/npu

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize: $(SANITIZED)/installed
	LD_PRELOAD=$(PRELOAD) ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(SANITIZED)/site:$(SITE) $(BASE_PYTHON) -s -m pytest -o pythonpath= -p no:cacheprovider tests/test_ops.py tests/test_ops_int4.py

# Needs cmake; with CROSS also that compiler (Debian: g++-aarch64-linux-gnu) and qemu-user.
SELFTEST = build/selftest$(addprefix -,$(CROSS))
PROCESSOR = $(firstword $(subst -, ,$(CROSS)))
selftest:
	cmake -S . -B $(SELFTEST) -DEIGHTFOLD_SELFTEST=ON $(if $(CROSS),-DCMAKE_CXX_COMPILER=$(CROSS)-g++ \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(PROCESSOR))
	cmake --build $(SELFTEST)
	$(if $(CROSS),qemu-$(PROCESSOR) -L /usr/$(CROSS)) $(SELFTEST)/eightfold_selftest

# Editable, so that only changes to the native code or to the dependencies install anew.
$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "installing Eightfold into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "installing Eightfold and what its tests need into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) --editable '.[test,dev]'
	@touch $(VENV)/installed $@

$(SANITIZED)/installed: pyproject.toml $(NATIVE) $(shell find src -name '*.py' 2>/dev/null) | $(VENV)/installed-test
	rm -rf $(SANITIZED)/site
	$(INSTALL) --no-deps --target $(SANITIZED)/site --config-settings=cmake.define.EIGHTFOLD_SANITIZE=ON \
		--config-settings=build-dir=$(SANITIZED)/objects .
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "Eightfold needs Python 3.10 or newer: install python3, or name it with make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "Python's venv is missing: install it with 'apt-get install python3-venv' (as root)"; exit 1; }
	@test -n "$(CXX_FOUND)" || \
		{ echo "a C++ compiler is missing: install one with 'apt-get install g++' (as root)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/installed $(VENV)/installed-test
	find src tests demo benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(VENV)-npu

"""The environment switches of the reference system: which of them mean something here, and what."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from eightfold.types import EightfoldError

DEFAULT_BENCHMARK_FILE = "benchmark_result/benchmark.csv"
HARDWARE = {"cpu": "CPU", "torch": "CPU", "npu": "NPU", "cuda": "GPU"}  # in the names of result folders

# Knobs of the reference's allocator, pipeline, layouts and communication library.
_KNOBS = {
    *("INF_NAN_MODE_ENABLE", "TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF", "RANK_TABLE_FILE", "MAX_MEMORY_GB"),
    *("IS_QUANT", "IS_BF16", "LONG_SEQ_ENABLE", "ENABLE_GREEDY_SEARCH_OPT", "ASCEND_LAUNCH_BLOCKING"),
}
_KNOB_PREFIXES = ("ATB_", "HCCL_", "LCCL_", "MODELTEST_LOG_", "MINDIE_LOG_", "ASCEND_GLOBAL_", "ASCEND_SLOG_")
_READ = {"ATB_LLM_BENCHMARK_ENABLE", "ATB_LLM_BENCHMARK_FILEPATH"}


@dataclass(frozen=True, slots=True)
class Environment:
    """What the environment asks for.

    `devices` is how many the visible-devices variable names, None where it is not set; `torchrun_ranks` how many ranks
    torchrun has started, None without it. `benchmark_file` is where times go as CSV, None if they are not wanted.
    `ineffective` are switches that are set and have no effect on this backend.
    """

    device: str = "cpu"
    devices: int | None = None
    devices_variable: str = "ASCEND_RT_VISIBLE_DEVICES"
    torchrun_ranks: int | None = None
    benchmark_file: Path | None = None
    split_prefill: bool = False
    allow_code_execution: bool = False
    modeltest_home: Path | None = None
    ineffective: tuple[str, ...] = ()

    @property
    def hardware(self) -> str:
        """As result folders name it."""
        return HARDWARE[self.device]


def has_npu() -> bool:
    """Whether the software for NPUs is installed: then they are what the commands run on."""
    return "torch_npu" in sys.modules or find_spec("torch_npu") is not None


def read_environment(environ: Mapping[str, str], npu: bool = False) -> Environment:
    """`npu` is the device unless a variable names another. Raises EightfoldError on a value that can't be used."""
    device = environ.get("EIGHTFOLD_DEVICE") or ("npu" if npu else "cpu")
    if device not in HARDWARE:
        raise EightfoldError(f"EIGHTFOLD_DEVICE is {device!r}; it must be one of {', '.join(HARDWARE)}")
    variable = "CUDA_VISIBLE_DEVICES" if device == "cuda" else "ASCEND_RT_VISIBLE_DEVICES"
    _check_port(environ.get("MASTER_PORT", ""))
    home = environ.get("EIGHTFOLD_MODELTEST_HOME")
    benchmark = _flag(environ, "ATB_LLM_BENCHMARK_ENABLE")
    return Environment(
        device=device,
        devices=_count_devices(variable, environ.get(variable)),
        devices_variable=variable,
        torchrun_ranks=_torchrun_ranks(environ),
        benchmark_file=Path(environ.get("ATB_LLM_BENCHMARK_FILEPATH") or DEFAULT_BENCHMARK_FILE) if benchmark else None,
        split_prefill=_flag(environ, "MODELTEST_PD_SPLIT_ENABLE"),
        allow_code_execution=_flag(environ, "EIGHTFOLD_ALLOW_CODE_EXECUTION"),
        modeltest_home=Path(home) if home else None,
        ineffective=tuple(sorted(filter(_is_knob, environ))),
    )


def _is_knob(name: str) -> bool:
    is_place = name.endswith("_HOME_PATH")  # where something is installed
    return name in _KNOBS or (name.startswith(_KNOB_PREFIXES) and name not in _READ and not is_place)


def _count_devices(variable: str, value: str | None) -> int | None:
    if value is None or not value.strip():
        return None
    names = [name.strip() for name in value.split(",")]
    if not all(name.isascii() and name.isdigit() for name in names) or len(set(names)) < len(names):
        raise EightfoldError(f"{variable} is {value!r}; it must list devices, each once, such as 0,1,2,3")
    return len(names)


def _torchrun_ranks(environ: Mapping[str, str]) -> int | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    text = environ["WORLD_SIZE"]
    if not (text.isascii() and text.isdigit() and int(text)):
        raise EightfoldError(f"WORLD_SIZE is {text!r}; it must be the number of ranks, as torchrun sets it")
    return int(text)


def _check_port(text: str) -> None:
    if text and not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise EightfoldError(f"MASTER_PORT is {text!r}; it must be a port such as 20030")


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("", "0", "false"):
        return False
    if value in ("1", "true"):
        return True
    raise EightfoldError(f"{name} is {environ[name]!r}; it must be 1 or 0")

"""Every kernel variant that this processor can run, chosen as a user chooses it: by EIGHTFOLD_CPU_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eightfold import _native

ROOT = Path(__file__).parent.parent


def run(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "EIGHTFOLD_CPU_ISA": isa, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_the_model_is_right_on_every_variant(isa: str) -> None:
    chosen = "cpu and (plain or odd-sizes or window-7 or all-of-two)"
    done = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_parity.py", "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    answer = run(isa, "-m", "eightfold", "run", "demo")
    assert answer.stdout.strip() == "The CEO of Google is Sundar Pichai.", answer.stderr
    assert f"native {isa}" in run(isa, "-m", "eightfold", "info", "demo").stdout


@pytest.mark.parametrize("isa", ["sse9", *sorted(set(_native.known_isas()) - set(_native.available_isas()))])
def test_an_impossible_variant_is_refused(isa: str) -> None:
    done = run(isa, "-m", "eightfold", "run", "demo")
    assert done.returncode == 2
    assert done.stderr.startswith(f"eightfold: error: EIGHTFOLD_CPU_ISA is {isa!r}, but ")
    assert len(done.stderr.splitlines()) == 1

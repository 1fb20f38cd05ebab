"""`eightfold doctor` on the CPU, and what `--device npu` says where there is none. On NPUs: tests/npu."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from eightfold import doctor
from eightfold.cli import main
from eightfold.ops.cpu import CpuOps


@pytest.mark.filterwarnings("ignore:linear has no native kernel", "ignore:moe has no native kernel")
def test_the_cpu_passes_and_the_report_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dtype", "float32", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    for text in ("instruction set", "torch  ", "cpu, float32", "moe w8a8, 40 tokens", "demo model", "all good"):
        assert text in out
    assert "WRONG" not in out
    assert "FAILED" not in out


def test_what_is_wrong_is_reported_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    norm = CpuOps.rms_norm

    def wrong(self: CpuOps, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, total = norm(self, x, *rest)
        return y * 1.01, total

    def broken(*_: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no such kernel\nand a trace")

    monkeypatch.setattr(CpuOps, "rms_norm", wrong)
    monkeypatch.setattr(CpuOps, "route", broken)
    monkeypatch.setattr(doctor, "demo_differences", lambda *_: 2.0)
    assert main(["doctor", "--dtype", "float32", "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert "WRONG   rms_norm: 1.0e-02 (2.0e-06)" in out
    assert "FAILED  route: RuntimeError: no such kernel\n" in out
    assert "WRONG   demo model, tokens that differ from the CPU's, float32: 2.0e+00 (0.0e+00)" in out
    assert "ok      embed" in out
    assert out.rstrip().endswith("4 failed")


def test_a_check_does_not_depend_on_those_before_it() -> None:
    def errors(*wanted: str) -> list[float]:
        listed = [*doctor.operation_checks(CpuOps()), *doctor.product_checks(CpuOps(), "w8a8")]
        return [finding.error for finding in doctor.examine(check for check in listed if check.name in wanted)]

    names = ("rms_norm", "linear w8a8, 7 tokens", "moe w8a8, 7 tokens")
    assert errors(*names) == [errors(name)[0] for name in names]


def test_a_difference_counts_where_the_lead_is_clear() -> None:
    from eightfold.types import CompletionOutput, Logprob

    def answer(tokens: list[int], lead: float) -> CompletionOutput:
        best = [{0: Logprob(-0.1, 1), 1: Logprob(-0.1 - lead, 2)} for _ in tokens]
        return CompletionOutput(0, "", tokens, logprobs=best)

    assert not doctor._differs(answer([0, 0], 3.0), answer([0, 0], 3.0), doctor.CLEAR)
    assert doctor._differs(answer([0, 0], 3.0), answer([0, 1], 3.0), doctor.CLEAR)
    assert not doctor._differs(answer([0, 0], 0.3), answer([1, 1], 0.3), doctor.CLEAR)
    assert doctor._differs(answer([0, 0], 0.3), answer([1, 1], 0.3), 0)


def test_bad_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dtype", "float8"]) == 2
    assert "--dtype is 'float8'; it must be auto or one of float32" in capsys.readouterr().err
    assert main(["doctor", "--device", "tpu"]) == 2
    assert "device 'tpu' is not supported" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed here")
@pytest.mark.parametrize("command", [["run", "demo"], ["doctor"], ["info", "demo"]])
def test_an_npu_without_torch_npu(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--device", "npu"]) == 2
    release = torch.__version__.partition("+")[0]
    wanted = f"device npu needs the package torch_npu, which is not installed: pip install torch_npu=={release}"
    assert wanted in capsys.readouterr().err

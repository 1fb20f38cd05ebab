"""`bench compare`: ratios of known samples, what is said about the rest, and files that can't be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eightfold.bench.comparison import Measure, compare
from eightfold.bench.comparison import _ratio as ratio_of
from eightfold.cli import main
from eightfold.config import ModelConfig, RopeConfig
from eightfold.random_checkpoint import random_checkpoint


def offline(**rates: list[float]) -> dict[str, Any]:
    """A result of bench offline with these samples of each test."""
    results = [
        {"test": name.replace("_", " "), "samples": [{"tokens_per_second": rate} for rate in samples]}
        for name, samples in rates.items()
    ]
    machine = {"processor": "P", "cores": 2}
    return {"kind": "offline", "machine": machine, "versions": {"torch": "2"}, "startup": [], "results": results}


def written(folder: Path, **reports: Any) -> list[str]:
    for name, report in reports.items():
        text = report if isinstance(report, str) else json.dumps(report)
        (folder / f"{name}.json").write_text(text)
    return [str(folder / f"{name}.json") for name in reports]


def test_ratios_with_spread() -> None:
    assert ratio_of(Measure("rate", True), [10, 12, 11], [22, 20, 24]) == (2.0, 20 / 12, 2.4)
    assert ratio_of(Measure("time", False), [10, 12, 11], [22, 20, 24]) == (0.5, 10 / 24, 12 / 20)


def test_tests_go_together_by_name(tmp_path: Path) -> None:
    a = offline(prefill_8=[10, 12], decode=[5, 5], gone=[1])
    b = offline(decode=[4, 4], prefill_8=[30, 30], new=[1])
    c = offline(decode=[4, 6])
    to_b, to_c = compare(written(tmp_path, a=a, b=b, c=c))
    assert [(one.test, one.ratio.median, one.verdict) for one in to_b.ratios] == [
        ("prefill 8", 30 / 11, "better"),
        ("decode", 4 / 5, "worse"),
    ]
    assert (to_b.only_in_a, to_b.only_in_b) == (("gone",), ("new",))
    (only,) = to_c.ratios
    assert (only.ratio, only.verdict) == ((1.0, 4 / 5, 6 / 5), "within spread")


def test_what_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = offline(decode=[5.0]), offline(decode=[6.0])
    a["probes"], b["probes"] = [{"int8_gops": 900.0, "read_gbs": 40.0}], [{"int8_gops": 900.0, "read_gbs": 20.0}]
    b["machine"] = {"processor": "Q", "cores": 2}
    b["versions"] = {"torch": "2", "numpy": "1"}
    files = written(tmp_path, a=a, b=b)
    out = tmp_path / "out.json"
    assert main(["bench", "compare", *files, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "note: machine: processor is Q, and P in A" in printed
    assert "note: versions: numpy is 1, and absent in A" in printed and "cores" not in printed
    (found,) = json.loads(out.read_text())["comparisons"]
    assert found["ratios"][0] == {
        "test": "decode",
        "measure": "tokens/s",
        "a": [5, 5, 5],
        "b": [6, 6, 6],
        "ratio": [1.2, 1.2, 1.2],
        "verdict": "better",
    }
    assert [(one["measure"], one["ratio"][0]) for one in found["ratios"][1:]] == [
        ("int8, GOP/s", 1),
        ("read, GB/s", 0.5),
    ]


def test_every_kind_that_bench_writes_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(320, 64, 96, 2, 4, 2, 16, 4, 2, 1e-5, 512, RopeConfig(1e4))
    folder = str(random_checkpoint(tmp_path / "model", config, scheme="w8a8"))
    small = ["--prefill", "8", "--decode-batch", "1", "--depth", "0", "--output-len", "2", "--no-startup"]
    kinds = {
        "offline": [folder, *small],
        "requests": [folder, "--cases", "[[8,3],[8,1]]"],
    }
    for kind, options in kinds.items():
        files = [str(tmp_path / f"{kind}{number}.json") for number in range(2)]
        for file in files:
            assert main(["bench", kind, *options, "--threads", "1", "--repeat", "1", "--json", file]) == 0
        capsys.readouterr()
        assert main(["bench", "compare", *files]) == 0
        out = capsys.readouterr().out
        assert ("decode batch 1 depth 0" if kind == "offline" else "in 8 out 3 batch 1") in out
        assert "the machine" in out and "note: m" not in out
    assert "in 8 out 1 batch 1" in out


def test_kernels_and_loading_are_read(tmp_path: Path) -> None:
    kernels = {"kind": "kernels", "results": [{"name": "moe/T1", "seconds": [0.002, 0.004]}]}
    (found,) = compare(written(tmp_path, a=kernels, b=kernels))
    assert [(one.measure, one.a.median) for one in found.ratios] == [("ms", 3.0)]
    sample = {"seconds": 2.0, "decode_bytes": 3e9, "decode_seconds": 1.5}
    loading = {"kind": "loading", "modes": {"mmap": [sample], "copy": [sample]}}
    (found,) = compare(written(tmp_path, a=loading, b=loading))
    assert [(one.test, one.measure, one.a.median) for one in found.ratios[:2]] == [
        ("mmap", "s to first token", 2.0),
        ("mmap", "decode, GB/s", 2.0),
    ]


GOOD = offline(decode=[5.0])


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("{", "no valid JSON"),
        ([], "is not a result of eightfold bench kernels, offline, loading, requests: it has no kind"),
        ({"a": 1}, "it has no kind"),
        ({"kind": "walls"}, "its kind is 'walls'"),
        ({"kind": "offline", "startup": []}, "not a whole result of bench offline: KeyError 'results'"),
        ({**GOOD, "results": 3}, "not a whole result of bench offline"),
        (offline(decode=[0.0]), "0.0 is not a measurement"),
        ({**GOOD, "probes": [{"read_gbs": "fast"}]}, "'fast' is not a measurement"),
        ({"kind": "kernels", "results": []}, "is of bench offline but"),
        (offline(prefill=[1.0], more=[1.0], most=[1.0]), "no test in common: one has 'decode', the other 'prefill'"),
    ],
)
def test_files_that_can_not_be_compared(
    report: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "compare", *written(tmp_path, good=GOOD, other=report)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.json"], "needs at least two files"),
        ([], "required"),
        (["/no/such.json", "/no/such.json"], "cannot read /no/such.json"),
        (["a.json", "b.json", "--json", "/no/such/out.json"], "there is no folder /no/such"),
        (["a.json", "b.json", "--device", "cpu"], "option --device is not known"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_its_words_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--repeat", "1", "requests", "demo"]) == 2
    assert "write eightfold bench requests first, and its options after" in capsys.readouterr().err

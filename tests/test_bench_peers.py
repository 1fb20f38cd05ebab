"""benchmarks/compare_peers.py on stand-ins for the peers: who is chosen, what a ratio is, what a failure says."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.bench.probes import Prober
from eightfold.ops import get_ops
from eightfold.types import EightfoldError

LLAMA_BENCH = """#!/bin/sh
echo a line that is not JSON
echo '{"n_prompt": 512, "samples_ns": [4000000000, 2000000000, 3000000000]}'
"""
LLAMA_BATCHED = """#!/bin/sh
for batch in 1 8; do echo "{\\"pl\\": $batch, \\"tg\\": 16, \\"t_tg\\": $batch}"; done
"""


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    return import_module("compare_peers")


def peers_folder(tmp_path: Path) -> Path:
    for name, text in (("llama-bench", LLAMA_BENCH), ("llama-batched-bench", LLAMA_BATCHED)):
        tool = tmp_path / "build" / "llama" / "bin" / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m4-q8_0.gguf").touch()
    return tmp_path


def test_peers_that_are_there_are_chosen_with_who_they_are_compared_to(
    comparison: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everyone = import_module("contenders").all_contenders(peers_folder(tmp_path), ".", 4, 2)
    assert [one.name for one in comparison.choose(everyone, None)] == ["eightfold w8a8 ×4", "llama.cpp Q8_0"]
    assert "OpenVINO int8 is left out" in capsys.readouterr().err
    with pytest.raises(EightfoldError, match="no peer to compare with"):
        comparison.choose(everyone, "openvino")


def test_ratios_are_taken_within_rounds(comparison: Any, tmp_path: Path) -> None:
    contenders = import_module("contenders")
    everyone = contenders.all_contenders(peers_folder(tmp_path), ".", 4, 2)
    ours, llama = comparison.choose(everyone, None)
    theirs = llama.run(contenders.Settings(threads=1, batches=(1, 8)))
    assert theirs["prefill 512"].seconds == [4, 2, 3] and 3.1 < theirs["prefill 512"].whole_layers < 3.11
    assert theirs["decode 8"] == ([0.5], None, 4)
    runs = []
    for number, speed in enumerate((1.0, 2.0, 4.0)):
        own = {name: contenders.Timing([speed], 0, 3.0) for name in theirs}
        runs += [comparison.Ran(number, ours, own, 0), comparison.Ran(number, llama, theirs, 0)]
    rows = comparison.ratios(runs)
    assert [row["test"] for row in rows] == ["prefill 512", "decode 1", "decode 8"]
    assert rows[0]["ratio"] == [3, 1.5, 0.75] and rows[0]["ratio_spread"] == (1.5, 0.75, 3)
    assert rows[2]["ratio_per_layer_spread"].median == pytest.approx(0.25 * 3 / 4)
    assert rows[2]["peer_tokens_per_second"].median == 16
    settings, ops, target = contenders.Settings(threads=1), get_ops("torch", torch.float32), tmp_path / "a.json"
    prober, again = Prober(ops), Prober(ops)
    prober.take()
    target.write_text(json.dumps(comparison._report(runs, settings, prober, {})))
    assert comparison.earlier(str(target), [ours, llama], settings, again) == runs
    assert [peaks.read for peaks in again.readings] == pytest.approx([peaks.read for peaks in prober.readings])
    with pytest.raises(EightfoldError, match="holds a run of other contenders or settings"):
        comparison.earlier(str(target), [ours, llama], replace(settings, steps=3), again)
    assert comparison.earlier(str(tmp_path / "none.json"), [ours, llama], settings, again) == []


def test_a_peer_that_fails_is_an_error(comparison: Any, tmp_path: Path) -> None:
    contenders = import_module("contenders")
    folder = peers_folder(tmp_path)
    (folder / "build" / "llama" / "bin" / "llama-bench").write_text("#!/bin/sh\necho no such model >&2; exit 3\n")
    llama = comparison.choose(contenders.all_contenders(folder, ".", 4, 2), None)[1]
    with pytest.raises(EightfoldError, match="llama-bench failed with code 3: no such model"):
        llama.run(contenders.Settings(threads=1))

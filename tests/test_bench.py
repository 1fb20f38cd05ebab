"""Benchmarks: the accounting against hand counts, and both commands on tiny shapes. Nothing here depends on speed."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.bench import cli
from eightfold.bench.accounting import (
    Formats,
    Peaks,
    Row,
    Work,
    attended,
    attention,
    experts,
    full_layer_operations,
    kv_format,
    kv_token_bytes,
    linear,
    model_step,
    weight_format,
)
from eightfold.bench.kernel_cases import Cases, make_batch, matching
from eightfold.bench.kernels import KernelOptions, run_kernels
from eightfold.bench.measure import Session
from eightfold.bench.offline import run_offline
from eightfold.bench.picture import Point, draw
from eightfold.bench.plan import OfflineOptions, engine_fields, planned
from eightfold.bench.probes import Prober, median
from eightfold.bench.report import Spread, table
from eightfold.bench.routes import RouteLog
from eightfold.cli import Parser
from eightfold.config import ModelConfig, RopeConfig
from eightfold.ops import Ops
from eightfold.random_checkpoint import random_checkpoint
from eightfold.types import EightfoldError

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    num_experts=8,
    experts_per_token=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    rope=RopeConfig(1e4),
)
W8A8, BF16 = weight_format("w8a8", "bfloat16"), weight_format("dense", "bfloat16")
PEAKS = Peaks({"int8": 1000.0, "bf16": 500.0, "fp32": 250.0}, 100.0)
TINY_KERNELS = KernelOptions(shape=TINY, repeat=2, tokens=(1, 5), rotation_bytes=1 << 20)


# --- accounting ---


def test_a_matrix_counts_two_operations_a_weight_and_its_bytes_once() -> None:
    assert linear(3, 10, 7, W8A8) == Work({"int8": 2 * 3 * 10 * 7}, 10 * (7 + 4))
    assert linear(3, 10, 7, BF16) == Work({"bf16": 420}, 10 * 7 * 2)


def test_experts_count_operations_by_pair_and_bytes_by_expert_hit() -> None:
    work = experts(pairs=6, hit=4, hidden=7, width=10, weights=W8A8)
    assert work.operations == {"int8": 6 * 3 * 2 * 7 * 10}
    assert work.bytes == 4 * (3 * 70 + 4 * (10 + 10 + 7))


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
@pytest.mark.parametrize(("new", "kv_len"), [(1, 1), (1, 9), (5, 5), (4, 9)])
def test_attention_counts_what_each_query_sees(new: int, kv_len: int, window: int | None) -> None:
    seen = [min(position + 1, window or kv_len) for position in range(kv_len - new, kv_len)]
    assert attended(new, kv_len, window) == sum(seen)


def test_attention_reads_keys_and_values_once() -> None:
    assert attention(15, heads=2, head_dim=4, products="bf16", kv_tokens=5, kv_token_bytes=32) == Work(
        {"bf16": 15 * 2 * (2 * 4 + 2 * 4)}, 160
    )


@pytest.mark.parametrize(
    ("scheme", "dtype", "stored", "products", "element"),
    [
        ("w8a8", "bfloat16", None, "int8", 1),
        ("w8a16", "bfloat16", None, "bf16", 1),
        ("w8a16", "float32", None, "fp32", 1),
        ("dense", "bfloat16", "bfloat16", "bf16", 2),
        ("dense", "float32", "bfloat16", "fp32", 2),
        ("dense", "float32", None, "fp32", 4),
        ("dense", "float16", None, "fp32", 2),
    ],
)
def test_formats(scheme: str, dtype: str, stored: str | None, products: str, element: int) -> None:
    assert weight_format(scheme, dtype, stored)[:2] == (products, element)


def step(rows: list[Row], logit_rows: int, hits: list[float], shared: int = 0, **changes: Any) -> Any:
    return model_step(replace(TINY, **changes), Formats(W8A8, BF16, BF16), rows, logit_rows, hits, shared)


def test_prefill_drops_all_but_the_logit_rows_in_the_last_layer() -> None:
    tokens, qkv, o, expert = 10, 64 * (128 + 2 * 64), 128 * 64, 3 * 64 * 96
    work = step([Row(tokens, tokens)], 1, [8, 7, 2])
    per_layer = [(10, 10), (10, 10), (10, 1)]
    assert work.layers.operations == {"int8": sum(2 * (t * qkv + left * (o + 2 * expert)) for t, left in per_layer)}
    scales = 4 * (128 + 2 * 64 + 64)
    assert work.layers.bytes == 3 * (qkv + o + scales) + (8 + 7 + 2) * (expert + 4 * (96 + 96 + 64))
    assert work.head == Work({"bf16": 2 * 320 * 64}, 2 * 320 * 64)
    assert work.attention == Work({"bf16": 4 * (55 + 55 + 10) * 8 * 16}, 3 * 10 * 2 * 4 * 16 * 2)
    assert work.bytes == work.layers.bytes + work.head.bytes + work.attention.bytes
    assert full_layer_operations(TINY, 10) == 2 * 10 * (qkv + o + 2 * expert)


def test_decode_does_everything_in_every_layer() -> None:
    work = step([Row(1, 9)] * 4, 4, [5, 5, 5])
    assert work.layers.operations["int8"] == 3 * full_layer_operations(TINY, 4)


def test_shared_pages_count_once() -> None:
    token = 3 * 2 * 4 * 16 * 2  # bytes in all layers
    assert step([Row(1, 9)] * 4, 4, [5, 5, 5]).attention.bytes == 4 * 9 * token
    assert step([Row(1, 9)] * 4, 4, [5, 5, 5], shared=6).attention.bytes == (6 + 4 * 3) * token
    assert step([Row(1, 9)] * 4, 4, [5, 5, 5], 6, sliding_window=5).attention.bytes == (2 + 4 * 3) * token


def test_limits_are_the_slower_of_computing_and_reading() -> None:
    assert Work({"int8": 2000, "bf16": 500}, 10).limit_seconds(PEAKS) == 2 + 1
    assert Work({"int8": 2000}, 900).limit_seconds(PEAKS) == 9
    assert (Work({"int8": 1}, 2) + Work({"int8": 3, "fp32": 4}, 5)).times(2) == Work({"int8": 8, "fp32": 8}, 14)


# --- probes and reports ---


class Known(Ops):
    """A backend whose probes are known."""

    def __init__(self, *readings: float) -> None:
        super().__init__()
        self._left = list(readings)

    def probe(self, threads: int | None = None) -> dict[str, float]:
        value = self._left.pop(0)
        return {"int8": 4 * value, "bf16": 0.0, "fp32": value, "read": 10.0}


def test_probes_around_a_sample() -> None:
    prober = Prober(Known(100, 110, 200))
    assert [prober.take() for _ in range(3)] == [0, 1, 2]
    assert prober.around(0) == Peaks({"int8": 420, "bf16": 105, "fp32": 105}, 10)  # no bf16 products: done in fp32
    assert [prober.moved(number) for number in range(3)] == [False, True, False]
    assert median(prober.readings).operations["int8"] == 440


def test_a_backend_without_probes_is_judged_by_torch() -> None:
    prober = Prober(Ops())
    prober.take()
    assert prober.readings[0].operations.keys() == {"int8", "bf16", "fp32"}
    assert all(value > 0 for value in (*prober.readings[0].operations.values(), prober.readings[0].read))


def test_spread_and_table() -> None:
    assert Spread.of([3, 1, 2]) == (2, 1, 3)
    assert Spread.of([0.5, 0.6, 0.7]).percent() == "60 (50–70) %"
    assert table(["a", "n"], [["xyz", "1"], ["x", "22"]]).splitlines() == ["a     n", "---  --", "xyz   1", "x    22"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_picture(tmp_path: Path) -> None:
    points = [Point("prefill", "64", "int8", 1e9, 1e7, 0.1, 0.5), Point("decode", "1", "bf16", 1e6, 1e7, 0.1, 0.9)]
    draw(str(tmp_path / "a.png"), "title", points, PEAKS, ("prefill", "absent"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(EightfoldError, match=r"cannot write .*b\.exe"):
        draw(str(tmp_path / "b.exe"), "title", points, PEAKS, ("prefill",))


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eightfold.bench.picture.find_spec", lambda name: None)
    draw(str(tmp_path / "a.png"), "title", [], PEAKS, ())
    assert "needs matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- kernels ---


def test_kernels_on_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "kernels.json"
    run_kernels(replace(TINY_KERNELS, json=str(target)))
    report = json.loads(target.read_text())
    assert {"command", "machine", "versions", "backend", "probes", "results"} <= report.keys()
    names = {result["name"] for result in report["results"]}
    assert {
        "linear/w8a8/qkv/T5",
        "linear/w8a16/w2/T1",
        "linear/dense/lm_head/T1",
        "moe/w8a8/T5",
        "moe/dense/T1",
        "route/fp32/T5",
    } <= names
    assert {"attention/bfloat16/decode/B8/depth512", "attention/float32/prefill/T512/kv512"} <= names
    narrow = next(result for result in report["results"] if result["name"] == "attention/int8/decode/B1/depth512")
    assert narrow["bytes"] == 512 * 2 * 4 * (16 + 4) + 4 * 2 * 8 * 16
    for result in report["results"]:
        assert len(result["seconds"]) == len(result["share_of_limit"]) == 2
        assert result["gops"] == pytest.approx(result["operations"] / result["seconds_spread"][0] / 1e9)
    w1 = next(result for result in report["results"] if result["name"] == "linear/w8a8/w1/T5")
    assert w1["operations"] == 2 * 5 * 96 * 64
    assert w1["bytes"] == 96 * (64 + 4) + 4 * 5 * (96 + 64)
    printed = capsys.readouterr().out
    assert "moe/dense/T5" in printed and "probes (" in printed


@pytest.mark.parametrize("device", ["torch", "cpu"])
def test_a_pattern_chooses_kernels(device: str, tmp_path: Path) -> None:
    options = replace(TINY_KERNELS, only="moe/*/T5", device=device, png=str(tmp_path / "a.png"))
    names = [result["name"] for result in run_kernels(options)["results"]]
    assert names == ["moe/w8a8/T5", "moe/w8a16/T5", "moe/dense/T5"]
    assert (tmp_path / "a.png").exists() == (find_spec("matplotlib") is not None)


def test_an_unknown_pattern_is_refused() -> None:
    cases = Cases(TINY, Ops(torch.bfloat16)).all()
    assert len(matching(cases, "moe")) == 27
    with pytest.raises(EightfoldError, match="matches no kernel; they are named like linear/w8a8/qkv/T1"):
        matching(cases, "convolution")


def test_batches_are_what_the_runner_makes() -> None:
    batch = make_batch(torch.tensor([[3, 1], [0, 2]], dtype=torch.int32), new=2, kv_len=33)
    assert batch.positions.tolist() == [31, 32, 31, 32]
    assert batch.slots.tolist() == [3 * 32 + 31, 32, 31, 2 * 32]
    assert batch.query_starts.tolist() == [0, 2, 4]
    assert batch.logit_rows.tolist() == [1, 3]


# --- offline ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("bench") / "model", TINY, scheme="w8a8")


def small(**changes: Any) -> OfflineOptions:
    tests = {"prefill": (8, 70), "chunk": 32, "decode_batch": (1, 3), "depth": (0, 40), "output_len": 3, "repeat": 2}
    return OfflineOptions(**{**tests, "startup": False, **changes})


def test_offline_on_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "offline.json"
    run_offline(small(model=str(folder), json=str(target), startup=True, repeat=1, png=str(tmp_path / "a.png")))
    report = json.loads(target.read_text())
    tests = {result["test"]: result for result in report["results"]}
    assert list(tests)[:2] == ["prefill 8", "prefill 70"] and list(tests)[-1] == "prefill 70 in 32s"
    for result in report["results"]:
        (sample,) = result["samples"]
        assert {"tokens_per_second", "major_faults", "experts_hit", "share_of_limit", "probe_moved"} <= sample.keys()
        tokens = result["tokens"] or 3 * result["batch"]
        assert sample["tokens_per_second"] == pytest.approx(tokens / sample["seconds"])
    assert tests["decode batch 1 depth 0"]["samples"][0]["experts_hit"] == 2
    assert tests["decode batch 3 depth 40"]["whole_layers"] == 3
    assert 2 < tests["prefill 70"]["whole_layers"] < 2.5
    (start,) = report["startup"]
    assert start["seconds"] > 0 and start["anonymous_beyond_kv_bytes"] > 0
    printed = capsys.readouterr().out
    assert "decode batch 3 depth 40" in printed and "process start to first token" in printed
    assert (tmp_path / "a.png").exists() == (find_spec("matplotlib") is not None)


def test_int8_keys_and_values_are_counted_with_their_scales(folder: Path) -> None:
    narrow = kv_format("int8")
    assert kv_token_bytes(TINY, narrow) == 2 * 4 * (16 + 4)
    assert (narrow.products, kv_format("int8", "float32").products) == ("bf16", "fp32")
    options = small(model=str(folder), kv_cache_dtype="int8", dtype="bfloat16")
    session = Session.open(engine_fields(options, str(folder), TINY, planned(options)))
    assert session.formats().kv == narrow
    assert session.kv_bytes(33) == 64 * 3 * 2 * 4 * (16 + 4)
    assert session.decode(2, 40, 3).work.attention.bytes > 0


def test_offline_makes_random_weights_and_keeps_them(tmp_path: Path) -> None:
    options = small(shape=TINY, layers=2, scheme="dense", work_dir=str(tmp_path), prefill=(8,), depth=(0,), repeat=1)
    report = run_offline(options)
    (kept,) = tmp_path.iterdir()
    assert kept.name == "model-2-dense-bfloat16" and report["model"]["layers"] == 2
    before = sorted(path.stat().st_mtime_ns for path in kept.iterdir())
    run_offline(options)
    assert sorted(path.stat().st_mtime_ns for path in kept.iterdir()) == before
    with pytest.raises(EightfoldError, match="holds another model than its name says"):
        run_offline(replace(options, shape=replace(TINY, intermediate_size=32)))


def test_samples_account_for_what_ran(folder: Path) -> None:
    options = small(model=str(folder))
    session = Session.open(engine_fields(options, str(folder), replace(TINY, scheme="w8a8"), planned(options)[:6]))
    whole = session.prefill(70)
    assert whole.tokens == 70 and whole.seconds > 0
    assert whole.work.attention.total_operations == 4 * 8 * 16 * (2 * 70 * 71 / 2 + 70)
    shared, own = (session.decode(3, 40, 2, distinct) for distinct in (False, True))
    assert shared.tokens == own.tokens == 6
    token = 3 * 2 * 4 * 16 * 2  # the prompt and two tokens are there when timing begins; 32 of them share a page
    assert own.work.attention.bytes == 3 * (43 + 44) * token
    assert shared.work.attention.bytes == own.work.attention.bytes - 2 * 2 * 32 * token
    assert 2 <= shared.experts_hit <= 6


def test_no_page_is_missing_while_it_measures(folder: Path) -> None:
    options = small(model=str(folder), distinct_prompts=True)
    tests = [test for test in planned(options) if not test.chunk]
    session = Session.open(engine_fields(options, str(folder), replace(TINY, scheme="w8a8"), tests))
    for _ in range(3):
        for test in tests:
            if test.kind == "prefill":
                session.prefill(test.tokens)
            else:
                session.decode(test.batch, test.depth, 3, True)
    assert session.preemptions == 0


def test_the_route_log_only_listens() -> None:
    ops = Ops()
    log = RouteLog(ops, torch.float32)
    x, gate = torch.randn(5, 8), torch.randn(4, 8)
    ids, weights = log.route(x, gate, 2)
    assert torch.equal(ids, ops.route(x, gate, 2)[0]) and torch.equal(weights, ops.route(x, gate, 2)[1])
    assert log.dtype is torch.float32
    assert log.take() == [len(ids.unique())] and log.take() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give one of them"),
        ({"model": "x", "shape": "8x7b"}, "give one of them"),
        ({"shape": "9x9"}, "'9x9' is not known; there are 8x7b, 8x22b"),
        ({"shape": TINY, "dtype": "int4"}, "--dtype is 'int4'"),
        ({"shape": TINY, "scheme": "w3"}, "scheme 'w3' is not known"),
        ({"shape": TINY, "layers": 0}, "0 layers"),
        ({"shape": TINY, "prefill": (0,)}, "--prefill has 0"),
        ({"shape": TINY, "repeat": 0}, "--repeat is 0"),
        ({"shape": TINY, "output_len": 0}, "--output-len is 0"),
        ({"shape": TINY, "prefill": (), "decode_batch": ()}, "nothing to measure"),
        ({"shape": TINY, "depth": (2000,)}, "2006 tokens and the model's context 1024"),
        ({"shape": TINY, "load_mode": "hope"}, "load-mode"),
        ({"shape": TINY, "json": "/no/such/folder/a.json"}, "there is no folder /no/such/folder"),
        ({"shape": TINY, "png": "/"}, "/ is a folder"),
        ({"model": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_bad_input_to_offline(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EightfoldError, match=message):
        run_offline(small(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "7b"}, "'7b' is not known"),
        ({"repeat": 0}, "--repeat is 0"),
        ({"device": "abacus"}, "'abacus' is not supported"),
        ({"json": "/no/such/folder/a.json"}, "there is no folder"),
    ],
)
def test_bad_input_to_kernels(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EightfoldError, match=message):
        run_kernels(replace(TINY_KERNELS, **changes))


# --- the command line ---


def parsed(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="eightfold bench")
    cli.add_options(parser)
    return parser.parse_intermixed_args(argv)


def test_arguments_become_options(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("eightfold.bench.offline.run_offline", taken.append)
    monkeypatch.setattr("eightfold.bench.kernels.run_kernels", taken.append)
    assert cli.main(parsed("kernels", "--only", "moe", "--repeat", "3")) == 0
    argv = ["offline", "--shape", "8x7b", "--prefill", "64, 512,64", "--decode-batch", "", "--no-startup"]
    assert cli.main(parsed(*argv)) == 0
    kernels, offline = taken
    assert (kernels.only, kernels.repeat, kernels.shape) == ("moe", 3, "8x7b")
    assert (offline.prefill, offline.decode_batch, offline.startup) == ((64, 512), (), False)
    assert offline.repeat == OfflineOptions().repeat


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["walls"], "invalid choice: 'walls'"),
        (["kernels", "--prefill", "64"], "--prefill does not go with bench kernels"),
        (["kernels", "demo"], "MODEL does not go with bench kernels"),
        (["offline", "demo", "--only", "moe"], "--only does not go with bench offline"),
        (["offline", "demo", "--prefill", "64;512"], "'64;512' is not a list of numbers"),
        (["offline", "demo", "--depth", "-1"], "--depth"),
    ],
)
def test_bad_arguments(argv: list[str], message: str) -> None:
    with pytest.raises(EightfoldError, match=message):
        cli.main(parsed(*argv))


def test_the_instruction_set_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EIGHTFOLD_CPU_ISA", "")  # so that what is set here is undone
    with pytest.raises(EightfoldError, match="'abacus', but it is not known"):
        cli.main(parsed("kernels", "--isa", "abacus"))

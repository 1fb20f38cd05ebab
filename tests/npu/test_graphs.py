"""Captured decode steps: torch_npu's own graphs on the simulated device, against the same steps launched one by one.

A capture of the emulator computes nothing; a replay does what was captured, on the addresses that were captured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.dispatch import GRAPHS
from test_mistakes import attention, half, ints
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from eightfold.checkpoint import Checkpoint
from eightfold.config import ModelConfig, RopeConfig, load_model_config
from eightfold.model import Mixtral
from eightfold.ops.npu import NpuOps, graphs
from eightfold.ops.npu.attention import Rotation
from eightfold.random_checkpoint import random_checkpoint
from eightfold.runner import Runner, make_batch
from eightfold.types import EightfoldError, Plan

PADDED = graphs._padded
PAGE, PAGES, LONGEST = 128, 60, 2048
SHAPE = ModelConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    num_experts=4,
    experts_per_token=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=LONGEST,
    rope=RopeConfig(1e4),
)


@pytest.fixture(autouse=True)
def _tidied() -> Iterator[None]:
    yield
    tidy()


def tidy() -> None:
    """Where the end of a capture fails, torch_npu leaves its mode and its stream behind."""
    while mode := _get_current_dispatch_mode():
        mode.__exit__(None, None, None)
    torch.npu.set_stream(torch.npu.default_stream())
    GRAPHS.abandon()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = random_checkpoint(tmp_path_factory.mktemp(scheme) / "model", SHAPE, scheme=scheme)
        return made[scheme]

    return folder


def runner_of(folder: Path, dtype: torch.dtype, kv_dtype: torch.dtype, captures: bool, window: int | None) -> Runner:
    config = load_model_config(folder)
    object.__setattr__(config, "sliding_window", window)
    model = Mixtral.load(config, Checkpoint.open(folder, config), NpuOps(dtype, graphs=captures), LONGEST)
    return Runner(model, PAGES if captures else PAGES + 1, PAGE, kv_dtype)


class Pair:
    """The same model with graphs, and without on batches padded alike: their bits must agree."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, window: int | None = None
    ) -> None:
        self.captured, self.plain = (
            runner_of(folder, dtype, kv_dtype or dtype, captures, window) for captures in (True, False)
        )
        self.sequences: list[tuple[list[int], list[int]]] = []  # tokens and pages
        self.random = random.Random(7)
        free = list(range(PAGES))
        self.random.shuffle(free)
        self._free = free

    def start(self, tokens: int) -> None:
        """A prompt, which runs without a graph."""
        ids = [self.random.randrange(96) for _ in range(tokens)]
        pages = [self._free.pop() for _ in range(-(-tokens // PAGE))]
        self.sequences.append((ids, pages))
        plan = Plan(list(ids), [0, tokens], [tokens], [list(pages)], [tokens - 1])
        assert torch.equal(self.captured.run(plan), self.plain.run(plan))

    def step(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """One token more for some sequences → logits with a graph, and without."""
        for row in rows:
            ids, pages = self.sequences[row]
            ids.append(self.random.randrange(96))
            if len(ids) > len(pages) * PAGE:
                pages.append(self._free.pop())
        chosen = [self.sequences[row] for row in rows]
        plan = Plan(
            [ids[-1] for ids, _ in chosen],
            list(range(len(rows) + 1)),
            [len(ids) for ids, _ in chosen],
            [list(pages) for _, pages in chosen],
            list(range(len(rows))),
        )
        got, batch = self.captured.run(plan), make_batch(plan, PAGE, torch.device("cpu"))
        size = next(number for number in graphs.SIZES if number >= len(rows))
        padded = PADDED(batch, size, max(batch.page_table.shape[1], 1), PAGES, PAGE).batch
        model = self.plain._model
        return got, model.gather(model.ops.run(self.plain._launch, padded))[: len(rows)]

    def agree(self) -> bool:
        """Whether keys and values are the same everywhere that a sequence has written."""
        for a, b in zip(self.captured._pages, self.plain._pages, strict=True):
            for ids, pages in self.sequences:
                for name in ("k", "v", "k_scale", "v_scale"):
                    one, other = getattr(a, name), getattr(b, name)
                    if one is not None:
                        one, other = (x[torch.tensor(pages)].cpu().transpose(1, 2).flatten(0, 1) for x in (one, other))
                        if not torch.equal(one[: len(ids)], other[: len(ids)]):
                            return False
        return True


KINDS = [
    ("dense", torch.bfloat16, None),
    ("dense", torch.float16, None),
    ("w8a8", torch.bfloat16, None),
    ("w8a16", torch.bfloat16, None),
    ("w4a16-g32", torch.bfloat16, None),
    ("w8a8", torch.bfloat16, torch.int8),
    ("dense", torch.float16, torch.int8),
]


@pytest.mark.parametrize(("scheme", "dtype", "kv_dtype"), KINDS)
def test_replays_have_the_bits_of_single_launches(
    scheme: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, folders: Callable[[str], Path]
) -> None:
    """Steps of one to nine rows in any order, over page boundaries, with tables of two widths."""
    pair = Pair(folders(scheme), dtype, kv_dtype)
    for tokens in (1, 127, 5, 128, 60, 255, 300, 1020, 31):
        pair.start(tokens)
    for number in range(24):
        rows = pair.random.sample(range(9), pair.random.choice((1, 1, 2, 3, 4, 5, 7, 9)))
        got, want = pair.step(rows)
        assert torch.equal(got, want), f"step {number}, rows {rows}"
    assert pair.agree()
    made = pair.captured._model.ops._graphs._graphs  # type: ignore[attr-defined]
    assert {(size, table) for _, size, table in made} >= {(1, 8), (4, 8), (4, 16), (8, 16), (16, 16)}


def test_rows_beyond_a_window_run_without_a_graph(folders: Callable[[str], Path]) -> None:
    pair = Pair(folders("dense"), torch.bfloat16, window=40)
    pair.start(36)
    for _ in range(4):
        got, want = pair.step([0])
        assert torch.equal(got, want)
    with pytest.warns(RuntimeWarning, match="a window of 40 tokens"):
        got, want = pair.step([0])
    assert torch.equal(got, want)
    pair.start(3)
    assert torch.equal(*pair.step([1]))
    assert pair.agree()


def skip(*_: Any, **__: Any) -> None:
    """Does nothing."""


@pytest.mark.parametrize("wrong", ["stale angles", "old lists", "buffers are not written", "a spare page in use"])
def test_a_backend_that_forgets_something_is_noticed(
    wrong: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "stale angles":
        monkeypatch.setattr(Rotation, "forget", skip)
    elif wrong == "old lists":
        monkeypatch.setattr(torch.npu.NPUGraph, "update", skip)
    elif wrong == "buffers are not written":
        monkeypatch.setattr(graphs, "_fill", skip)
    else:
        monkeypatch.setattr(graphs, "_padded", lambda batch, size, table, _, page: PADDED(batch, size, table, 3, page))
    pair = Pair(folders("dense"), torch.bfloat16)
    for tokens in (125, 70, 300):
        pair.start(tokens)
    try:
        same = all(torch.equal(*pair.step([0, 1, 2])) for _ in range(6)) and pair.agree()
    except RuntimeError as error:
        assert "simulated device: " in str(error)
        assert wrong == "old lists"
    else:
        assert not same


def test_what_can_not_be_captured_is_said(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    route = NpuOps.route

    def waits(self: NpuOps, x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
        assert float(x.abs().max()) < 1e9
        return route(self, x, gate, k)

    monkeypatch.setattr(NpuOps, "route", waits)
    pair = Pair(folders("dense"), torch.bfloat16)
    pair.start(5)
    with pytest.raises(EightfoldError, match=r"a step of 1 rows could not be captured .*leave out --no-enforce-eager"):
        pair.step([0])


def test_graphs_need_fused_operations_and_one_kind_of_pages() -> None:
    with pytest.raises(EightfoldError, match=r"graphs \(--no-enforce-eager\) need fused operations .* in float32"):
        NpuOps(torch.float32, graphs=True)
    ops = NpuOps(torch.bfloat16, graphs=True)
    ops.new_pages(4, PAGE, 2, 64, torch.bfloat16)
    with pytest.raises(EightfoldError, match="all pages are of one size and as many"):
        ops.new_pages(5, PAGE, 2, 64, torch.bfloat16)


# Below, deliberate mistakes with torch_npu's graphs themselves.


def capture(work: Callable[[], Any]) -> tuple[Any, Any]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        result = work()
    return graph, result


X = 3.0


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: x + torch.ones(4).to("npu:0"),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: torch.npu.synchronize(),
        lambda x: torch.npu.current_stream().synchronize(),
        lambda x: x.repeat_interleave(x.long()),
    ],
    ids=[
        *("item", "nonzero", "a mask as index", "masked_select", "to the host", "from the host, in place"),
        *("from the host", "tolist", "bool", "synchronize the device", "synchronize the stream"),
        "repeats by values",
    ],
)
def test_what_waits_or_depends_on_values_is_not_captured(work: Callable[[Tensor], Any]) -> None:
    x = torch.full((4,), X, device="npu:0")
    with pytest.raises(RuntimeError):
        capture(lambda: work(x))
    tidy()
    graph, y = capture(lambda: x + 1)  # and the next capture is none the worse
    graph.replay()
    assert y.tolist() == [X + 1] * 4


def test_a_capture_computes_nothing_and_a_replay_what_is_there_by_then() -> None:
    x = torch.full((4,), X, device="npu:0")
    counter = torch.zeros(4, device="npu:0")
    graph, _ = capture(lambda: counter.add_(x))
    assert counter.tolist() == [0] * 4
    graph.replay()
    x.fill_(5)
    graph.replay()
    assert counter.tolist() == [X + 5] * 4


def test_memory_that_was_given_back_is_noticed() -> None:
    buffers = [torch.full((4,), X, device="npu:0")]
    graph, _ = capture(lambda: buffers[0] + 1)
    graph.replay()
    buffers[0] = torch.full((4,), X, device="npu:0")
    with pytest.raises(RuntimeError, match="was given back after the capture"):
        graph.replay()


def attending(keys: list[int]) -> tuple[Any, Any, dict[str, Any]]:
    call = {**attention(), "query": half(2, 4, 64), "actual_seq_lengths": [1, 2], "actual_seq_lengths_kv": keys}
    q, k, v = (call.pop(name) for name in ("query", "key", "value"))
    graph, out = capture(lambda: torch.ops.npu.npu_fused_infer_attention_score(q, k, v, **call))
    return graph, out[0], {"query": q, "key": k, "value": v, **call}


def test_updated_lists_are_what_a_replay_uses() -> None:
    graph, out, call = attending([256, 256])
    for keys in ([130, 4], [256, 1], [3, 200]):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": keys}])
        graph.replay()
        call["actual_seq_lengths_kv"] = keys
        assert torch.equal(out.cpu(), torch.ops.npu.npu_fused_infer_attention_score(**call)[0].cpu())


@pytest.mark.parametrize(
    ("captured", "updates", "message"),
    [
        ([256, 256], [None], "waits for ever"),
        ([256, 256], [[130, 4], None], "waits for ever"),
        ([256, 256], [[130]], "2 lengths of queries but 1 of keys"),
        ([256, 256], [[130, 400]], "too narrow for the longest row"),
        ([4, 4], [[130, 4]], "too small for these lengths"),
        ([256, 256], [[0, 4]], "1 queries has 0 keys"),
    ],
    ids=["never", "once", "of other rows", "beyond the table", "a workspace for short rows", "no keys"],
)
def test_lists_that_are_not_updated_or_do_not_fit(captured: list[int], updates: list[Any], message: str) -> None:
    graph, _, _ = attending(captured)
    with pytest.raises(RuntimeError, match=message):
        for keys in updates:
            if keys is not None:
                graph.update(cpu_update_input=[{"actual_seq_lengths_kv": keys}])
            graph.replay()


def test_a_table_that_names_no_page_is_noticed_when_it_is_read() -> None:
    graph, _, call = attending([256, 256])
    call["block_table"].copy_(ints([[2, 99], [1, 0]]))
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [130, 4]}])
    with pytest.raises(RuntimeError, match="block_table names blocks that exist"):
        graph.replay()


def test_without_groups_of_tasks_the_lists_are_those_of_the_capture() -> None:
    """A graph that can't be updated keeps its lists: why the backend asks for `auto_dispatch_capture`."""
    call = {**attention(), "query": half(2, 4, 64), "actual_seq_lengths": [1, 2], "actual_seq_lengths_kv": [130, 4]}
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = torch.ops.npu.npu_fused_infer_attention_score(**call)[0]
    with pytest.raises(RuntimeError, match="does not support update"):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [256, 4]}])
    graph.replay()
    assert torch.equal(out.cpu(), torch.ops.npu.npu_fused_infer_attention_score(**call)[0].cpu())

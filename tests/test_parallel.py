"""Several ranks against one: the same tokens, and with int8 weights the same bits, however the model is shared out."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eightfold import _native
from eightfold.checkpoint import Checkpoint
from eightfold.config import EngineConfig, ModelConfig, RopeConfig, load_model_config
from eightfold.loader import follow, load_engine
from eightfold.model import Loader, Mixtral
from eightfold.ops import Expert, ExpertShare, Ops, Weight, get_ops
from eightfold.ops.cpu import CpuOps
from eightfold.parallel import Ranks, alone
from eightfold.plan_bytes import STOP, decode, encode
from eightfold.quant import get_scheme
from eightfold.random_checkpoint import random_checkpoint
from eightfold.runner import Runner
from eightfold.sharding import shard_of
from eightfold.types import EightfoldError, Plan, Request, RequestOutput, SamplingParams
from in_process import make_ranks, run_ranks

# Odd wherever a size may be: the vocabulary, expert widths, heads of 10, two KV heads for up to eight ranks.
TINY = ModelConfig(
    vocab_size=331,
    hidden_size=72,
    intermediate_size=75,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=10,
    num_experts=5,
    experts_per_token=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    rope=RopeConfig(1e4),
)
SPLITS = [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4)]  # ranks in all, groups of experts
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes a folder of random weights whose answers are worth comparing, once for each set of options."""
    made: dict[str, Path] = {}

    def make(scheme: str = "w8a8", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        key = f"{scheme} {dtype} {sorted(changes.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp("tiny") / "model"
            made[key] = random_checkpoint(path, replace(TINY, **changes), dtype=dtype, scheme=scheme)
        return made[key]

    return make


def logits(path: Path, device: str, ranks: Ranks, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of two prompts of 37 and 5 tokens, then of one more token each → [44, V]: a prefill and a decode."""
    config = load_model_config(path)
    ops = get_ops(device, dtype, threads=1)
    model = Mixtral.load(config, Checkpoint.open(path, config), ops, 128, ranks)
    runner = Runner(model, 8, 16, dtype, ranks.world)
    rng = random.Random(1)
    ids = [rng.randrange(config.vocab_size) for _ in range(44)]
    steps = [
        Plan(ids[:42], [0, 37, 42], [37, 5], [[4, 1, 7], [0]], list(range(42))),
        Plan(ids[42:], [0, 1, 2], [38, 6], [[4, 1, 7], [0]], [0, 1]),
    ]
    if ranks.world.rank:
        runner.follow()
        return torch.empty(0)
    result = torch.cat([runner.run(step) for step in steps])
    runner.close()
    return result


def shared_logits(path: Path, device: str, size: int, moe_ep: int, **options: Any) -> torch.Tensor:
    exact = options.pop("exact", True)
    ranks = [replace(one, exact=exact) for one in make_ranks(size, moe_ep)]
    result: torch.Tensor = run_ranks(ranks, lambda mine: logits(path, device, mine, **options))[0]
    return result


def same(got: torch.Tensor, expected: torch.Tensor, device: str) -> None:
    """Bitwise; on torch but for the last product, lm_head's, whose order of adding depends on how many rows it has."""
    if device == "cpu":
        assert torch.equal(got, expected)
    else:
        assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("device", ["torch", "cpu"])
@pytest.mark.parametrize(("size", "moe_ep"), SPLITS)
def test_int8_weights_give_the_same_bits_at_any_number_of_ranks(
    folder: Folder, device: str, size: int, moe_ep: int
) -> None:
    for changes in ({}, {"experts_per_token": 3}, {"tie_word_embeddings": True, "num_kv_heads": 4}):
        path = folder(**changes)
        expected = logits(path, device, alone())
        assert float(expected.std()) > 0.1
        same(shared_logits(path, device, size, moe_ep), expected, device)


@pytest.mark.parametrize("device", ["torch", "cpu"])
@pytest.mark.parametrize(("size", "moe_ep"), SPLITS)
def test_float_weights_agree_and_repeat(folder: Folder, device: str, size: int, moe_ep: int) -> None:
    for stored in (torch.float32, torch.bfloat16):
        path = folder("dense", stored)
        expected = logits(path, device, alone())
        got = shared_logits(path, device, size, moe_ep)
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
        assert torch.equal(got, shared_logits(path, device, size, moe_ep))


@pytest.mark.parametrize("device", ["torch", "cpu"])
def test_bf16_arithmetic(folder: Folder, device: str) -> None:
    """Rounded activations: still the same bits with int8 weights, and near with float ones."""
    dtype = torch.bfloat16
    path = folder("w8a8", dtype)
    expected = logits(path, device, alone(), dtype)
    same(shared_logits(path, device, 4, 2, dtype=dtype), expected, device)
    path = folder("dense", dtype)
    expected = logits(path, device, alone(), dtype)
    got = shared_logits(path, device, 4, 2, dtype=dtype)
    assert (got - expected).abs().max() < 3e-2 * expected.abs().max()


@pytest.mark.parametrize("device", ["torch", "cpu"])
def test_the_cheap_way_is_near(folder: Folder, device: str) -> None:
    path = folder()
    expected = logits(path, device, alone())
    got = shared_logits(path, device, 4, 1, exact=False)
    assert not torch.equal(got, expected)
    assert (got - expected).abs().max() < 5e-2 * expected.abs().max()


def generate(
    path: Path, ranks: list[Ranks], requests: list[list[int]], params: SamplingParams, **options: Any
) -> list[RequestOutput]:
    """Requests through an engine on rank 0 and its followers."""
    config = EngineConfig(str(path), skip_tokenizer_init=True, threads=1, **options)

    def work(mine: Ranks) -> list[RequestOutput]:
        if mine.world.rank:
            follow(config, mine)
            return []
        engine = load_engine(config, ranks=mine)
        for number, ids in enumerate(requests):
            engine.add(Request(str(number), ids, params))
        done = {}
        while engine.has_unfinished_requests:
            done.update({out.request_id: out for out in engine.step() if out.finished})
        engine.close()
        return [done[str(number)] for number in range(len(requests))]

    results: list[RequestOutput] = run_ranks(ranks, work)[0]
    return results


@pytest.mark.parametrize(("size", "moe_ep"), [(2, 1), (4, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"block_size": 8, "kv_cache_memory_bytes": 8 * 16 * 2 * 2 * 10 * 4},  # 128 tokens in all: preempts
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_the_engine_on_ranks_is_the_engine_alone(
    folder: Folder, options: dict[str, Any], size: int, moe_ep: int
) -> None:
    """Batched, chunked, preempted: tokens and log-probabilities are bitwise those of one rank and one request."""
    path = folder()
    rng = random.Random(2)
    requests = [[rng.randrange(TINY.vocab_size) for _ in range(rng.randrange(1, 60))] for _ in range(6)]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=16, ignore_eos=True, logprobs=2)
    expected = [generate(path, [alone()], [ids], params, max_model_len=128)[0] for ids in requests]
    got = generate(path, make_ranks(size, moe_ep), requests, params, max_model_len=128, **options)
    for one, other in zip(expected, got, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs


@pytest.mark.parametrize(("size", "moe_ep"), [(2, 1), (4, 2), (8, 1), (8, 8)])
def test_the_demo_says_the_same_on_ranks(demo: Path, size: int, moe_ep: int) -> None:
    """A trained model, in fp32 arithmetic: greedy tokens are those of one rank."""
    requests = [[1, 100, 200, 300], [1, 5, 6, 7, 8, 9]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    options = {"max_model_len": 128, "dtype": "float32"}
    expected = generate(demo, [alone()], requests, params, **options)
    got = generate(demo, make_ranks(size, moe_ep), requests, params, **options)
    assert [out.outputs[0].token_ids for out in got] == [out.outputs[0].token_ids for out in expected]


def test_a_poisoned_request_fails_alone_on_all_ranks(folder: Folder, tmp_path: Path) -> None:
    """Its logits are not numbers; the others' tokens are as ever, and the ranks are still in step afterwards."""
    path = tmp_path / "poisoned"
    shutil.copytree(folder(), path)
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][7] = math.inf
    save_file(tensors, file)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    requests = [[1, 2, 7, 4], [5, 6, 8, 9, 10]]
    expected = generate(path, [alone()], requests, params, max_model_len=128)
    bad, good = generate(path, make_ranks(2), requests, params, max_model_len=128)
    assert bad.outputs[0].finish_reason == "error"
    assert good.outputs[0].token_ids == expected[1].outputs[0].token_ids
    assert good.outputs[0].logprobs == expected[1].outputs[0].logprobs


def test_after_a_failed_step_rank_0_sends_nothing_more(folder: Folder) -> None:
    """The others wait in the middle of the step; a message would be taken for part of it."""
    ranks = make_ranks(2)
    path = folder()

    def work(mine: Ranks) -> None:
        config = load_model_config(path)
        model = Mixtral.load(config, Checkpoint.open(path, config), get_ops("torch", torch.float32), 128, mine)
        runner = Runner(model, 8, 16, torch.float32, mine.world)
        if mine.world.rank:
            with pytest.raises(IndexError):
                runner.follow()
            return
        with pytest.raises(IndexError):
            runner.run(Plan([TINY.vocab_size], [0, 1], [1], [[0]], [0]))
        before = len(mine.world.messages)  # type: ignore[attr-defined]
        runner.close()
        assert len(mine.world.messages) == before  # type: ignore[attr-defined]

    run_ranks(ranks, work)


# The operations


def ragged(tokens: int, width: int, seed: int) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 2
    x[1], x[2, 3], x[3, width - 1] = 0, math.inf, math.nan
    return x


@pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", _native.available_isas())
def test_a_shared_int8_product_is_the_reference_to_the_bit(isa: str, rounded: torch.dtype) -> None:
    """More tokens than are exchanged at once, unequal shares, and rows of which one rank sees an infinity or a NaN."""
    width, rows, tokens = 203, 37, 600
    scheme = get_scheme("w8a8")
    weight = scheme.wrap(scheme.quantize(torch.randn(rows, width, generator=torch.Generator().manual_seed(1))))
    x = ragged(tokens, width, 2)
    expected = weight.matmul(x.to(rounded))
    cuts = [0, 64, 80, 203]

    def work(mine: Ranks) -> torch.Tensor:
        ops = CpuOps(rounded, threads=1, isa=isa)
        start, stop = cuts[mine.world.rank : mine.world.rank + 2]
        handle = ops.prepare_linear([weight.slice(1, start, stop)], mine)
        return ops.linear(x[:, start:stop], handle)

    for got in run_ranks(make_ranks(3), work):
        assert got.isnan().any(1).nonzero().flatten().tolist() == [2, 3]
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chosen", [1, 2, 3])
@pytest.mark.parametrize("isa", _native.available_isas())
def test_shared_experts_are_one_ranks_to_the_bit(isa: str, chosen: int) -> None:
    """More tokens than go through at once, an expert that nobody chose, ranks × groups of experts."""
    tokens, width, inner, count = 1100, 40, 90, 5
    scheme, generator = get_scheme("w8a8"), torch.Generator().manual_seed(3)

    def matrix(*shape: int) -> Any:
        return scheme.wrap(scheme.quantize(torch.randn(*shape, generator=generator) / 4))

    experts = [Expert(matrix(inner, width), matrix(width, inner), matrix(inner, width)) for _ in range(count)]
    x = ragged(tokens, width, 4)
    ids = torch.rand(tokens, count - 1, generator=generator).argsort(1)[:, :chosen].int()
    weights = torch.rand(tokens, chosen, generator=generator)
    one = CpuOps(threads=1, isa=isa)
    expected = one.moe(x, ids, weights, one.prepare_experts(experts))

    def work(mine: Ranks) -> torch.Tensor:
        ops = CpuOps(threads=1, isa=isa)
        numbers = range(count) if mine.moe_ep.size == 1 else (range(3), range(3, count))[mine.moe_ep.rank]
        start, stop = (inner * rank // mine.moe_tp.size for rank in (mine.moe_tp.rank, mine.moe_tp.rank + 1))
        share = [
            Expert(e.w1.slice(0, start, stop), e.w2.slice(1, start, stop), e.w3.slice(0, start, stop))
            for e in experts[numbers.start : numbers.stop]
        ]
        return ops.moe(x, ids, weights, ops.prepare_experts(share, ExpertShare(numbers.start, count, mine)))

    for size, moe_ep in ((2, 1), (2, 2), (4, 2)):
        for got in run_ranks(make_ranks(size, moe_ep), work):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# Sharing out, and what can't be


def test_every_part_of_the_model_is_some_ranks(folder: Folder) -> None:
    """Shares of an axis follow one another without a gap; KV heads and the vocabulary may overlap."""
    for size, moe_ep in SPLITS:
        shards = [shard_of(TINY, ranks) for ranks in make_ranks(size, moe_ep)]
        for axis, total in (("heads", 80), ("kv_heads", 20), ("vocab", 331), ("width", 75)):
            covered = {n for shard in shards for n in range(*shard.ranges[axis])}
            assert covered == set(range(total)), axis
        assert sum(len(range(*shard.ranges["heads"])) for shard in shards) == 80
        assert {e for shard in shards for e in shard.experts} == set(range(5))
        assert len({len(range(*shard.ranges["vocab"])) for shard in shards}) == 1
        for shard in shards:  # a query head's keys are where it is
            first, last = (place // TINY.head_dim for place in shard.ranges["heads"])
            kv_first, kv_last = (place // TINY.head_dim for place in shard.ranges["kv_heads"])
            assert [head // 4 - kv_first for head in (first, last - 1)] == [0, kv_last - kv_first - 1]


def test_weights_stay_where_the_file_is_mapped(folder: Folder) -> None:
    """Ranks hold views: not one of their matrices has memory of its own."""
    path = folder()
    config = load_model_config(path)
    checkpoint = Checkpoint.open(path, config)
    stored = {checkpoint.tensor(name).untyped_storage().data_ptr() for name in checkpoint.names()}
    seen = []

    class Watching(Ops):
        def prepare_linear(self, weights: Sequence[Weight], ranks: Ranks | None = None) -> Any:
            seen.extend(weights)
            return super().prepare_linear(weights, ranks)

        def prepare_experts(self, experts: Sequence[Expert], share: ExpertShare | None = None) -> Any:
            seen.extend(weight for expert in experts for weight in expert)
            return super().prepare_experts(experts, share)

    ranks = make_ranks(4, 2)[3]
    Mixtral.load(config, checkpoint, Watching(), 128, ranks)
    assert len(seen) > 20
    for weight in seen:
        assert weight.parts["weight"].untyped_storage().data_ptr() in stored
    held = Loader(config, checkpoint, Ops(), shard_of(config, ranks)).held()
    assert {place(t) for t in held if t.dim() > 1} >= {place(t) for weight in seen for t in weight.parts.values()}


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@pytest.mark.parametrize("scheme", ["w8a8", "dense"])
def test_a_rank_reads_what_it_holds(folder: Folder, scheme: str) -> None:
    """All ranks together read each matrix once, but for what several hold; one reads its part of the bytes."""
    path = folder(scheme, intermediate_size=256)
    config = load_model_config(path)
    checkpoint = Checkpoint.open(path, config)
    experts = sum(checkpoint.tensor(name).nbytes for name in checkpoint.names() if ".experts." in name)
    others = checkpoint.total_bytes - experts

    def read(ranks: Ranks) -> int:
        return sum(t.nbytes for t in Loader(config, checkpoint, Ops(), shard_of(config, ranks)).held())

    assert read(alone()) == checkpoint.total_bytes
    for size, moe_ep in ((2, 1), (4, 2), (4, 4)):
        each = [read(ranks) for ranks in make_ranks(size, moe_ep)]
        assert experts <= sum(each) <= experts * 1.05 + size * others  # scales of columns are on all ranks
        assert max(each) < experts * -(-config.num_experts // moe_ep) / config.num_experts / (size // moe_ep) + others
    progress: list[tuple[int, int]] = []
    engine = EngineConfig(str(path), skip_tokenizer_init=True, threads=1, max_model_len=128)

    def work(mine: Ranks) -> None:
        if mine.world.rank:
            follow(engine, mine)
        else:
            load_engine(engine, lambda *counts: progress.append(counts), mine).close()

    run_ranks(make_ranks(2), work)
    assert progress[-1][0] == progress[-1][1] == read(make_ranks(2)[0])


@pytest.mark.parametrize(
    ("changes", "size", "moe_ep", "words"),
    [
        ({}, 3, 1, "3 ranks cannot share 8 heads and 2 KV heads evenly; 1, 2, 4, 8 can"),
        ({"num_heads": 48, "num_kv_heads": 8}, 6, 1, "6 ranks cannot share .*; 1, 2, 4, 8, 16, 24, 48 can"),
        ({}, 8, 8, "8 ranks cannot share 5 experts; at most 5 can"),
        ({"intermediate_size": 3}, 4, 1, "4 ranks cannot share 3 columns of an expert; at most 3 can"),
        ({"vocab_size": 3}, 4, 1, "4 ranks cannot share 3 tokens of the vocabulary"),
    ],
)
def test_sizes_that_ranks_cannot_share_are_named(changes: dict[str, int], size: int, moe_ep: int, words: str) -> None:
    with pytest.raises(EightfoldError, match=words):
        shard_of(replace(TINY, **changes), make_ranks(size, moe_ep)[0])


def test_groups_that_do_not_fit_together_are_refused() -> None:
    four, two = make_ranks(4, 1)[1], make_ranks(2, 1)[1]
    with pytest.raises(EightfoldError, match="2 that share an expert's width times 1"):
        shard_of(TINY, Ranks(four.world, two.moe_tp, four.moe_ep))


def test_ranks_that_are_not_alike_are_found_at_start(folder: Folder, tmp_path: Path) -> None:
    other = random_checkpoint(tmp_path / "other", TINY, dtype=torch.float32, scheme="w8a8", seed=1)
    good = EngineConfig(str(folder()), skip_tokenizer_init=True, threads=1, max_model_len=128)
    for bad, words in (
        (replace(good, model=str(other)), "rank 1 differs from rank 0: the checkpoint is one of digest"),
        (replace(good, model=str(folder(rms_norm_eps=1e-6))), "rank 1 differs from rank 0: the model's config is"),
        (replace(good, device="torch"), "rank 1 differs from rank 0: the kind of kernels is torch here, and native"),
    ):

        def work(mine: Ranks, bad: EngineConfig = bad) -> None:
            if mine.world.rank:
                follow(bad, mine)
            else:
                load_engine(good, ranks=mine)

        with pytest.raises(EightfoldError, match=words):
            run_ranks(make_ranks(2), work)


def test_the_smallest_number_of_pages_wins(folder: Folder) -> None:
    """Rank 1 has room for fewer pages than rank 0; both hold what it can."""
    page = 32 * 2 * 2 * 1 * 10 * 4  # bytes: tokens, keys and values, layers, heads of a rank, head size, fp32

    def work(mine: Ranks) -> int:
        pages = 9 - 2 * mine.world.rank
        config = EngineConfig(
            str(folder()), skip_tokenizer_init=True, threads=1, max_model_len=128, kv_cache_memory_bytes=pages * page
        )
        if mine.world.rank:
            follow(config, mine)
            return 0
        engine = load_engine(config, ranks=mine)
        engine.close()
        return engine.scheduler._pool.num_pages

    assert run_ranks(make_ranks(2), work)[0] == 7


def test_copies_of_the_weights_are_refused_where_ranks_share_a_machine(folder: Folder) -> None:
    config = EngineConfig(str(folder()), skip_tokenizer_init=True, load_mode="copy", max_model_len=128)
    with pytest.raises(EightfoldError, match="--load-mode copy would copy the weights 2 times"):
        load_engine(config, ranks=replace(alone(), local_size=2))


# Plans as bytes

WHOLE = st.integers(0, 2**31 - 1)


@given(
    ids=st.lists(WHOLE),
    rows=st.lists(st.tuples(WHOLE, WHOLE, st.lists(WHOLE, max_size=4)), max_size=5),
    logit_rows=st.lists(WHOLE),
)
def test_a_plan_comes_back_from_its_bytes(
    ids: list[int], rows: list[tuple[int, int, list[int]]], logit_rows: list[int]
) -> None:
    plan = Plan(ids, [0, *(r[0] for r in rows)], [r[1] for r in rows], [r[2] for r in rows], logit_rows)
    message = encode(plan)
    assert message != STOP and decode(message) == plan
    for cut in (message[:-1], message[:-4], message[:8], message + b"\0\0\0\0"):
        with pytest.raises(EightfoldError, match="came from rank 0"):
            decode(cut)

"""The accounting of what ranks exchange, against what they exchange."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eightfold.bench.accounting import Formats, Peaks, Row, model_step, weight_format
from eightfold.bench.traffic import Link, Split, Traffic, busiest, exchange_seconds, messages, rank_seconds
from eightfold.checkpoint import Checkpoint
from eightfold.config import ModelConfig, RopeConfig, load_model_config
from eightfold.model import Mixtral
from eightfold.ops import get_ops
from eightfold.parallel import Ranks
from eightfold.random_checkpoint import SHAPES, random_checkpoint
from eightfold.runner import Runner
from eightfold.types import Plan
from in_process import ThreadGroup, make_ranks, run_ranks

TINY = ModelConfig(
    vocab_size=331,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    experts_per_token=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    rope=RopeConfig(1e4),
)
W8A8, BF16 = weight_format("w8a8", "bfloat16"), weight_format("dense", "bfloat16")
FORMATS = Formats(W8A8, BF16, BF16)
PEAKS = Peaks({"int8": 1000.0, "bf16": 500.0, "fp32": 250.0}, 100.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("tiny") / "model", TINY, dtype=torch.float32, scheme="w8a8")


@pytest.mark.parametrize("split", [Split(2), Split(4, 1, False), Split(2, 2), Split(4, 2), Split(4, 4, False)])
def test_the_formulas_count_what_ranks_send(folder: Path, split: Split) -> None:
    """Bytes of each kind of message in a step of 29 tokens; of experts, what all of a group's ranks put in together."""
    ranks = [replace(one, exact=split.exact) for one in make_ranks(split.ranks, split.moe_ep)]

    def work(mine: Ranks) -> None:
        config = load_model_config(folder)
        ops = get_ops("cpu", torch.float32, threads=1)
        model = Mixtral.load(config, Checkpoint.open(folder, config), ops, 64, mine)
        plan = Plan(list(range(29)), [0, 29], [29], [[0, 1]], [27, 28])
        runner = Runner(model, 2, 16, torch.float32)  # of a world of one: all ranks are given the plan
        runner.run(plan)

    run_ranks(ranks, work)
    counted: Counter[tuple[str, int]] = Counter()
    for one in ranks:
        for group in {id(group): group for group in (one.world, one.moe_tp, one.moe_ep)}.values():
            assert isinstance(group, ThreadGroup)
            for kind, sent in group.calls if group.size > 1 else ():
                counted[kind, group.size] += sent
    computed: Counter[tuple[str, int]] = Counter()
    for line in messages(TINY, split, 29, 2):
        computed[line.kind, line.ranks] += round(line.bytes * split.ranks)
    assert counted == computed


def test_a_decode_step_of_8x7b_by_hand() -> None:
    config, row = SHAPES["8x7b"], 4096 * 4
    exact = messages(config, Split(8), 1, 1)
    assert sum(line.number for line in exact) == 32 * 4 + 1  # two products a layer: absmax and sum; the logits
    assert sum(line.bytes for line in exact) == 32 * (4 + row + 2 * (4 + row)) + 4000 * 4
    cheap = messages(config, Split(8, 1, False), 1, 1)
    assert sum(line.number for line in cheap) == 32 * 2 + 1
    assert sum(line.bytes for line in cheap) == 32 * 2 * row + 4000 * 4
    groups = messages(config, Split(8, 8), 1, 1)
    assert sum(line.number for line in groups) == 32 * 3 + 1
    three = messages(replace(config, experts_per_token=3), Split(8, 8), 1, 1)
    assert sum(line.bytes for line in three) - sum(line.bytes for line in groups) == 32 * 2 * row
    assert messages(config, Split(1), 5, 5) == []


def test_time_is_latency_and_bytes() -> None:
    assert Traffic("sum", 4, 2, 100).sent == 150
    assert Traffic("gather", 4, 1, 100).sent == 300
    assert exchange_seconds([Traffic("sum", 4, 2, 100), Traffic("max", 2, 3, 8)], Link(0.5, 10)) == 2.5 + 15.8


def test_the_busiest_group_gets_its_share_or_more() -> None:
    assert busiest(10, 2, 8, 1)[0] == 20
    assert busiest(1, 2, 8, 8) == (1, 1)  # two experts of a token are on two ranks
    pairs, hit = busiest(512, 2, 8, 8)
    assert 512 * 2 / 8 < pairs < 1.3 * 512 * 2 / 8 and hit == 1
    assert 1 < busiest(1, 2, 8, 2)[0] < 2


def test_one_rank_takes_what_the_model_takes() -> None:
    rows = [Row(1, 9)] * 2
    hit = busiest(2, 2, 4, 1)[1]
    step = model_step(TINY, FORMATS, rows, 2, [hit] * 3)
    slow_memory = PEAKS._replace(read=1e-6)  # so that bytes alone decide, however the work is cut into parts
    expected = step.bytes / slow_memory.read
    assert rank_seconds(TINY, FORMATS, Split(1), rows, 2, slow_memory) == pytest.approx(expected)
    four = rank_seconds(TINY, FORMATS, Split(4), rows, 2, slow_memory)
    kv = step.attention.bytes / slow_memory.read
    assert four == pytest.approx((expected - kv) / 4 + kv / 2)  # two KV heads on four ranks

"""What ranks send one another in a step, and how long a step takes them: arithmetic on shapes, no torch.

docs/scaling.md explains the formulas; benchmarks/scaling_tables.py prints its tables.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from eightfold.bench.accounting import Formats, Peaks, Row, Work, attended, attention, experts, linear
from eightfold.config import ModelConfig

BLOCK_ROWS = 256  # tokens, or pairs of token and expert, whose integer sums go in one message between CPUs
ORDERLESS = 2  # experts a token up to which weighted sums can be added up over ranks in any order
_NUMBER = 4  # bytes of an fp32 or int32
_DRAWS = 50  # of random routings, for what the busiest rank gets


class Split(NamedTuple):
    """How a model is shared out: `ranks` in all, experts among `moe_ep` groups of them, and whether int8 products add
    up exactly (`exact`) or each rank quantizes its own part, as ranks of float weights do."""

    ranks: int
    moe_ep: int = 1
    exact: bool = True

    @property
    def moe_tp(self) -> int:
        return self.ranks // self.moe_ep


class Traffic(NamedTuple):
    """Messages of one kind in a step of the model: `bytes` is what one rank puts in, all messages together."""

    kind: str  # "sum", "max" or "gather"
    ranks: int  # of the group
    number: float
    bytes: float

    @property
    def sent(self) -> float:
        """Bytes that each rank sends at least: a sum or maximum is halved N ways and gathered again."""
        return self.bytes * (self.ranks - 1) * (1.0 if self.kind == "gather" else 2.0 / self.ranks)


class Link(NamedTuple):
    """What connects ranks: seconds that a small message takes all of them, and bytes a second that each can send."""

    latency: float
    bandwidth: float


def messages(
    config: ModelConfig, split: Split, tokens: int, logit_rows: int, block_rows: int = BLOCK_ROWS
) -> list[Traffic]:
    """Everything that one step of `tokens` makes the ranks exchange, but for the plan. In the last layer only the
    `logit_rows` go on after attention. Messages of experts count as many as there must be at least; integer sums go
    `block_rows` at a time."""
    all_layers = [(config.num_layers - 1, tokens), (1, logit_rows)]
    result = [line for times, rows in all_layers for line in _layer(config, split, times, rows, block_rows)]
    vocabulary = -(-config.vocab_size // split.ranks)
    result.append(Traffic("gather", split.ranks, 1, logit_rows * vocabulary * _NUMBER))
    return [line for line in result if line.ranks > 1 and line.number]


def _layer(config: ModelConfig, split: Split, times: int, tokens: int, block_rows: int) -> list[Traffic]:
    """Of `times` layers that each see `tokens` after attention."""
    row = config.hidden_size * _NUMBER
    if not split.exact:
        return [Traffic("sum", split.ranks, 2 * times, 2 * times * tokens * row)]
    pairs = tokens * config.experts_per_token / split.moe_ep
    parts = 1 if config.experts_per_token <= ORDERLESS else config.experts_per_token
    return [
        *_integers(split.ranks, times, tokens, row, block_rows),
        *_integers(split.moe_tp, times, pairs, row, block_rows),
        Traffic("sum", split.moe_ep, times, times * tokens * parts * row),
    ]


def _integers(ranks: int, times: int, rows: float, row: int, block_rows: int) -> list[Traffic]:
    """The exact sum of `rows` rows: their absmax, then their integers."""
    blocks = times * math.ceil(rows / block_rows)
    return [Traffic("max", ranks, blocks, times * rows * _NUMBER), Traffic("sum", ranks, blocks, times * rows * row)]


def exchange_seconds(traffic: Sequence[Traffic], link: Link) -> float:
    """One message after the other, none beside a computation."""
    return sum(line.number * link.latency + line.sent / link.bandwidth for line in traffic)


@cache
def busiest(tokens: int, chosen: int, count: int, groups: int) -> tuple[float, float]:
    """Of `tokens` that each choose `chosen` of `count` experts at random → (pairs, different experts) that the group of
    experts with the most pairs gets on average."""
    rng = random.Random(0)
    pairs = hit = 0.0
    for _ in range(_DRAWS):
        chosen_by = [0] * count
        for _ in range(tokens):
            for expert in rng.sample(range(count), chosen):
                chosen_by[expert] += 1
        shares = [chosen_by[count * g // groups : count * (g + 1) // groups] for g in range(groups)]
        most = max(shares, key=sum)
        pairs, hit = pairs + sum(most), hit + sum(1 for number in most if number)
    return pairs / _DRAWS, hit / _DRAWS


def rank_seconds(
    config: ModelConfig, formats: Formats, split: Split, rows: Sequence[Row], logit_rows: int, peaks: Peaks
) -> float:
    """What the busiest rank computes and reads in a step, each part at its limit, without the messages."""
    tokens, ranks, weights = sum(row.new for row in rows), split.ranks, formats.matrices
    query, kv = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    seconds = 0.0
    for times, left in ((config.num_layers - 1, tokens), (1, logit_rows)):
        qkv = linear(tokens, query + kv, config.hidden_size, weights)
        out = linear(left, config.hidden_size, query, weights)
        pairs, hit = busiest(left, config.experts_per_token, config.num_experts, split.moe_ep)
        moe = experts(1, hit, config.hidden_size, config.intermediate_size, weights)
        moe = Work({name: pairs * each for name, each in moe.operations.items()}, moe.bytes)
        parts = ((qkv, ranks), (out, ranks), (moe, split.moe_tp))
        seconds += times * sum(part.times(1 / share).limit_seconds(peaks) for part, share in parts)
    seen = sum(attended(row.new, row.kv_len, config.sliding_window) for row in rows)
    kv_tokens = sum(row.kv_len for row in rows)
    read = attention(0, 1, 1, formats.kv.products, kv_tokens, round(kv * formats.kv.element))
    read = read.times(1 / min(ranks, config.num_kv_heads))
    done = attention(seen, config.num_heads, config.head_dim, formats.kv.products, 0, 0).times(1 / ranks)
    head = linear(logit_rows, config.vocab_size, config.hidden_size, formats.head).times(1 / ranks)
    return seconds + (read + done).times(config.num_layers).limit_seconds(peaks) + head.limit_seconds(peaks)

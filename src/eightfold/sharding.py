"""Which part of a model one rank holds: ranges along the axes that weights name. Plain numbers, no torch.

Heads, expert widths and the vocabulary are shared out; whatever names none of these axes is on every rank. Where there
are more ranks than KV heads, neighbours hold the same one. Experts are shared out whole among the ranks of `moe_ep`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from eightfold.config import ModelConfig
from eightfold.parallel import Ranks
from eightfold.quant_config import group_columns
from eightfold.types import EightfoldError

Range = tuple[int, int]  # first, and one past the last
WIDTH_UNIT = 64  # expert widths are cut at multiples of this where there is enough: whole cache lines of a weight's row


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part: `ranges` in elements by the name of an axis, its experts, and how many heads it has.

    All ranks have the same number of rows of the vocabulary: where it does not divide, the last ranks' rows overlap.
    """

    ranges: Mapping[str, Range]
    experts: range
    kv_heads: int
    ranks: Ranks

    def summed(self, axis: str) -> bool:
        """Whether products over this axis are partial sums, to be added up over ranks."""
        return self.ranks.world.size > 1 and axis in self.ranges


def shard_of(config: ModelConfig, ranks: Ranks) -> Shard:
    """This rank's part. Raises EightfoldError, with the sizes that would do, where the model can't be shared out so."""
    world, tp, ep = ranks.world, ranks.moe_tp, ranks.moe_ep
    if tp.size * ep.size != world.size or ep.rank * tp.size + tp.rank != world.rank:
        raise EightfoldError(
            f"ranks do not fit together: {tp.size} that share an expert's width times {ep.size} that share the experts "
            f"must be {world.size}, all of them"
        )
    check_sizes(config, world.size, tp.size, ep.size)
    heads = config.num_heads // world.size
    kv_heads = max(1, config.num_kv_heads // world.size)
    first_kv_head = world.rank * config.num_kv_heads // world.size
    rows = -(-config.vocab_size // world.size)
    first_row = min(world.rank * rows, config.vocab_size - rows)
    dim = config.head_dim
    group = group_columns(config.scheme, config.intermediate_size)
    unit = math.lcm(WIDTH_UNIT, group)
    if config.intermediate_size < unit * tp.size:
        unit = group
    ranges = {
        "heads": (world.rank * heads * dim, (world.rank + 1) * heads * dim),
        "kv_heads": (first_kv_head * dim, (first_kv_head + kv_heads) * dim),
        "vocab": (first_row, first_row + rows),
        "width": _share(config.intermediate_size, tp.rank, tp.size, unit),
    }
    return Shard(ranges, range(*_share(config.num_experts, ep.rank, ep.size)), kv_heads, ranks)


def vocabulary_columns(vocab_size: int, ranks: int) -> list[int]:
    """Where each row of the vocabulary is in the ranks' rows one after the other; see `Shard` on overlaps."""
    rows = -(-vocab_size // ranks)
    columns = list(range(vocab_size))
    for rank in range(ranks):
        first = min(rank * rows, vocab_size - rows)
        columns[first : first + rows] = range(rank * rows, (rank + 1) * rows)
    return columns


def world_sizes(config: ModelConfig) -> list[int]:
    """How many ranks the heads can be shared out among."""
    heads, kv = config.num_heads, config.num_kv_heads
    return [n for n in range(1, heads + 1) if not heads % n and (not kv % n or not n % kv)]


def check_sizes(config: ModelConfig, world: int, tp: int, ep: int) -> None:
    """Raises EightfoldError, with the sizes that would do, where `world` = tp · ep ranks can't share the model."""
    sizes = world_sizes(config)
    if world not in sizes:
        raise EightfoldError(
            f"{world} ranks cannot share {config.num_heads} heads and {config.num_kv_heads} KV heads evenly; "
            f"{', '.join(map(str, sizes))} can"
        )
    group = group_columns(config.scheme, config.intermediate_size)
    columns = config.num_heads * config.head_dim
    if columns // world % group_columns(config.scheme, columns):
        raise EightfoldError(
            f"{world} ranks cannot share the {columns} columns of o_proj, which {config.scheme} keeps in groups of "
            f"{group_columns(config.scheme, columns)}; fewer ranks can, or smaller groups"
        )
    for ranks, size, what in (
        (
            tp,
            -(-config.intermediate_size // group),
            f"groups of {group} columns" if group > 1 else "columns of an expert",
        ),
        (ep, config.num_experts, "experts"),
        (world, config.vocab_size, "tokens of the vocabulary"),
    ):
        if ranks > size:
            raise EightfoldError(f"{ranks} ranks cannot share {size} {what}; at most {size} can")


def _share(size: int, rank: int, ranks: int, unit: int = 1) -> Range:
    """A rank's share of `size`, as even as whole units allow."""
    units = -(-size // unit)
    first, last = (min(units * r // ranks * unit, size) for r in (rank, rank + 1))
    return first, last

"""Collectives of a job's groups against plain sums, on every rank: a program, and what its children run.

`python tests/ranks_exercise.py RANKS MOE_TP MOE_EP [MACHINES MACHINE ADDRESS PORT]` is quiet if all is well.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from eightfold.config import EngineConfig
from eightfold.parallel import Group
from eightfold.parallel.launch import Job
from eightfold.parallel.place import find_place
from eightfold.worker import main

SIZES = (1, 3, 17, 4096, 20_001, 300_007)  # fp32 numbers: within a slot, shared out, in several pieces


@cache
def values(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """What a rank contributes; any rank can tell."""
    generator = torch.Generator().manual_seed(1000 * size + rank)
    if dtype == torch.int32:
        return torch.randint(-(2**30), 2**30, (size,), generator=generator, dtype=dtype)
    return torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 7, (size,), generator=generator)


def in_order(parts: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = combine(total, part)
    return total


def expected(members: Sequence[int], local_size: int, parts: Callable[[int], Tensor], kind: str) -> Tensor:
    """Each machine's in the order of its ranks, then the machines'."""
    combine = torch.add if kind == "sum" else torch.maximum
    machines = dict.fromkeys(m // local_size for m in members)
    sums = [in_order([parts(m) for m in members if m // local_size == machine], combine) for machine in machines]
    return in_order(sums, combine)


def check(group: Group, members: Sequence[int], local_size: int, seed: int) -> None:
    """Every collective at every size, this rank late at random."""
    mine = members[group.rank]
    delays = random.Random(seed + mine)
    assert (group.size, len(members)) == (len(members), group.size)
    for size in SIZES:
        if delays.random() < 0.3:
            time.sleep(delays.random() * 0.01)
        for dtype in (torch.float32, torch.int32):
            total = group.all_reduce_sum(values(mine, size, dtype).clone())
            right = expected(members, local_size, lambda m, s=size, d=dtype: values(m, s, d), "sum")
            assert torch.equal(total, right), (mine, size, dtype)
        most = group.all_reduce_max(with_nan(mine, size))
        right = expected(members, local_size, lambda m, s=size: with_nan(m, s), "max")
        torch.testing.assert_close(most, right, rtol=0, atol=0, equal_nan=True)
        rows = max(1, size // 1000)
        gathered = group.all_gather(values(mine, size, torch.float32)[: rows * (size // rows)].view(rows, -1))
        right = torch.cat([values(m, size, torch.float32)[: rows * (size // rows)].view(rows, -1) for m in members], 1)
        assert torch.equal(gathered, right), (mine, size)
        message = bytes(values(members[0], size, torch.int32).numpy().tobytes())
        assert group.broadcast(message if group.rank == 0 else None) == message
    assert group.broadcast(b"" if group.rank == 0 else None) == b""


def with_nan(rank: int, size: int) -> Tensor:
    x = values(rank, size, torch.float32).clone()
    x[(rank * 7) % size] = float("nan")
    return x


def exercise(job: Job) -> None:
    """All groups of a job."""
    place, ranks = job.place, job.ranks
    tp, ep = place.rank // place.moe_tp * place.moe_tp, place.rank % place.moe_tp
    for seed in range(2):
        for group, members in (
            (ranks.world, range(place.size)),
            (ranks.moe_tp, range(tp, tp + place.moe_tp)),
            (ranks.moe_ep, range(ep, place.size, place.moe_tp)),
        ):
            if len(members) > 1:
                check(group, members, place.local_size, seed)
            else:
                assert group.size == 1


def lead(arguments: Sequence[str]) -> int:
    """What a user's process does."""
    ranks, moe_tp, moe_ep, machines, machine, *at = [*arguments, "1", "0"][: max(5, len(arguments))]
    config = EngineConfig(
        "",
        tensor_parallel_size=int(ranks),
        moe_tensor_parallel_size=int(moe_tp),
        moe_expert_parallel_size=int(moe_ep),
        nnodes=int(machines),
        node_rank=int(machine),
        master_addr=at[0] if at else None,
        master_port=int(at[1]) if at else None,
    )
    home = str(Path(__file__).parent)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    job = Job(config, find_place(config, environ), environ, "ranks_exercise")
    try:
        exercise(job)
        job.ranks.world.broadcast(b"done" if job.place.rank == 0 else None)
    finally:
        job.close()
    return 0


def follow(job: Job) -> None:
    exercise(job)
    job.ranks.world.broadcast(None)


if __name__ == "__main__":
    sys.exit(lead(sys.argv[1:]) if len(sys.argv) > 1 else main(follow))

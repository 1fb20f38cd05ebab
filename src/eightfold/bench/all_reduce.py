"""`eightfold bench all-reduce`: what one sum over ranks costs, through shared memory and through gloo."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eightfold.bench.probes import machine_facts
from eightfold.bench.report import table, write_json
from eightfold.config import EngineConfig
from eightfold.parallel.launch import Job
from eightfold.parallel.place import find_place
from eightfold.types import EightfoldError
from eightfold.worker import main

SIZES = (4096, 16384, 262144)  # fp32 numbers: one token of Mixtral 8x7B (16 KiB), 64 KiB, 1 MiB
SAMPLES = {4096: 4000, 16384: 2000, 262144: 300}
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class AllReduceOptions:
    """`ranks` processes on this machine; medians of `repeat` rounds."""

    ranks: int = 2
    repeat: int = ROUNDS
    json: str | None = None


def run_all_reduce(options: AllReduceOptions) -> dict[str, Any]:
    """Measure, print the table, write JSON → its content. Raises EightfoldError where the ranks can't be started."""
    if options.ranks < 2 or options.repeat < 1:
        raise EightfoldError(f"--ranks {options.ranks}, --repeat {options.repeat}: at least 2 ranks and 1 round")
    config = EngineConfig("", tensor_parallel_size=options.ranks, threads=1)
    job = Job(config, find_place(config, {}), os.environ, "eightfold.bench.all_reduce")
    try:
        results = measure(job, options.repeat)
    finally:
        job.close()
    report = {"kind": "all-reduce", **machine_facts(), "ranks": options.ranks, "results": results}
    header = ["fp32 numbers", "how", "median µs", "p99 µs", "fastest µs"]
    rows = [[str(r["numbers"]), r["how"], *(f"{r[k]:.1f}" for k in ("median", "p99", "fastest"))] for r in results]
    print(f"a sum over {options.ranks} ranks of one machine, fp32")
    print(table(header, rows))
    if options.json:
        write_json(options.json, report)
    return report


def measure(job: Job, repeat: int | None = None) -> list[dict[str, Any]]:
    """On every rank of a job: times of each way and size, in turns, as often as rank 0 says → this rank's times, µs."""
    rounds = int(job.ranks.world.broadcast(None if repeat is None else str(repeat).encode()))
    gloo = job.network().group(range(job.place.size), job.check)
    assert gloo is not None
    ways: dict[str, Callable[[Tensor], object]] = {
        "shared memory": job.ranks.world.all_reduce_sum,
        "gloo, in the order of ranks": gloo.all_reduce_sum,
        "gloo's own all_reduce": dist.all_reduce,
    }
    taken: dict[tuple[int, str], list[float]] = {}
    for _ in range(rounds):
        for numbers in SIZES:
            for how, call in ways.items():
                x = torch.ones(numbers)
                count = SAMPLES[numbers] if how == "shared memory" else SAMPLES[numbers] // 10
                job.ranks.world.all_reduce_sum(torch.ones(1))  # begin together
                taken.setdefault((numbers, how), []).extend(_times(call, x, count))
    return [
        {"numbers": numbers, "how": how, **_summary(times), "samples": len(times)}
        for (numbers, how), times in taken.items()
    ]


def follow(job: Job) -> None:
    """The other ranks' part."""
    measure(job)


def _times(call: Callable[[Tensor], object], x: Tensor, count: int) -> list[float]:
    """Microseconds of each of `count` calls after some to warm up."""
    times = []
    for number in range(count + 20):
        start = time.perf_counter_ns()
        call(x)
        if number >= 20:
            times.append((time.perf_counter_ns() - start) / 1000)
        x.fill_(1.0)
    return times


def _summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "median": ordered[len(ordered) // 2],
        "p99": ordered[int(len(ordered) * 0.99)],
        "fastest": ordered[0],
    }


if __name__ == "__main__":
    sys.exit(main(follow))

"""Which processor cores each rank of a machine computes on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

SYSTEM = Path("/sys/devices/system")


def share(cores: Iterable[int], rank: int, ranks: int) -> list[int] | None:
    """This rank's cores: as many as each other rank's, disjoint from theirs, near one another; None if too few.

    Neighbours in memory first: sorted by NUMA node, then package, then physical core, so that two threads of one core
    go to the same rank.
    """
    nodes = {cpu: node for node, cpus in numa_nodes().items() for cpu in cpus}
    ordered = sorted(cores, key=lambda cpu: (nodes.get(cpu, 0), *_topology(cpu), cpu))
    each = len(ordered) // ranks
    return ordered[rank * each : (rank + 1) * each] or None


def numa_nodes() -> dict[int, list[int]]:
    """The processors of each NUMA node; empty where the system does not say."""
    folders = sorted((SYSTEM / "node").glob("node[0-9]*"))
    return {int(folder.name[4:]): cpu_list((folder / "cpulist").read_text()) for folder in folders}


def cpu_list(text: str) -> list[int]:
    """Linux's notation, as in "0-3,8": [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def usable() -> list[int]:
    """Cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def _topology(cpu: int) -> tuple[int, int]:
    folder = SYSTEM / "cpu" / f"cpu{cpu}" / "topology"
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0

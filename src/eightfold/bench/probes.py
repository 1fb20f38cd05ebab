"""What the machine can do right now, and what a process has used: probes, faults, memory, facts."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eightfold import __version__
from eightfold.bench.accounting import Peaks
from eightfold.machine import total_memory, usable_cores
from eightfold.ops import Ops

MOVED = 0.15  # a probe that changed by more than this between two readings is said to have moved
_PACKAGES = ("torch", "numpy", "safetensors")


class Prober:
    """Reads the machine's peaks, and remembers every reading.

    Where several ranks of this machine compute, that is what all their threads can do on all their `cores`: between
    steps the other ranks leave these alone.
    """

    def __init__(self, ops: Ops, ranks: int = 1, cores: Sequence[int] | None = None) -> None:
        self._ops = ops
        self._threads, self._cores = ops.threads * ranks, cores
        self.readings: list[Peaks] = []
        self.times: list[float] = []  # seconds of time.perf_counter at which each reading ended

    def take(self) -> int:
        """Probe now → the reading's number."""
        native = getattr(self._ops, "probe", None)
        with _on(self._cores):
            self.readings.append(_peaks(native(self._threads)) if native else _torch_peaks())
        self.times.append(time.perf_counter())
        return len(self.readings) - 1

    def around(self, number: int) -> Peaks:
        """The mean of a reading and the one after it: the limits of what ran in between."""
        before, after = self.readings[number], self.readings[min(number + 1, len(self.readings) - 1)]
        operations = {name: (before.operations[name] + after.operations[name]) / 2 for name in before.operations}
        return Peaks(operations, (before.read + after.read) / 2)

    def moved(self, number: int) -> bool:
        """Whether a reading and the one after it differ by more than MOVED in anything."""
        before, after = self.readings[number], self.readings[min(number + 1, len(self.readings) - 1)]
        pairs = [(before.operations[name], after.operations[name]) for name in before.operations]
        return any(abs(a - b) > MOVED * min(a, b) for a, b in [*pairs, (before.read, after.read)])


@contextlib.contextmanager
def _on(cores: Sequence[int] | None) -> Iterator[None]:
    """This thread, and those that it starts, on these cores."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def as_json(readings: Sequence[Peaks]) -> list[dict[str, float]]:
    """Readings as GOP/s by number format, and GB/s."""
    named = [{f"{name}_gops": value / 1e9 for name, value in peaks.operations.items()} for peaks in readings]
    return [{**one, "read_gbs": peaks.read / 1e9} for one, peaks in zip(named, readings, strict=True)]


def median(readings: Sequence[Peaks]) -> Peaks:
    """The medians of a run's probes."""
    names = readings[0].operations
    operations = {name: statistics.median(peaks.operations[name] for peaks in readings) for name in names}
    return Peaks(operations, statistics.median(peaks.read for peaks in readings))


def _peaks(reading: Mapping[str, float]) -> Peaks:
    operations = {name: value for name, value in reading.items() if name != "read"}
    operations["bf16"] = operations["bf16"] or operations["fp32"]  # without such instructions it is done in fp32
    return Peaks(operations, reading["read"])


def _torch_peaks() -> Peaks:
    """For backends without probes of their own: what torch's products and sums reach. Lower than the true peaks."""
    size = 512
    wide = torch.ones(size, size)
    narrow, whole = wide.bfloat16(), wide.to(torch.int8)
    buffer = torch.zeros(1 << 24, dtype=torch.int64)  # 128 MiB, beyond any cache
    fastest = {
        "int8": _fastest(lambda: torch._int_mm(whole, whole)),
        "bf16": _fastest(lambda: narrow @ narrow),
        "fp32": _fastest(lambda: wide @ wide),
    }
    return Peaks({name: 2.0 * size**3 / time for name, time in fastest.items()}, buffer.nbytes / _fastest(buffer.sum))


def _fastest(call: Any, times: int = 3) -> float:
    """Seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def major_faults() -> int:
    """How often this process has waited for a page to be read from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def memory() -> dict[str, int]:
    """Bytes of this process: `anonymous` now, `file` (mapped) now, `peak` of both together. Empty without /proc."""
    names = {"RssAnon": "anonymous", "RssFile": "file", "VmHWM": "peak"}
    found = {}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in names:
                found[names[key]] = int(rest.split()[0]) * 1024
    except OSError:
        pass  # not Linux
    return found


def facts(ops: Ops) -> dict[str, Any]:
    """The machine, the versions, the command and the backend that a result belongs to."""
    backend = {"name": ops.name, "threads": getattr(ops, "threads", None), "isa": getattr(ops, "isa", None)}
    return {**machine_facts(), "backend": backend}


def machine_facts() -> dict[str, Any]:
    """The machine, the versions and the command that a result belongs to."""
    return {
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {
            "processor": _processor(),
            "cores": usable_cores(),
            "memory_bytes": total_memory(),
            "system": platform.platform(),
            "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        },
        "versions": {"eightfold": __version__, "python": platform.python_version(), **_versions()},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}

"""What this process may use of the machine: memory and cores, within its control groups' limits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that can be taken without swapping: free memory and page cache, within the control groups' limits."""
    free = _meminfo("MemAvailable")
    for group in _groups("memory"):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if limit is not None:
            used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
            free = min(free, max(0, limit - used + _reclaimable(group)))
    return free


def total_memory() -> int:
    """Bytes of memory that this machine, or the tightest control group, has."""
    limits = (_number(group / "memory.max", group / "memory.limit_in_bytes") for group in _groups("memory"))
    return min([_meminfo("MemTotal"), *(limit for limit in limits if limit is not None)])


def usable_cores() -> int:
    """Cores that this process may run on; where control groups grant it less time than that, as many as it can keep
    busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        quota, period = _text(group / "cpu.max").partition(" ")[::2]
        quota, period = quota or _text(group / "cpu.cfs_quota_us"), period or _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups (of version 2, or version 1 with `controller`) that this process is in, inner
    to outer. In a container its own group may be mounted as the root."""
    roots = {CGROUP: "", CGROUP / controller: ""}
    for line in _text(MEMBERSHIP).splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            roots[CGROUP] = path
        elif controller in names.split(","):
            roots[CGROUP / controller] = path
    for root, path in roots.items():
        group = root / path.strip("/")
        while group != root:
            yield group
            group = group.parent
        yield root


def _meminfo(key: str) -> int:
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux


def _reclaimable(group: Path) -> int:
    """Bytes of page cache that the group would give up first."""
    values = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _number(*files: Path) -> int | None:
    """The number that the first of these files holds, if one does: "max" is none."""
    return next((int(text) for text in map(_text, files) if text.isdigit()), None)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

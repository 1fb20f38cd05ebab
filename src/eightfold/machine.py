"""What this machine has: memory and cores that the process may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can be taken without swapping: free memory and page cache, within the control group's limit."""
    free = _meminfo("MemAvailable")
    limit = _cgroup_number("memory.max")
    if limit is not None:
        used = (_cgroup_number("memory.current") or 0) - _cgroup_stat("inactive_file")
        free = min(free, max(0, limit - used))
    return free


def total_memory() -> int:
    """Bytes of memory that this machine, or the control group, has."""
    limit = _cgroup_number("memory.max")
    total = _meminfo("MemTotal")
    return total if limit is None else min(limit, total)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_number(name: str) -> int | None:
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_stat(key: str) -> int:
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for name, value in map(str.split, lines) if name == key), 0)

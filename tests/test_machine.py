"""Memory and cores within control groups, as containers of both versions lay them out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eightfold import machine

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine, "_meminfo", lambda key: {"MemAvailable": 20 * GIB, "MemTotal": 32 * GIB}[key])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def write(root: Path, group: str, **files: object) -> None:
    folder = root / "cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def found() -> tuple[float, float, int]:
    return machine.available_memory() / GIB, machine.total_memory() / GIB, machine.usable_cores()


def test_without_groups_the_machine_is_ours(groups: Path) -> None:
    assert found() == (20, 32, 8)


def test_a_container_whose_own_group_is_the_root(groups: Path) -> None:
    (groups / "membership").write_text("0::/\n")
    write(groups, "", memory__max=4 * GIB, memory__current=2 * GIB, cpu__max="150000 100000")
    write(groups, "", memory__stat=f"anon 5\nactive_file 7\ninactive_file {GIB}")
    assert found() == (3, 4, 2)


def test_the_tightest_of_nested_groups_counts(groups: Path) -> None:
    (groups / "membership").write_text("0::/service/worker\n")
    write(groups, "service/worker", memory__max="max", memory__current=GIB, cpu__max="max 100000")
    write(groups, "service", memory__max=8 * GIB, memory__current=3 * GIB, cpu__max="50000 100000")
    assert found() == (5, 8, 1)


def test_groups_of_version_1(groups: Path) -> None:
    (groups / "membership").write_text("4:memory:/box\n3:cpu,cpuacct:/box\n0::/elsewhere\n")
    write(groups, "memory/box", memory__limit_in_bytes=6 * GIB, memory__usage_in_bytes=GIB)
    write(groups, "memory/box", memory__stat=f"inactive_file 1\ntotal_inactive_file {GIB // 2}")
    write(groups, "memory", memory__limit_in_bytes=9223372036854771712)
    write(groups, "cpu/box", cpu__cfs_quota_us=300000, cpu__cfs_period_us=100000)
    write(groups, "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert found() == (5.5, 6, 3)


def test_here() -> None:
    assert 0 < machine.available_memory() <= machine.total_memory()
    one = sorted(os.sched_getaffinity(0))[:1]
    code = (
        f"import os; os.sched_setaffinity(0, {one}); from eightfold.machine import usable_cores; print(usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"

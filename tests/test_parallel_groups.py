"""Collectives between ranks: against sums in plain torch, on one machine and between two."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from eightfold import _native
from eightfold.ops import get_ops
from eightfold.parallel.cores import cpu_list, share
from eightfold.parallel.shared import SharedGroup, new_memory, region_bytes
from eightfold.types import EightfoldError, RankError
from ranks_exercise import check, values

PROGRAM = Path(__file__).parent / "ranks_exercise.py"


class Threads:
    """Ranks as threads, each with a mapping of its own: the shared memory does not know the difference."""

    def __init__(self, size: int, groups: Sequence[Sequence[int]], patience: float = 8.0, spin: int = 0) -> None:
        self.start = _native.Segment.region_start()
        total = self.start + sum(region_bytes(len(group)) for group in groups)
        fd = new_memory(total)
        self.segments = [_native.Segment(fd, rank, size, patience, spin, False) for rank in range(size)]
        os.close(fd)
        self.groups = groups
        self.size = size

    def group(self, number: int, rank: int) -> SharedGroup:
        members = list(self.groups[number])
        offset = self.start + sum(region_bytes(len(group)) for group in self.groups[:number])
        lost = lambda: RankError(str(self.segments[rank].failure()))  # noqa: E731
        return SharedGroup(self.segments[rank], offset, members, members.index(rank), lost)

    def run(self, work: Callable[[int], object]) -> list[Exception | None]:
        """`work` of every rank → what each raised."""
        raised: list[Exception | None] = [None] * self.size

        def one(rank: int) -> None:
            try:
                work(rank)
            except Exception as error:
                raised[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised


@pytest.mark.parametrize(("size", "spin"), [(2, 0), (2, 50), (4, 0), (8, 0)])
def test_collectives_are_those_of_plain_torch(size: int, spin: int) -> None:
    groups = [list(range(size)), *([i, i + size // 2] for i in range(size // 2))]
    threads = Threads(size, groups, spin=spin)

    def work(rank: int) -> None:
        check(threads.group(0, rank), range(size), size, 0)
        number = 1 + rank % (size // 2)
        check(threads.group(number, rank), groups[number], size, 1)

    assert threads.run(work) == [None] * size


def test_a_sum_has_the_bits_of_the_order_of_ranks() -> None:
    """1e8, 1, −1e8, 1 is 1 in order, and 0 or 2 in others."""
    numbers = [1e8, 1.0, -1e8, 1.0]
    for count in (1, 40_000):  # added by everyone; shared out
        threads = Threads(4, [range(4)])

        def work(rank: int, threads: Threads = threads, count: int = count) -> None:
            total = threads.group(0, rank).all_reduce_sum(torch.full((count,), numbers[rank]))
            assert torch.equal(total, torch.ones(count))

        assert threads.run(work) == [None] * 4


def test_int32_wraps_around_and_other_dtypes_are_refused() -> None:
    threads = Threads(2, [range(2)])

    def work(rank: int) -> None:
        group = threads.group(0, rank)
        most = torch.full((5,), 2**31 - 1, dtype=torch.int32)
        assert torch.equal(group.all_reduce_sum(most), torch.full((5,), -2, dtype=torch.int32))
        with pytest.raises(EightfoldError, match="float64; it must be float32 or int32"):
            group.all_reduce_sum(torch.ones(3, dtype=torch.float64))
        with pytest.raises(EightfoldError, match="int32; it must be float32"):
            group.all_reduce_max(torch.ones(3, dtype=torch.int32))

    assert threads.run(work) == [None, None]


def test_the_first_failure_frees_all_who_wait() -> None:
    threads = Threads(3, [range(3)])

    def work(rank: int) -> None:
        if rank == 2:
            threads.segments[2].fail("rank 2: out of luck")
        else:
            threads.group(0, rank).all_reduce_sum(torch.ones(9))

    first, second, third = threads.run(work)
    assert third is None
    for error in (first, second):
        assert isinstance(error, RankError)
        assert "rank 2: out of luck" in str(error)
    threads.segments[1].fail("something that came later")
    assert threads.segments[0].failure()[3] == "rank 2: out of luck"


def test_the_end_frees_followers_without_a_failure() -> None:
    threads = Threads(2, [range(2)])

    def work(rank: int) -> None:
        if rank == 0:
            threads.segments[0].end()
        else:
            threads.group(0, rank).broadcast(None)

    lead, follower = threads.run(work)
    assert lead is None
    assert isinstance(follower, RankError)  # what this test raises for a lost job
    assert threads.segments[1].ended()
    assert threads.segments[1].failure()[0] == 0


@pytest.fixture
def segment() -> Iterator[_native.Segment]:
    fd = new_memory(_native.Segment.region_start())
    yield _native.Segment(fd, 0, 1, 8.0, 0, False)
    os.close(fd)


STUCK = 5  # Segment::Failure


def test_a_step_in_which_nothing_moves_is_a_failure(segment: _native.Segment) -> None:
    segment.begin_step(0.3)
    segment.end_step()
    time.sleep(0.6)  # between steps nothing needs to move
    assert (segment.failure()[0], segment.still()) == (0, 0.0)
    segment.begin_step(1.4)
    time.sleep(0.7)
    assert 0.2 < segment.still() < 1.4
    time.sleep(1.3)
    kind, seat, process, seconds = segment.failure()
    assert (kind, seat, process, seconds) == (STUCK, 0, os.getpid(), "1")


@pytest.mark.parametrize("how", ["items of a kernel", "signs of its own", "a collective"])
def test_a_step_that_gets_on_may_take_long(segment: _native.Segment, how: str) -> None:
    ops = get_ops("cpu", torch.float32, threads=1)
    x, weight = torch.ones(8, 16), torch.ones(16)
    threads = Threads(2, [range(2)])
    if how == "a collective":  # the other rank is late
        segment = threads.segments[0]
        waiting = threading.Thread(
            target=lambda: threads.run(lambda rank: None if rank else threads.group(0, 0).all_reduce_sum(torch.ones(1)))
        )
        waiting.start()
    segment.begin_step(0.4)
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        if how == "items of a kernel":
            ops.rms_norm(x, weight, 1e-5)
        elif how == "signs of its own":
            segment.advance()
        time.sleep(0.02)
    assert segment.failure()[0] == 0
    if how == "a collective":
        threads.segments[1].end()
        waiting.join()


def test_a_thread_that_waits_for_the_disk_is_not_stuck(segment: _native.Segment, tmp_path: Path) -> None:
    """Another wait that no signal ends stands for it: that of who starts a process, until the new one has begun. The
    new one opens a pipe first, which nobody writes into yet."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    libc = ctypes.CDLL(None)
    actions = ctypes.create_string_buffer(1024)
    libc.posix_spawn_file_actions_init(actions)
    libc.posix_spawn_file_actions_addopen(actions, 0, os.fsencode(pipe), os.O_RDONLY, 0)
    pid, words = ctypes.c_int(), (ctypes.c_char_p * 2)(b"true", None)
    program = shutil.which("true")
    assert program is not None
    waiting = threading.Thread(
        target=lambda: libc.posix_spawn(ctypes.byref(pid), program.encode(), actions, None, words, None)
    )
    waiting.start()
    segment.begin_step(0.4)
    time.sleep(1.5)
    before = segment.failure()[0]
    os.close(os.open(pipe, os.O_WRONLY))
    waiting.join()
    os.waitpid(pid.value, 0)
    assert before == 0
    time.sleep(1.0)
    assert segment.failure()[0] == STUCK


def test_native_groups_check_what_they_are_given() -> None:
    fd = new_memory(_native.Segment.region_start() + region_bytes(2))
    segment = _native.Segment(fd, 0, 2, 8.0, 0, False)
    start = _native.Segment.region_start()
    with pytest.raises(ValueError, match="outside"):
        _native.SharedGroup(segment, start + 4096, [0, 1], 0)
    with pytest.raises(ValueError, match="no such member"):
        _native.SharedGroup(segment, start, [0, 1], 2)
    with pytest.raises(ValueError, match="no such seat"):
        _native.Segment(fd, 2, 2, 8.0, 0, False)
    os.close(fd)
    small = new_memory(4096)
    with pytest.raises(ValueError, match="too small"):
        _native.Segment(small, 0, 2, 8.0, 0, False)
    os.close(small)


def test_ranks_of_several_processes_and_of_two_machines() -> None:
    """Two machines that are one, over its own network: sums of each, then of both, in all groups."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    machines = [
        subprocess.Popen([sys.executable, PROGRAM, "4", "2", "2", "2", str(machine), "127.0.0.1", port])
        for machine in range(2)
    ]
    assert [machine.wait(100) for machine in machines] == [0, 0]


def test_cores_are_shared_out_evenly_and_disjoint() -> None:
    cores = [0, 1, 2, 3, 4, 5, 6]
    shares = [share(cores, rank, 3) for rank in range(3)]
    assert [len(one or []) for one in shares] == [2, 2, 2]
    assert len({core for one in shares for core in one or []}) == 6
    assert share([5], 0, 2) is None
    assert cpu_list("0-3,8\n") == [0, 1, 2, 3, 8]


def test_a_shared_sum_does_not_need_contiguous_memory() -> None:
    threads = Threads(2, [range(2)])
    got = {}

    def work(rank: int) -> None:
        got[rank] = threads.group(0, rank).all_reduce_sum(values(rank, 60, torch.float32).view(6, 10).T)

    assert threads.run(work) == [None, None]
    right = (values(0, 60, torch.float32) + values(1, 60, torch.float32)).view(6, 10).T
    assert torch.equal(got[0], right)
    assert torch.equal(got[1], right)

"""A process becomes a rank: it starts the others of its machine or finds them, and ends when any of them fails.

Rank 0 is the process that a user started; on other machines, or under torchrun, every process that a user started is a
rank. How ranks start, talk and fail is told in docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

import eightfold
from eightfold import _native
from eightfold.config import EngineConfig
from eightfold.parallel import Alone, Group, Ranks, alone
from eightfold.parallel.cores import share, usable
from eightfold.parallel.device import connect
from eightfold.parallel.facts import Facts, difference, facts_of
from eightfold.parallel.links import connect_machines
from eightfold.parallel.meeting import Meeting
from eightfold.parallel.place import BACKENDS, VISIBLE_DEVICES, Place, visible
from eightfold.parallel.pulse import Pulse
from eightfold.parallel.remote import NestedGroup, Network
from eightfold.parallel.shared import SharedGroup, new_memory, region_bytes
from eightfold.types import EightfoldError, RankError

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch.distributed warns of host names that it does not need
_REPORTED, _GONE, _SILENT, _SLOW, _STUCK = 1, 2, 3, 4, 5  # Segment::Failure of csrc/core/shared.h
_SPIN_MICROS = 200
_UNCOUNTED = 40  # times the patience with operations that show nothing until they end, and may compile kernels first
_LAST_WORDS = 3  # seconds for children to end, and for word of a failure to come from another machine


class JobEnded(Exception):  # noqa: N818 (it is none)
    """Rank 0 has ended the job: for the other ranks no failure."""


class Job:
    """This process as one rank of `place.size`. `config` has its number of threads; `module` is what other ranks run.

    Raises EightfoldError where the ranks can't be brought together, and RankError, which names the rank, where one
    fails while they start; nothing is left running then.
    """

    def __init__(
        self, config: EngineConfig, place: Place, environ: Mapping[str, str], module: str = "eightfold.worker"
    ) -> None:
        self.place, self.config = place, config
        self.ranks = alone()
        self._pid = os.getpid()
        self._cores = self.cores = usable()  # `cores` are those of all ranks of this machine
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._segment: _native.Segment | None = None
        self._network: Network | None = None
        self._hosts: dict[tuple[int, ...], Group | None] = {}  # None for the groups of others
        self._pulse: Pulse | None = None
        self._closed = threading.Event()
        if place.size == 1:
            return
        self._meeting = Meeting(place, environ)
        self._module = module
        try:
            if place.local_rank == 0 and not place.torchrun:
                self._start_children(environ)
            facts = self._meet()
            if place.nodes > 1:
                self._connect_machines()
            self.ranks = self._groups()
            self.config = replace(config, threads=self._take_cores(facts))
        except BaseException as error:
            if isinstance(error, EightfoldError):
                self._meeting.fail(str(error) if isinstance(error, RankError) else f"rank {place.rank}: {error}")
            self.close(failed=True)
            raise

    def network(self) -> Network:
        """torch.distributed among all ranks, which they must ask for together where they are on one machine."""
        if self._network is None:
            place = self.place
            self._network = Network("gloo", self._meeting.store, place.rank, place.size, place.address)
        return self._network

    def check(self, error: Exception | None) -> None:
        """For collectives between machines: raises if the job is lost. An error's reason may still be on its way."""
        until = time.monotonic() + (self.config.distributed_timeout_seconds if error else 0)
        while self._segment is not None:
            self._segment.advance()
            if self._segment.ended() or self._segment.failure()[0]:
                raise self._lost()
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        if error is not None:
            self.fail(error)
            raise RankError(f"rank {self.place.rank}: {' '.join(str(error).split())}")

    def close(self, failed: bool = False) -> None:
        """Leave the job; rank 0's leaving ends it. May be called again, and does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        if self._segment is not None and self.place.rank == 0 and not failed:
            self._segment.end()
        failed = failed or self.failure() is not None
        if self._pulse is not None:
            self._pulse.close()
        if self._network is not None:
            self._network.close(clean=not failed)
        self._end_children(0 if failed else _LAST_WORDS)
        if self._segment is not None:
            os.sched_setaffinity(0, self._cores)
        self._segment = self._network = self._pulse = None
        self._closed.set()
        self.ranks = alone()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one can't go on."""
        if self._segment is not None:
            text = str(error) if isinstance(error, EightfoldError) else f"{type(error).__name__}: {error}"
            self._segment.fail(f"rank {self.place.rank}: {' '.join(text.split())}")
            if self._pulse is not None:
                self._pulse.join(_LAST_WORDS)

    def failure(self) -> str | None:
        """Which rank failed, and why."""
        if self._segment is None:
            return None
        kind, seat, pid, text = self._segment.failure()
        if kind in (0, _REPORTED):
            return text or None
        rank = self.place.node * self.place.local_size + seat
        who = f"rank {rank} (process {pid})"
        if kind == _GONE:
            child = self._children.get(rank)
            return f"{who} {how_ended(child.poll()) if child else 'is gone'}"
        if kind == _SILENT:
            seconds = self.config.distributed_timeout_seconds
            return f"{who} gave no sign of life for {seconds} s: it is stopped, or its machine hangs"
        if kind == _STUCK:
            return f"{who} is alive, but in the middle of a step nothing of it moved for {text} s"
        return f"{who} lives but did not come to a collective for half an hour"

    def _end_stuck_process(self) -> None:
        """Rank 0's: where a failed job leaves it in the middle of a step, in a call that no failure reaches (a device
        that waits for a rank which is gone; a loop without end), the process can only end."""
        while not self._closed.wait(0.2):
            if self._still() > _LAST_WORDS and (failure := self.failure()):
                print("eightfold: error:", failure, file=sys.stderr, flush=True)
                os._exit(1)

    def _still(self) -> float:
        return 0.0 if self._segment is None else self._segment.still()

    def _lost(self) -> Exception:
        """What a collective raises that can't complete."""
        if failure := self.failure():
            return RankError(failure)
        return JobEnded()

    def _start_children(self, environ: Mapping[str, str]) -> None:
        home = str(Path(eightfold.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [home, environ.get("PYTHONPATH")]))
        in_main = threading.current_thread() is threading.main_thread()
        for rank in range(self.place.rank + 1, self.place.rank + self.place.local_size):
            place = replace(self.place, rank=rank, address=self._meeting.address, port=self._meeting.port)
            own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", **QUIET, **device_of(place, self.config.device, environ)}
            message = {"config": asdict(self.config), "place": asdict(place), "parent": self._pid, "thread": in_main}
            # A terminal's ctrl-C goes to all of them. It is rank 0's; theirs is blocked until they ignore it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", self._module], stdin=subprocess.PIPE, stdout=2, env={**environ, **own}
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._children[rank] = child
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # one that is gone already is found while the ranks meet
                child.stdin.write(json.dumps(message).encode() + b"\n")
                child.stdin.flush()  # and left open: its end is how the child learns of ours

    def _children_live(self) -> None:
        for rank, child in self._children.items():
            if (code := child.poll()) is not None:
                raise RankError(f"rank {rank} (process {child.pid}) {how_ended(code)} while it started")

    def _end_children(self, patience: float) -> None:
        until = time.monotonic() + patience
        for child in self._children.values():
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()  # works on a stopped one, too
                child.wait()
            if child.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was told may still wait to be sent
                    child.stdin.close()
        self._children = {}

    def _meet(self) -> list[Facts]:
        """Every rank's facts, in which nothing differs that must not; this machine's ranks share memory then."""
        place, meeting = self.place, self._meeting
        meeting.put(f"facts/{place.rank}", json.dumps(facts_of(self.config, self._cores)))
        memory = -1
        try:
            if place.local_rank == 0:
                memory = new_memory(self._regions()[-1][0])
                meeting.put(f"memory/{place.node}", f"/proc/{self._pid}/fd/{memory}")
            facts = [json.loads(self._hear(f"facts/{rank}", f"rank {rank}")) for rank in range(place.size)]
            for rank, other in enumerate(facts):
                if text := difference(facts[0], other):
                    raise RankError(f"rank {rank} {text}")
            if place.local_rank != 0:
                memory = _open_memory(self._hear(f"memory/{place.node}", f"rank {place.node * place.local_size}"))
            self._take_seat(memory)
        finally:
            if memory >= 0:
                os.close(memory)
        return facts

    def _take_seat(self, memory: int) -> None:
        """In the machine's segment; its first rank waits until all have opened the memory, which is found by it."""
        place = self.place
        spin = _SPIN_MICROS if len(self._cores) >= place.local_size else 0
        patience = self.config.distributed_timeout_seconds
        self._segment = _native.Segment(memory, place.local_rank, place.local_size, patience, spin, place.rank != 0)
        if place.rank == 0:
            threading.Thread(target=self._end_stuck_process, daemon=True).start()
        self._meeting.put(f"seated/{place.rank}", "")
        if place.local_rank == 0:
            for rank in range(place.rank, place.rank + place.local_size):
                self._hear(f"seated/{rank}", f"rank {rank}")

    def _hear(self, key: str, whose: str) -> str:
        return self._meeting.get(key, whose, self._children_live)

    def _connect_machines(self) -> None:
        """The first rank of each machine listens for signs of life; all ranks join torch.distributed's gloo."""
        place, segment = self.place, self._segment
        assert segment is not None
        if place.local_rank == 0:
            links = connect_machines(place, self._meeting, self._hear)
            patience = self.config.distributed_timeout_seconds
            self._pulse = Pulse(links, segment, self.failure, patience)
            self._pulse.start()
        self.network()

    def _members(self) -> list[list[int]]:
        """The world ranks of every group of the job: the world, those of moe_tp, those of moe_ep; each list once."""
        place = self.place
        tp = [list(range(e * place.moe_tp, (e + 1) * place.moe_tp)) for e in range(place.moe_ep)]
        ep = [list(range(t, place.size, place.moe_tp)) for t in range(place.moe_tp)]
        groups = [list(range(place.size)), *tp, *ep]
        return [group for number, group in enumerate(groups) if len(group) > 1 and group not in groups[:number]]

    def _regions(self) -> list[tuple[int, list[int]]]:
        """For each group of the job, where in this machine's shared memory it is, and which seats here belong to it."""
        first, offset, regions = self.place.node * self.place.local_size, _native.Segment.region_start(), []
        for group in self._members():
            seats = [rank - first for rank in group if 0 <= rank - first < self.place.local_size]
            regions.append((offset, seats))
            offset += region_bytes(len(seats)) if len(seats) > 1 else 0
        return [*regions, (offset, [])]

    def _groups(self) -> Ranks:
        self._hosts = {
            tuple(members): self._group(members, *region)
            for members, region in zip(self._members(), self._regions(), strict=False)
        }
        return self._ranks(self._hosts)

    @contextlib.contextmanager
    def _watch(self, counted: bool) -> Iterator[None]:
        """See `parallel.Watch`."""
        segment = self._segment
        assert segment is not None
        segment.begin_step(self.config.distributed_timeout_seconds * (1 if counted else _UNCOUNTED))
        try:
            yield
        finally:
            segment.end_step()

    def _connect_devices(self, device: torch.device) -> Ranks:
        """The job's groups for what is on `device` as well; see `Ranks.on`."""
        backend = BACKENDS.get(device.type, "")
        has = torch.tensor([dist.is_backend_available(backend)], dtype=torch.int32)
        missing = self.place.size - int(self.ranks.world.all_reduce_sum(has))
        if missing:
            raise EightfoldError(
                f"ranks on {device.type}s need a backend of torch.distributed{backend and f', {backend}'}, which "
                f"{missing} of {self.place.size} ranks do not have"
            )
        self.network()
        made = {members: connect(members, backend, host, device) for members, host in self._hosts.items()}
        return self._ranks(made)

    def _ranks(self, made: Mapping[tuple[int, ...], Group | None]) -> Ranks:
        """This rank's of the job's groups, by their world ranks."""
        place = self.place
        tp = place.rank // place.moe_tp * place.moe_tp
        wanted = (
            tuple(range(place.size)),
            tuple(range(tp, tp + place.moe_tp)),
            tuple(range(place.rank % place.moe_tp, place.size, place.moe_tp)),
        )
        world, moe_tp, moe_ep = (made[members] or Alone() if len(members) > 1 else Alone() for members in wanted)
        return Ranks(
            world,
            moe_tp,
            moe_ep,
            local_size=place.local_size,
            connect=self._connect_devices,
            watch=self._watch,
        )

    def _group(self, members: Sequence[int], offset: int, seats: Sequence[int]) -> Group | None:
        """The group of these world ranks, if this one is of them. All ranks must call it, in the same order."""
        place, segment = self.place, self._segment
        assert segment is not None
        by_node: dict[int, list[int]] = {}
        for member in members:
            by_node.setdefault(member // place.local_size, []).append(member)
        leaders = [group[0] for group in by_node.values()]
        outer = self._network.group(leaders, self.check) if self._network is not None and len(leaders) > 1 else None
        if place.rank not in members:
            return None
        inner = None
        if len(seats) > 1:
            inner = SharedGroup(segment, offset, seats, seats.index(place.local_rank), self._lost)
        if len(by_node) == 1:
            return inner
        return NestedGroup(list(members).index(place.rank), [len(group) for group in by_node.values()], inner, outer)

    def _take_cores(self, facts: Sequence[Facts]) -> int:
        """Bind this process to its share of its machine's cores → its number of threads.

        Ranks that were bound to different cores already stay there; those that ask for more threads than their share
        has cores, or that are more than the cores, run wherever there is room.
        """
        place, wanted = self.place, self.config.threads
        here = facts[place.node * place.local_size :][: place.local_size]
        self.cores = sorted({core for one in here for core in one["cores"]})
        if any(one["cores"] != self._cores for one in here):
            return wanted or len(self._cores)
        cores = share(self._cores, place.local_rank, place.local_size)
        if cores is not None and (wanted or 1) <= len(cores):
            os.sched_setaffinity(0, cores)
        return wanted or len(cores or [0])


def how_ended(code: int | None) -> str:
    """What to say of a process by its exit code: None while it runs, negative where a signal killed it."""
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (": by someone, or by the system for want of memory" if name == "SIGKILL" else "")


def _open_memory(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        raise EightfoldError(
            f"the shared memory of this machine's first rank, {path}, cannot be opened ({error.strerror}): ranks of "
            "one machine must be processes of one user, in one container"
        ) from None


def device_of(place: Place, device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variable that shows a rank its own device only, as device 0."""
    variable = VISIBLE_DEVICES.get(device)
    if variable is None:
        return {}
    listed = visible(environ.get(variable, ""))
    return {variable: listed[place.local_rank] if listed else str(place.local_rank)}


def follow_job(job: Job, follow: Callable[[Job], None]) -> int:
    """Run `follow` as one of `job`'s ranks until rank 0 ends it → the exit code. Raises what goes wrong, once told."""
    try:
        follow(job)
    except JobEnded:
        return 0
    except RankError:
        raise
    except BaseException as error:
        job.fail(error)
        raise
    finally:
        job.close(failed=job.failure() is not None)
    return 0

"""Ranks as threads of one process, for tests: a Group whose collectives meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eightfold.parallel import Ranks

PATIENCE = 60  # seconds that a rank waits for the others


class Meeting:
    """What the ranks of a group share: a place for each one's contribution."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.places: list[Any] = [None] * size

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        """Everyone's contribution, on every rank."""
        self.places[rank] = mine
        self.barrier.wait(PATIENCE)
        everyone = list(self.places)
        self.barrier.wait(PATIENCE)
        return everyone


class ThreadGroup:
    """One thread's view of a group; counts its collectives and the bytes that it puts into each kind."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = len(meeting.places)
        self.calls: list[tuple[str, int]] = []
        self.messages: list[bytes] = []  # that this rank has sent

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        assert x.dtype in (torch.float32, torch.int32)
        first, *others = self._exchange("sum", x)
        x.copy_(first)  # into the caller's memory, as real groups do
        for other in others:
            x += other
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x.copy_(torch.stack(self._exchange("max", x)).amax(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange("gather", x), 1)

    def broadcast(self, message: bytes | None) -> bytes:
        assert (message is not None) == (self.rank == 0)
        if message is not None:
            self.messages.append(message)
        sent = self._meeting.exchange(self.rank, message)[0]
        assert isinstance(sent, bytes)
        return sent

    def _exchange(self, kind: str, x: Tensor) -> list[Tensor]:
        """Copies of all contributions; the ranks must agree on what they are calling, and with what shape."""
        self.calls.append((kind, x.nbytes))
        everyone = self._meeting.exchange(self.rank, (kind, x.shape, x.clone()))
        assert len({(k, shape) for k, shape, _ in everyone}) == 1, everyone
        return [tensor for _, _, tensor in everyone]


def make_ranks(size: int, moe_ep: int = 1) -> list[Ranks]:
    """The groups of each rank, with experts shared out among `moe_ep` groups."""
    tp = size // moe_ep
    world, across = Meeting(size), [Meeting(moe_ep) for _ in range(tp)]
    within = [Meeting(tp) for _ in range(moe_ep)]
    return [
        Ranks(
            ThreadGroup(world, rank),
            ThreadGroup(within[rank // tp], rank % tp),
            ThreadGroup(across[rank % tp], rank // tp),
        )
        for rank in range(size)
    ]


def run_ranks(ranks: list[Ranks], work: Callable[[Ranks], Any]) -> list[Any]:
    """`work` on every rank at once → their results. The first failure breaks all barriers and is raised."""
    results: list[Any] = [None] * len(ranks)
    failures: list[BaseException] = []

    def one(number: int) -> None:
        try:
            results[number] = work(ranks[number])
        except BaseException as failure:
            failures.append(failure)
            for group in (ranks[number].world, ranks[number].moe_tp, ranks[number].moe_ep):
                group._meeting.barrier.abort()  # type: ignore[attr-defined]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures.sort(key=lambda failure: isinstance(failure, threading.BrokenBarrierError))
    if failures:
        raise failures[0]
    return results

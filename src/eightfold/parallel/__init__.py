"""Ranks that compute one model together: what the rest of the house sees of them.

A `Group` is the collectives of some ranks; `Ranks` says which groups a rank belongs to. How ranks are started and how
they talk is in this package's other files; the model, the runner and the backends need no more than this one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """Some ranks and their collectives. All ranks of a group must make the same calls in the same order.

    Results have the same bits on every rank and in every run: sums are taken in the order of the ranks. They are the
    caller's: no later call changes them.
    Raises EightfoldError, naming the rank, when another one is gone or does not answer in time.
    """

    @property
    def rank(self) -> int:
        """This rank's number within the group."""

    @property
    def size(self) -> int: ...

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """x of fp32 or int32 → the sum over the ranks, of the same shape; may reuse x's memory."""

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """x of fp32 → the elementwise maximum over the ranks; a NaN anywhere gives a NaN. May reuse x's memory."""

    def all_gather(self, x: Tensor) -> Tensor:
        """x [T, n], n the same on every rank → [T, size · n], rank after rank along the last axis."""

    def broadcast(self, message: bytes | None) -> bytes:
        """Rank 0's message, on every rank; the others pass None."""


class Alone:
    """The group of a single rank."""

    rank = 0
    size = 1

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, message: bytes | None) -> bytes:
        assert message is not None
        return message


# Within it this process must get on, or it has failed. The argument says whether work within an operation is counted.
Watch = Callable[[bool], AbstractContextManager[object]]


def unwatched(counted: bool) -> AbstractContextManager[object]:
    """For ranks that nobody waits for."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Ranks:
    """The groups that one rank belongs to.

    `world` shards attention and the vocabulary (tensor parallel over all ranks). The experts are shared out among the
    ranks of `moe_ep` (contiguous experts each), and each expert's width among those of `moe_tp`;
    moe_tp.size · moe_ep.size = world.size, and world rank = moe_ep.rank · moe_tp.size + moe_tp.rank.

    `exact`: sums over ranks of integer schemes are taken so that their bits are those of one rank, which costs more and
    larger messages. `local_size` ranks, this one among them, share a machine's memory. `connect` joins the ranks'
    devices, see `on`; `watch` is for what others wait for.
    """

    world: Group
    moe_tp: Group
    moe_ep: Group
    exact: bool = True
    local_size: int = 1
    connect: Callable[[torch.device], Ranks] | None = None
    watch: Watch = unwatched

    def on(self, device: torch.device) -> Ranks:
        """The same ranks, whose groups also take tensors on `device`, this rank's own. All ranks must ask together.

        Raises EightfoldError where devices of this kind can't be connected."""
        if device.type == "cpu" or self.connect is None:
            return self
        return replace(self.connect(device), exact=self.exact)


def alone() -> Ranks:
    """One rank that does everything."""
    return Ranks(Alone(), Alone(), Alone())

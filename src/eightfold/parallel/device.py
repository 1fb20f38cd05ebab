"""Groups of ranks that compute on devices: numbers on a device stay there and go through its own backend of
torch.distributed, hccl or nccl; plans, and whatever else is on the host, go as between CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eightfold.parallel import Group
from eightfold.parallel.remote import TorchGroup
from eightfold.types import EightfoldError

_TRIAL = 33  # numbers of each rank


class DeviceGroup(TorchGroup):
    """A group of ranks with a device each, all of one `kind` ("npu"). `group` is a process group of the kind's backend
    among them, `host` their group for what is on the host.

    A collective is put into the device's queue behind what is there, and not waited for. What the backends promise
    differs by version and product, so as little as possible is asked of them: gathering, and sums of int32, exact in
    any order. Floats are added here, in the order of the ranks. `shares`: whether long sums are shared out among the
    ranks, 2 (n − 1)/n of their bytes sent instead of n − 1, which needs a backend that exchanges parts correctly.
    """

    exact_from = 0

    def __init__(self, group: dist.ProcessGroup, host: Group, kind: str, shares: bool = False) -> None:
        super().__init__(group, _never)
        self.process_group = group  # for operations of a device that communicate on their own
        self._host, self._kind = host, kind
        self.shares = shares

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return super().all_reduce_sum(x) if self._is_mine(x) else self._host.all_reduce_sum(x)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return super().all_reduce_max(x) if self._is_mine(x) else self._host.all_reduce_max(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return super().all_gather(x) if self._is_mine(x) else self._host.all_gather(x)

    def broadcast(self, message: bytes | None) -> bytes:
        return self._host.broadcast(message)

    def try_out(self, device: torch.device) -> None:
        """For all ranks at once: a gathering and a sum whose results are known, and whether parts can be exchanged.

        There are versions of HCCL whose exchange says that all is well and gives zeros. Raises EightfoldError where the
        backend can't be used at all.
        """
        numbers = torch.arange(_TRIAL * self.size, dtype=torch.int32).view(self.size, _TRIAL)  # a row each rank
        mine = numbers[self.rank].to(device)
        try:
            gathered = self._parts(mine).cpu()
            total = super().all_reduce_sum(mine.clone()).cpu()
        except RuntimeError as error:
            raise EightfoldError(f"ranks cannot talk through {self._backend()}: {_first_line(error)}") from error
        if not torch.equal(gathered, numbers) or not torch.equal(total, numbers.sum(0, dtype=torch.int32)):
            raise EightfoldError(f"{self._backend()} gives wrong results among {self.size} ranks of {device.type}s")
        try:
            exchanged = self._exchange(mine[None].repeat(self.size, 1)).cpu()
            right = torch.equal(exchanged, numbers)
        except RuntimeError:
            right = False
        votes = self._host.all_reduce_sum(torch.tensor([int(right)], dtype=torch.int32))
        self.shares = int(votes) == self.size

    def _is_mine(self, x: Tensor) -> bool:
        return x.device.type == self._kind

    def _backend(self) -> str:
        return str(dist.get_backend(self._group))

    def _wait(self, start: Callable[[], Any]) -> None:
        start().wait()  # lets the device's queue wait, not this thread


def connect(members: Sequence[int], backend: str, host: Group | None, device: torch.device) -> DeviceGroup | None:
    """The group of these world ranks' devices; `host` is None on a rank that is not of them. All ranks must call it, in
    the same order, once torch.distributed runs. Raises EightfoldError where the backend is missing or does not work."""
    try:
        group = dist.new_group(list(members), backend=backend)
    except (RuntimeError, ValueError) as error:
        raise EightfoldError(f"torch.distributed has no usable backend {backend}: {_first_line(error)}") from error
    if host is None:
        return None
    made = DeviceGroup(group, host, device.type)
    made.try_out(device)
    return made


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _never(error: Exception | None) -> None:
    """Nobody asks: while a device waits, this thread does not."""

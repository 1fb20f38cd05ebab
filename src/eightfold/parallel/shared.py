"""Groups of ranks on one machine, on shared memory: csrc/core/shared.cpp does the work."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eightfold import _native
from eightfold.types import EightfoldError

SUMS = {torch.float32: 0, torch.int32: 1}
MAXIMUM = 2
_LENGTH = struct.Struct("<q")
_INLINE = 4 << 10  # a message up to here goes in one piece with its length
Lost = Callable[[], Exception]  # what to raise when another rank is lost


class SharedGroup:
    """Collectives of some ranks of a machine; see `eightfold.parallel.Group`.

    `members` are the ranks' seats in the segment, `rank` this one's place among them. A message to all may take as
    long as it wants to come (a follower waits for work); everything else has half an hour.
    """

    def __init__(self, segment: _native.Segment, offset: int, members: Sequence[int], rank: int, lost: Lost) -> None:
        self.rank, self.size = rank, len(members)
        self._native = _native.SharedGroup(segment, offset, list(members), rank)
        self._lost = lost

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        if x.dtype not in SUMS:
            raise EightfoldError(f"a sum over ranks of {x.dtype}; it must be float32 or int32")
        return self._reduce(x, SUMS[x.dtype])

    def all_reduce_max(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise EightfoldError(f"a maximum over ranks of {x.dtype}; it must be float32")
        return self._reduce(x, MAXIMUM)

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, width = x.shape
        out = torch.empty(rows, self.size * width, dtype=x.dtype)
        self._call(self._native.all_gather, x.data_ptr(), out.data_ptr(), rows, width * x.element_size())
        return out

    def broadcast(self, message: bytes | None) -> bytes:
        first = torch.empty(_INLINE, dtype=torch.uint8)
        if message is not None:
            head = _LENGTH.pack(len(message)) + message[: _INLINE - _LENGTH.size]
            first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self.copy_from_first(first, endless=True)
        return self._rest(message, first.numpy().tobytes())

    def copy_from_first(self, x: Tensor, endless: bool = False) -> Tensor:
        """x of any dtype, contiguous: overwritten by the first rank's."""
        self._call(self._native.broadcast, x.data_ptr(), x.numel() * x.element_size(), endless)
        return x

    def _rest(self, message: bytes | None, first: bytes) -> bytes:
        """The whole message, given its first piece."""
        (length,) = _LENGTH.unpack_from(first)
        got = first[_LENGTH.size : _LENGTH.size + length]
        if length > len(got):
            rest = bytearray(message[len(got) :] if message is not None else length - len(got))
            self.copy_from_first(torch.frombuffer(rest, dtype=torch.uint8))
            got += bytes(rest)
        return got if message is None else message

    def _reduce(self, x: Tensor, operation: int) -> Tensor:
        x = x.contiguous()
        self._call(self._native.all_reduce, x.data_ptr(), x.numel(), operation)
        return x

    def _call(self, function: Callable[..., None], *args: int) -> None:
        try:
            function(*args)
        except _native.RankLost:
            raise self._lost() from None


def region_bytes(members: int) -> int:
    """Bytes of shared memory that a group of so many ranks takes."""
    return _native.SharedGroup.region_bytes(members)


def new_memory(size: int) -> int:
    """A file descriptor of `size` zeroed bytes of memory to share.

    It has no name in any file system, so nothing is left behind however a job ends.
    """
    if not hasattr(os, "memfd_create"):
        raise EightfoldError("several ranks on one machine need Linux: this system has no memfd_create")
    fd = os.memfd_create("eightfold")
    os.ftruncate(fd, size)
    return fd

"""How a file of weights comes into memory: mapped, copied into huge pages, or mapped and locked.

A mapped file costs no memory of its own: its pages are the system's file cache, shared by all processes. Asked for
huge pages, Linux reads and maps 2 MiB at a time where the file system can (ext4 and xfs on recent kernels), which is
as fast to read as anonymous huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from eightfold.types import EightfoldError

LOAD_MODES = ("mmap", "copy", "lock")
HUGE_PAGE = 2 << 20
_CHUNK = 32 << 20
_MADV_POPULATE_READ = 22
_THREADS = 4  # enough requests to keep a disk busy

BytesDone = Callable[[int], None]  # called with the number of bytes that have come in since the last call


class FileMemory(NamedTuple):
    """A file's bytes: `buffer[offset:]`."""

    buffer: mmap.mmap
    offset: int


def load_file(file: BinaryIO, size: int, mode: str, progress: BytesDone | None = None) -> FileMemory:
    """A file of `size` > 0 bytes, in the way that `mode` (one of LOAD_MODES) says; reports bytes copied or locked.

    Raises OSError when the file can't be read, EightfoldError when the memory is not to be had.
    """
    report = progress or (lambda count: None)
    if mode == "copy":
        return _copy(file, size, report)
    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    with contextlib.suppress(OSError, AttributeError):  # a wish only: small pages are as right, and slower
        mapped.madvise(mmap.MADV_HUGEPAGE)
    if mode == "lock":
        _lock(mapped, size, report)
    return FileMemory(mapped, 0)


def _copy(file: BinaryIO, size: int, report: BytesDone) -> FileMemory:
    try:
        buffer = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        size_text = f"{size / 2**30:.1f} GiB"
        raise EightfoldError(f"no memory to copy {size_text} of weights into: use --load-mode mmap") from None
    with contextlib.suppress(OSError, AttributeError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    shift = -_address(buffer) % HUGE_PAGE  # so that the file's first byte starts a huge page
    view = memoryview(buffer)

    def read(start: int) -> int:
        at, end = start, min(start + _CHUNK, size)
        while at < end:
            count = os.preadv(file.fileno(), [view[shift + at : shift + end]], at)
            if not count:
                raise OSError(5, "it became shorter while it was read")
            at += count
        return end - start

    with ThreadPoolExecutor(_THREADS) as pool:
        for count in pool.map(read, range(0, size, _CHUNK)):
            report(count)
    return FileMemory(buffer, shift)


def _lock(mapped: mmap.mmap, size: int, report: BytesDone) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    pages = np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE]
    start = _address(mapped)

    def lock(at: int) -> int:
        count = min(_CHUNK, size - at)
        # Touched first: what mlock itself brings in is mapped by small pages, which are a third slower to read.
        pages[at // mmap.PAGESIZE : -(-(at + count) // mmap.PAGESIZE)].max()
        if libc.mlock(ctypes.c_void_p(start + at), ctypes.c_size_t(count)):
            reason = os.strerror(ctypes.get_errno())
            raise EightfoldError(
                f"cannot lock the weights in memory ({reason}): raise the limit (ulimit -l unlimited) or use "
                "--load-mode mmap or copy"
            )
        return count

    with ThreadPoolExecutor(_THREADS) as pool:
        for count in pool.map(lock, range(0, size, _CHUNK)):
            report(count)


def populate(address: int, size: int) -> None:
    """Waits until a mapped range is in memory and mapped, where the system can do that (Linux 5.14). A wish only."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), _MADV_POPULATE_READ)


def _address(buffer: mmap.mmap) -> int:
    """Where a map lies in memory; ctypes refuses to say it of a read-only one."""
    return int(np.frombuffer(buffer, np.uint8, count=1).ctypes.data)

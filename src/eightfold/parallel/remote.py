"""Groups of ranks on several machines, on torch.distributed: gloo between CPUs, nccl or hccl between accelerators."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from fcntl import ioctl
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from eightfold.parallel.shared import SUMS, SharedGroup
from eightfold.types import EightfoldError

_SLICE = timedelta(seconds=0.5)  # how long to wait before looking whether the job is lost
_SHARES_FROM = 64 << 10  # bytes: longer sums are shared out among the ranks
_MESSAGE = 4 << 10  # bytes of a message that go together with its length
_HEADER = struct.Struct("<q")
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
# One tensor gathered into one; torch calls it all_gather_single since 2.13.
_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
Check = Callable[["Exception | None"], None]  # raises when the job is lost; is told what torch.distributed complains of


class TorchGroup:
    """Collectives on a process group of torch.distributed; see `eightfold.parallel.Group`.

    torch's own all_reduce adds in an order of its backend's choice (gloo's ring starts each part of a message at
    another rank), which changes with length and number of ranks. That does not matter to integers. Floats are brought
    together unadded, all of them or each rank's share, and added in the order of the ranks. `check` raises when the
    job is lost; it is asked while a collective waits, for on a cut wire gloo hears nothing.
    """

    exact_from = _SHARES_FROM  # bytes of int32 from which torch's own sum takes less time
    shares = True  # whether long sums of floats are shared out among the ranks

    def __init__(self, group: dist.ProcessGroup, check: Check) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group
        self._check = check

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        if x.dtype not in SUMS:
            raise EightfoldError(f"a sum over ranks of {x.dtype}; it must be float32 or int32")
        if x.dtype == torch.int32 and x.nbytes >= self.exact_from:
            x = x.contiguous()
            self._wait(lambda: dist.all_reduce(x, group=self._group, async_op=True))
            return x
        return self._reduce(x, torch.add)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._reduce(x, torch.maximum)

    def all_gather(self, x: Tensor) -> Tensor:
        parts = self._parts(x.contiguous())  # [size, T, n]
        return parts.transpose(0, 1).reshape(x.shape[0], -1)

    def broadcast(self, message: bytes | None) -> bytes:
        first = torch.zeros(_MESSAGE, dtype=torch.uint8)
        if message is not None:
            head = _HEADER.pack(len(message)) + message[: _MESSAGE - _HEADER.size]
            first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        raw = self.copy_from_first(first).numpy().tobytes()
        (length,) = _HEADER.unpack_from(raw)
        got = raw[_HEADER.size : _HEADER.size + length]
        if length > len(got):
            rest = bytearray(message[len(got) :] if message is not None else length - len(got))
            self.copy_from_first(torch.frombuffer(rest, dtype=torch.uint8))
            got += bytes(rest)
        return got

    def copy_from_first(self, x: Tensor) -> Tensor:
        """x contiguous: overwritten by the first rank's."""
        source = dist.get_global_rank(self._group, 0)
        self._wait(lambda: dist.broadcast(x, source, self._group, async_op=True))
        return x

    def _reduce(self, x: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = x.contiguous()
        if self.size < 3 or x.nbytes < _SHARES_FROM or not self.shares:
            return _in_order(self._parts(x), combine)
        share = -(-x.numel() // self.size)
        padded = x.new_zeros(self.size * share)
        padded[: x.numel()] = x.view(-1)
        mine = _in_order(self._exchange(padded.view(self.size, share)), combine)  # [share]
        return self._parts(mine).view(-1)[: x.numel()].view(x.shape)

    def _exchange(self, x: Tensor) -> Tensor:
        """x [size, n], a row for each rank → [size, n], a row of each rank."""
        out = torch.empty_like(x)
        self._wait(lambda: dist.all_to_all_single(out, x, group=self._group, async_op=True))
        return out

    def _parts(self, x: Tensor) -> Tensor:
        """x of every rank, [size, …]."""
        out = x.new_empty(self.size * x.numel())
        self._wait(lambda: _GATHER(out, x.view(-1), self._group, async_op=True))
        return out.view(self.size, *x.shape)

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            work = start()
            while not _completed(work):
                self._check(None)
        except EightfoldError:
            raise
        except RuntimeError as error:  # gloo's word for whatever went wrong
            self._check(error)
            raise


class NestedGroup:
    """Ranks on several machines: through shared memory on each machine, and between its first members over the network.

    Sums are taken machine by machine, within each in the order of its ranks: a fixed order, though not the one that the
    same ranks on one machine would add in (for floats the last bits may differ; integers are exact).
    """

    def __init__(
        self, rank: int, by_machine: Sequence[int], inner: SharedGroup | None, outer: TorchGroup | None
    ) -> None:
        self.rank, self.size = rank, sum(by_machine)
        self._by_machine = by_machine  # members on each
        self._inner, self._outer = inner, outer  # None: alone on this machine; not the first on this machine

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, "all_reduce_sum")

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._reduce(x, "all_reduce_max")

    def all_gather(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        mine = x.contiguous() if self._inner is None else self._inner.all_gather(x)  # [T, members here · n]
        out = x.new_empty(rows, self.size * width)
        if self._outer is not None:
            most = max(self._by_machine) * width
            padded = torch.nn.functional.pad(mine, (0, most - mine.shape[1]))
            parts = torch.split(self._outer.all_gather(padded), most, 1)
            torch.cat([part[:, : n * width] for part, n in zip(parts, self._by_machine, strict=True)], 1, out=out)
        return self._share(out)

    def broadcast(self, message: bytes | None) -> bytes:
        if self._outer is not None:
            message = self._outer.broadcast(message)
        return self._inner.broadcast(message) if self._inner is not None else message or b""

    def _reduce(self, x: Tensor, operation: str) -> Tensor:
        x = x.contiguous()
        for group in (self._inner, self._outer):
            if group is not None:
                x = getattr(group, operation)(x)
        return self._share(x)

    def _share(self, x: Tensor) -> Tensor:
        return x if self._inner is None else self._inner.copy_from_first(x)


class Network:
    """torch.distributed's process group of all ranks, from which groups are made. `address` is where rank 0 is reached.

    A rank that waits for a peer which a cut wire keeps silent can only be freed by hanging up on our side. torch has no
    call for that, so the sockets that came with the process group are remembered.
    """

    def __init__(self, backend: str, store: Store, rank: int, size: int, address: str) -> None:
        if dist.is_initialized():
            raise EightfoldError("torch.distributed is in use in this process; Eightfold needs it for its own ranks")
        before = _sockets()
        with _interface_towards(address):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=30))
        self._before, self._address = before, address
        self._opened = _sockets().items() - before.items()

    def group(self, ranks: Sequence[int], check: Check) -> TorchGroup | None:
        """The group of these ranks, in this order; None to a rank that is not of them. All ranks must call it."""
        with _interface_towards(self._address):
            group = dist.new_group(list(ranks))
        self._opened = _sockets().items() - self._before.items()
        return TorchGroup(group, check) if dist.get_rank() in ranks else None

    def close(self, clean: bool) -> None:
        """Leave it; not `clean` is without waiting for anyone."""
        if not clean:
            for _, number in self._opened & _sockets().items():
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
                    one.getpeername()  # not one that listens: gloo ends the whole process when that breaks
                    one.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(RuntimeError):
            if dist.is_initialized():  # else a device's library has done so, as the program ends
                dist.destroy_process_group()


def _sockets() -> dict[str, int]:
    """The sockets that this process has open: descriptor by name."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own descriptor is gone by now
            name = str(path.readlink())
            if name.startswith("socket:"):
                found[name] = int(path.name)
    return found


@contextlib.contextmanager
def _interface_towards(address: str) -> Iterator[None]:
    """gloo asks the host's name for an address, which on many machines is one that nobody else reaches. So it is told
    the network interface that leads to rank 0, unless GLOO_SOCKET_IFNAME says which."""
    name = "GLOO_SOCKET_IFNAME"
    found = None if name in os.environ else interface_of(local_address(address))
    if found is not None:
        os.environ[name] = found
    try:
        yield
    finally:
        if found is not None:
            del os.environ[name]


def local_address(towards: str) -> str:
    """This machine's address on the way to another; nothing is sent."""
    family, kind, _, _, target = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                raw = ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(raw[20:24]) == address:
                    return name
    return None


def _completed(work: Any) -> bool:
    """Wait for a while → whether it is done. Raises RuntimeError if it failed."""
    try:
        return bool(work.wait(_SLICE))
    except RuntimeError:
        if work.is_completed():
            raise
        return False


def _in_order(parts: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """parts [size, …] combined rank after rank."""
    total = parts[0].clone()
    for part in parts[1:]:
        total = combine(total, part)
    return total

"""How ranks find one another: a key-value store that rank 0 serves, or torchrun for it."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from eightfold.parallel.place import Place
from eightfold.types import EightfoldError, RankError

PATIENCE = 120  # seconds for ranks to come: machines are often started by hand, one after the other
_POLL = 0.02


class Meeting:
    """What ranks tell one another while they start. Whoever fails then says so, and everyone who waits hears it."""

    def __init__(self, place: Place, environ: Mapping[str, str]) -> None:
        self._rank = place.rank
        served = place.torchrun and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = place.rank == 0 and not served
        self.address, self.port = place.address, place.port
        listener = _listen(place) if serves else None
        if listener is not None:
            self.port = listener.getsockname()[1]
        else:
            _await_server(place)
        try:
            store = TCPStore(
                self.address,
                self.port,
                is_master=serves,
                timeout=timedelta(seconds=15),
                wait_for_workers=False,
                master_listen_fd=None if listener is None else listener.detach(),
            )
        except dist.DistError:
            raise EightfoldError(
                f"what answers at {place.address} port {place.port} is no rank 0: set {place.port_name} to the port "
                "that rank 0 was started with"
            ) from None
        # torchrun's store outlives a start that failed and is tried again.
        run = environ.get("TORCHELASTIC_RUN_ID", ""), environ.get("TORCHELASTIC_RESTART_COUNT", "")
        self.store = PrefixStore("/".join(("eightfold", *run)), store)

    def put(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str, whose: str, check: Callable[[], None]) -> str:
        """What was put there, waiting for it. `check` may raise in between; RankError if someone failed or is late."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                if self.store.check([key]):
                    return str(self.store.get(key).decode())
                if self.store.check(["failed"]):
                    raise RankError(self.store.get("failed").decode())
            except dist.DistError:
                raise RankError("rank 0 has gone while the ranks were starting; its own message says why") from None
            check()
            if time.monotonic() > until:
                raise RankError(f"{whose} did not come within {PATIENCE} s")
            time.sleep(_POLL)

    def fail(self, reason: str) -> None:
        """Tell everyone who waits here."""
        try:
            self.store.set("failed", reason)
        except dist.DistError:
            return  # rank 0 is gone, which the others see as well


def _listen(place: Place) -> socket.socket:
    """The socket of rank 0's store: bound to its address alone, and where the user can be told what is wrong."""
    family, kind, _, _, target = _resolve(place)
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(target)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise EightfoldError(
                f"port {place.port} is in use on {place.address}: set {place.port_name} to another"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise EightfoldError(
                f"{place.address} is no address of this machine, where rank 0 is to run: correct --master-addr "
                "(MASTER_ADDR) or --node-rank"
            ) from None
        raise EightfoldError(
            f"rank 0 cannot listen at {place.address} port {place.port} ({place.port_name}): {error.strerror}"
        ) from None
    return listener


def _await_server(place: Place) -> None:
    """Until rank 0's port answers. torch would try as well, but not say what it waits for."""
    *_, target = _resolve(place)
    until = time.monotonic() + PATIENCE
    while error := _refusal(target[:2]):
        if time.monotonic() > until:
            raise RankError(
                f"rank 0 did not answer at {place.address} port {place.port} within {PATIENCE} s ({error}): is it "
                f"started there, with the same {place.port_name}?"
            )
        time.sleep(0.2)


def _refusal(target: tuple[str, int]) -> str | None:
    """Why nothing answers there; None if something does."""
    try:
        socket.create_connection(target, timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _resolve(place: Place) -> tuple[int, int, int, str, tuple[str, int]]:
    try:
        return socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0]  # type: ignore[return-value]
    except OSError as error:
        raise EightfoldError(
            f"--master-addr (MASTER_ADDR) is {place.address!r}, which is no address: {error.strerror}"
        ) from None

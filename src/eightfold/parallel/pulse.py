"""Signs of life between machines, over one connection from each to rank 0's; and word of how a job ends.

Collectives between machines cannot tell a slow peer from a cut wire. This thread can: it hears from every machine twice
a second, or notices that it does not.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from eightfold import _native

_TICK = 0.5  # seconds
_LONGEST = 64 << 10  # bytes of a line; what sends more is no Eightfold


class Pulse(threading.Thread):
    """The first rank of each machine runs one. `links` are connections by what their other end is called, as in
    "machine 1 (10.0.0.2, ranks 2 to 3)"; machine 0 has one to each other machine, the others have one to machine 0.

    Failures travel both ways: what is heard goes into `segment`, what `describe` says of the segment to the others.
    """

    def __init__(
        self,
        links: Mapping[str, socket.socket],
        segment: _native.Segment,
        describe: Callable[[], str | None],
        patience: float,
    ) -> None:
        super().__init__(name="eightfold pulse", daemon=True)
        self._links = dict(links)
        self._segment = segment
        self._describe = describe
        self._patience = max(2, int(patience / _TICK))
        self._silent = dict.fromkeys(links, 0)  # ticks; counted, so that a job stopped as a whole may go on
        self._buffers = dict.fromkeys(links, b"")
        self._leaving = threading.Event()
        for link in self._links.values():
            link.setblocking(False)

    def run(self) -> None:
        while self._links and not self._leaving.is_set():
            self._listen()
            if message := self._last_word():
                break
            self._say({})
            self._count()
        else:
            message = self._last_word() or {"ended": True}
        self._say(message)
        for link in self._links.values():
            link.close()

    def close(self) -> None:
        """Say how the job ended, and end."""
        self._leaving.set()
        self.join(3 * _TICK)

    def _last_word(self) -> dict[str, Any] | None:
        if failure := self._describe():
            return {"failed": failure}
        return {"ended": True} if self._segment.ended() else None

    def _listen(self) -> None:
        """For a tick, or until something has gone wrong."""
        by_link = {link: name for name, link in self._links.items()}
        end = time.monotonic() + _TICK
        while (left := end - time.monotonic()) > 0 and not self._leaving.is_set() and not self._last_word():
            for link in select.select(list(by_link), [], [], left)[0]:
                self._hear(by_link[link], link)

    def _hear(self, name: str, link: socket.socket) -> None:
        try:
            data = link.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._segment.fail(f"{name}: the connection broke ({error.strerror or error})")
            return
        *lines, self._buffers[name] = (self._buffers[name] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "failed" in message:
                self._segment.fail(str(message["failed"]))
            if "ended" in message:
                self._segment.end()
        if (not data or len(self._buffers[name]) > _LONGEST) and not self._segment.ended():
            self._segment.fail(f"{name}: the connection was closed; its processes are gone")
        self._silent[name] = 0

    def _say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        for link in self._links.values():
            with contextlib.suppress(OSError):  # listening finds out, and says so
                link.sendall(data)  # a few bytes: a full buffer means that nobody has read for long

    def _count(self) -> None:
        for name in self._silent:
            self._silent[name] += 1
            if self._silent[name] > self._patience:
                self._segment.fail(f"{name}: no sign of life for {self._patience * _TICK:.0f} s")

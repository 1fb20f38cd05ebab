"""The connections between machines that carry signs of life (see `pulse`)."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable

from eightfold.parallel.meeting import Meeting
from eightfold.parallel.place import Place
from eightfold.parallel.remote import local_address
from eightfold.types import RankError

Hear = Callable[[str, str], str]  # key, whose → what was put there
_HELLO = 200  # bytes at most


def connect_machines(place: Place, meeting: Meeting, hear: Hear) -> dict[str, socket.socket]:
    """For the first rank of each machine. On machine 0 a connection from each other machine, elsewhere one to machine
    0; each with what to call its other end."""
    address = local_address(place.address)
    meeting.put(f"address/{place.node}", address)
    others = range(1, place.nodes) if place.node == 0 else range(1)
    names = {node: _name(place, node, hear(f"address/{node}", f"machine {node}")) for node in others}
    if place.node == 0:
        return {names[node]: link for node, link in _accept(place, address, meeting, hear).items()}
    host, port, token = json.loads(hear("pulse", "rank 0"))
    try:
        link = socket.create_connection((host, port), timeout=15)
        link.sendall(json.dumps([place.node, token]).encode().ljust(_HELLO))
    except OSError as error:
        raise RankError(f"{names[0]} cannot be reached at port {port}: {error.strerror or error}") from None
    meeting.put(f"linked/{place.node}", "")
    return {names[0]: link}


def _accept(place: Place, address: str, meeting: Meeting, hear: Hear) -> dict[int, socket.socket]:
    token = secrets.token_hex(16)
    links: dict[int, socket.socket] = {}
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        meeting.put("pulse", json.dumps([address, listener.getsockname()[1], token]))
        for node in range(1, place.nodes):  # connected before they say so: what is waited for is in the backlog
            hear(f"linked/{node}", f"machine {node}")
        listener.settimeout(15)
        while len(links) < place.nodes - 1:
            link, _ = listener.accept()
            if (sender := _greeted(link, token)) is not None:
                links[sender] = link
            else:
                link.close()  # a stranger
    return links


def _greeted(link: socket.socket, token: str) -> int | None:
    """The machine at the other end, if it knows the token."""
    link.settimeout(15)
    hello = b""
    try:
        while len(hello) < _HELLO and (data := link.recv(_HELLO - len(hello))):
            hello += data
        node, given = json.loads(hello)
    except (OSError, ValueError, TypeError):  # silent, or of no such form
        return None
    return int(node) if given == token else None


def _name(place: Place, node: int, address: str) -> str:
    first, last = node * place.local_size, (node + 1) * place.local_size - 1
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    return f"{ranks} (machine {node}, {address})"

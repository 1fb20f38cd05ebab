"""The other side of `sandbox`: a program of its own, which limits itself before it runs what it was given.

It imports nothing of Eightfold. Standard input brings the limits and the program as JSON; the only thing ever written
to standard output is the secret word and the outcome.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

NEW_USER, NEW_PID, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # flags of Linux's unshare
PARENT_DEATH_SIGNAL = 1  # of its prctl


class TimeUp(BaseException):
    """Not an Exception, so that a program's own handlers seldom catch it."""


def main() -> NoReturn:
    given = json.load(sys.stdin)
    report = os.dup(1)  # descriptors 0 to 2 lead nowhere for the program
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.set_inheritable(report, False)
    _leave_namespaces()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(0 if status == 0 else 1)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    _limit(given)
    own = os.getpid()
    outcome = _outcome(given["program"], given["seconds"])
    if os.getpid() != own:
        os._exit(1)  # a child of the program has no say
    os.write(report, f"{given['word']} {outcome}".encode(errors="replace"))
    os._exit(0)


def _leave_namespaces() -> None:
    """No network, and children that end with us, where the system lets an ordinary user have namespaces."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if library.unshare(NEW_USER | NEW_NETWORK | NEW_PID):
            library.unshare(NEW_USER | NEW_NETWORK)


def _limit(given: dict[str, Any]) -> None:
    seconds = int(given["seconds"]) + 2
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, given["memory"]),
        (resource.RLIMIT_FSIZE, given["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard),) * 2)


def _outcome(program: str, seconds: float) -> str:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # and again, should the program have caught the first
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        return "passed"
    except TimeUp:
        return "timed out"
    except BaseException as error:  # of a program that nobody has read: anything
        signal.setitimer(signal.ITIMER_REAL, 0)
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


if __name__ == "__main__":
    main()

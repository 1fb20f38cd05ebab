"""The other side of `sandbox`: a program of its own, which limits itself before it runs what it was given.

It imports nothing of Eightfold. Standard input brings the limits and the program as JSON; the only thing ever written
to standard output is the secret word and the outcome. Of its two processes the first watches the second, which runs
the program. Numbers and structures of the kernel are those of Linux's user-space headers.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

NEW_USER, NEW_PID, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # flags of Linux's unshare
PARENT_DEATH_SIGNAL, SECCOMP, NO_NEW_PRIVILEGES = 1, 22, 38  # of its prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # calls of Landlock, everywhere the same
WRITE_FILE, WRITING = 1 << 1, 0x1FF2  # its rights: to write files; that, to remove, and to make anything
LATER_RIGHTS = {2: 1 << 13, 3: 1 << 14}  # since which of its versions: to link and rename across folders, to truncate
WATCH = 0.05  # seconds between two looks at a running program

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # which number of a call, and seccomp's name for it
FORBIDDEN = {  # calls that start processes, reach the network, signal, look into others, or leave limits
    **{"fork": (57, None), "vfork": (58, None), "socket": (41, 198), "io_uring_setup": (425, 425)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "shmget": (29, 194)},
    **{"unshare": (272, 97), "setns": (308, 268)},
}
CLONE, CLONE3, THREAD = (56, 220), 435, 0x10000
RETURN, LOAD, GOTO, EQUAL, AT_LEAST, HAS_BIT = 0x06, 0x20, 0x05, 0x15, 0x35, 0x45  # of the filter's instructions
ALLOW, FAIL = 0x7FFF0000, 0x00050000  # what it returns; to FAIL the error is added
CALL, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # places in what it looks at
OTHER_CONVENTION = 0x40000000  # from here on, x86's numbers of calls are those of 32-bit pointers


class TimeUp(BaseException):
    """Not an Exception, so that a program's own handlers seldom catch it."""


def main() -> NoReturn:
    given = json.load(sys.stdin)
    report = os.dup(1)  # descriptors 0 to 2 lead nowhere for the program
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.set_inheritable(report, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    _leave_namespaces()
    child = os.fork()
    if child:
        _watch(child, given, report)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    _limit(given)
    own = os.getpid()
    outcome = _outcome(given["program"], given["seconds"])
    if os.getpid() != own:
        os._exit(1)  # a child of the program has no say
    os.write(report, f"{given['word']} {outcome}".encode(errors="replace"))
    os._exit(0)


def _watch(child: int, given: dict[str, Any], report: int) -> NoReturn:
    """Wait for the program's process, and end it where it hears no alarm or fills the disk."""
    deadline = time.monotonic() + given["seconds"] + 1
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, WATCH)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            os._exit(0 if status == 0 else 1)
        too_late, too_much = time.monotonic() > deadline, _written(".") > given["folder_bytes"]
        if too_late or too_much:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            why = "timed out" if too_late else f"failed: its files have more than {given['folder_bytes']} bytes"
            os.write(report, f"{given['word']} {why}".encode())
            os._exit(1)


def _written(folder: str) -> int:
    """Bytes that the files of a folder take, as far as they can be seen."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += 512 * Path(place, name).lstat().st_blocks
    return total


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
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0:
            _write_nowhere_else(library)
            _forbid_calls(library)


def _write_nowhere_else(library: Any) -> None:
    """By Landlock, where the kernel has it: files are written, made and removed in the current folder only."""
    version = library.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    rights = WRITING | sum(right for since, right in LATER_RIGHTS.items() if version >= since)
    handled = struct.pack("=Q", rights)
    rules = library.syscall(CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    for path, allowed in ((".", rights), (os.devnull, WRITE_FILE)):
        place = os.open(path, os.O_PATH)
        library.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    library.syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)


def _forbid_calls(library: Any) -> None:
    """By seccomp, on machines whose numbers are known: no processes (threads are free), no sockets, no signals."""
    if platform.machine() not in MACHINES or sys.maxsize < 1 << 32:
        return
    column, architecture = MACHINES[platform.machine()]

    def step(kind: int, value: int, if_not: int = 0) -> bytes:
        """An instruction; of a comparison, how many of those after it are skipped where it does not hold."""
        return struct.pack("=HBBI", kind, 0, if_not, value)

    refuse, allow = step(RETURN, FAIL | errno.EPERM), step(RETURN, ALLOW)
    code = [step(LOAD, ARCHITECTURE), step(EQUAL, architecture, 1), step(GOTO, 1), refuse]
    code += [step(LOAD, CALL), step(AT_LEAST, OTHER_CONVENTION, 1), refuse]
    for numbers in FORBIDDEN.values():
        number = numbers[column]
        code += [] if number is None else [step(EQUAL, number, 1), refuse]
    # The flags of clone3 can't be seen here. Where it is not there, the C library starts threads by clone.
    code += [step(EQUAL, CLONE3, 1), step(RETURN, FAIL | errno.ENOSYS), step(EQUAL, CLONE[column], 4)]
    code += [step(LOAD, FIRST_ARGUMENT), step(HAS_BIT, THREAD, 1), allow, refuse, allow]
    text = ctypes.create_string_buffer(b"".join(code))
    library.prctl(SECCOMP, 2, struct.pack("@HP", len(code), ctypes.addressof(text)), 0, 0)


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

"""Runs a program that nobody has read: in a process group of its own, with limits, in an empty folder that goes away.

It keeps accidents and ordinary mischief away: endless loops, memory, other processes, the network, files elsewhere.
That takes seccomp, Landlock and namespaces, which most systems give to ordinary users; what one of them lacks stays
open, and files are read as this user. For code that means harm, run the whole evaluation in a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START = 10.0  # seconds that starting the process may take on a busy machine, beside the program's own
MEMORY = 4 << 30
FILE_BYTES = 16 << 20  # of one file
FOLDER_BYTES = 64 << 20  # of all that are written


def run_program(program: str, seconds: float) -> str:
    """Run Python source → "passed" if it ran to its end, "timed out", or "failed: " and why.

    The end is reported by a word that the program doesn't know, so leaving early is no success.
    """
    word = secrets.token_hex(16)
    limits = {"seconds": seconds, "memory": MEMORY, "file_bytes": FILE_BYTES, "folder_bytes": FOLDER_BYTES}
    with tempfile.TemporaryDirectory(prefix="eightfold-eval-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(
                json.dumps({**limits, "word": word, "program": program}).encode(), seconds + _START
            )
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also what the program has started
            process.wait()
            if process.stdout:
                process.stdout.close()
    status, _, reason = said.decode(errors="replace").partition(" ")
    if status == word:
        return reason
    return "failed: it ended the process"

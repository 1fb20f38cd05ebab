"""The entrance of all commands: which one, and what its end means.

Exit codes: 0 only if all that was asked for was done; 1 when a case, an item or a rank failed in the middle; 2 for a
mistake in the input, on which nothing has run; 130 after ctrl-C; 141 when whatever read the output went away.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from eightfold.compat.console import CaseError, complain, note
from eightfold.types import EightfoldError, RankError

COMMANDS = {
    "run_pa.sh": "dialogue",
    "run_pa.py": "dialogue",
    "convert_quant_weights.py": "convert",
    "run.sh": "modeltest",
}


def main(argv: Sequence[str]) -> int:
    """Run the command that argv[0] names with the words after it → the exit code.

    `--help` raises SystemExit(0), and a rank other than 0 ends within the call, with SystemExit.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end the answer
    try:
        if not argv or argv[0] not in COMMANDS:
            raise EightfoldError(f"a command is needed: {', '.join(COMMANDS)}")
        run: Callable[[Sequence[str]], int] = import_module(f"eightfold.compat.{COMMANDS[argv[0]]}").main
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(str(message))
            status = run(argv)
        sys.stdout.flush()
        return status
    except EightfoldError as error:
        return complain(error, 1 if isinstance(error, (CaseError, RankError)) else 2)
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except BrokenPipeError:
        # As with any filter, `| head` is no mistake. What is buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}" if error.filename else error, 2)

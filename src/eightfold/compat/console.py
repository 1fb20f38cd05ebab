"""What the commands say beside results, on standard error. Of several ranks only rank 0 does, but for errors."""

from __future__ import annotations

import os
import sys

from eightfold.types import EightfoldError


class CaseError(EightfoldError):
    """What failed in the middle, after other things may have been done."""


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one (torchrun says so)."""
    return os.environ.get("RANK", "0") == "0"


def log(text: str) -> None:
    if is_first_rank():
        print(f"eightfold: {text}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    log("note: " + " ".join(text.split()))


def complain(error: object, status: int) -> int:
    """Say what went wrong, in one line → the exit code."""
    print("eightfold: error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return status

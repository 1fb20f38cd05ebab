"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import eightfold

# Programs that tests start find the package where this process found it, installed or not.
_HOME = str(Path(eightfold.__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HOME, os.environ.get("PYTHONPATH")]))

# Tests that run in the background may have been told to ignore interrupts, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo model."""
    return Path(_HOME) / "eightfold" / "assets" / "demo"

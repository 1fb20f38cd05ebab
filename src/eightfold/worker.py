"""Ranks other than rank 0: rank 0 starts `python -m eightfold.worker`; under torchrun any command becomes one."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eightfold.config import EngineConfig
from eightfold.types import EightfoldError

if TYPE_CHECKING:
    from eightfold.parallel.launch import Job
    from eightfold.parallel.place import Place

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(follow: Callable[[Job], None]) -> int:
    """A rank that another process started, which says on standard input what to be, and is gone when that closes.

    The rank does `follow` → the exit code.
    """
    ignore_interrupts()
    text = sys.stdin.buffer.readline()
    if not text:
        return 1
    message = json.loads(text)
    threading.Thread(target=_end_with_input, daemon=True).start()
    if message["thread"]:  # it is with the thread that the system ends us, and another one may end before its process
        end_with(message["parent"])
    elif os.getppid() != message["parent"]:
        return 1
    from eightfold.parallel.place import Place  # imports torch

    place = Place(**message["place"])
    return _follow(EngineConfig(**message["config"]), place, follow, speaks=False)


def follow_as_told(options: Mapping[str, Any]) -> int:
    """This process, which a user or torchrun started, as a rank other than 0 → its exit code. Nothing goes to standard
    output. `options` are fields of EngineConfig. Raises EightfoldError on options that contradict one another."""
    ignore_interrupts()
    from eightfold.parallel.launch import device_of
    from eightfold.parallel.place import find_place

    config = EngineConfig(**options)
    place = find_place(config, os.environ)
    if place.torchrun:
        os.environ.update(device_of(place, config.device, os.environ))
    return _follow(config, place, follow_model, speaks=place.local_rank == 0, check=True)


def follow_model(job: Job) -> None:
    """Load this rank's part of the model, and run what rank 0 says."""
    from eightfold.loader import follow

    follow(job.config, job.ranks)


def _follow(
    config: EngineConfig, place: Place, follow: Callable[[Job], None], speaks: bool, check: bool = False
) -> int:
    """Be a rank until the job ends. Only one that `speaks` prints why it failed: the others' words go through it.
    `check` is for a rank whose rank 0 may see an error of its own before anyone could hear of it."""
    from eightfold.parallel.launch import Job, follow_job

    logging.getLogger("eightfold").setLevel(logging.ERROR)  # what is worth a warning, rank 0 says
    warnings.simplefilter("ignore")
    try:
        if check:
            from eightfold.loader import check_place

            check_place(config, place)
        return follow_job(Job(config, place, os.environ), follow)
    except EightfoldError as error:
        if speaks:
            print("eightfold: error:", " ".join(str(error).split()), file=sys.stderr)
    except Exception:
        traceback.print_exc()
    return 1


def ignore_interrupts() -> None:
    """Ctrl-C is for the process that a user started: it ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with(parent: int) -> None:
    """Be killed when the process `parent`, which started this one, ends; at once if it has ended already."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # reaches a stopped process, too
    if os.getppid() != parent:
        os._exit(1)


def _end_with_input() -> None:
    """Rank 0 holds the other end of standard input, and lets go of it however it ends."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(follow_model))

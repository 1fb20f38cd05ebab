"""What commands show beside answers: progress, notes, statistics. All of it on standard error."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eightfold.commands.options import engine_options
from eightfold.types import RequestOutput

if TYPE_CHECKING:
    from tqdm import tqdm

    from eightfold.llm import LLM


def note(text: str) -> None:
    print(f"eightfold: note: {text}", file=sys.stderr)


def load(args: argparse.Namespace) -> tuple[LLM, float]:
    """The model that the options describe, and the seconds that loading it took."""
    show_warnings(args)
    with progress("Loading", "B", scale=True) as update:
        from eightfold.llm import LLM  # imports torch, for which a mistake in the arguments should not have to wait

        start = time.perf_counter()
        llm = LLM(**engine_options(args), progress=update)
        threading.Thread(target=_end_with_ranks, args=(weakref.ref(llm), terminal_settings()), daemon=True).start()
        return llm, time.perf_counter() - start


def _end_with_ranks(llm: weakref.ref[LLM], terminal: list[Any] | None) -> None:
    """Ends this program if a rank fails while it waits for something else, as `chat` does for its user. What is in a
    step then says so by itself, within seconds."""
    failed_for = 0
    while failed_for < 3:
        time.sleep(1)
        known = llm()
        if known is None:
            return
        failure = known.rank_failure()
        failed_for = failed_for + 1 if failure else 0
    if terminal is not None:
        termios.tcsetattr(0, termios.TCSADRAIN, terminal)
    print("eightfold: error:", failure, file=sys.stderr, flush=True)
    os._exit(1)


def terminal_settings() -> list[Any] | None:
    """How the terminal is set now, before an editor of input lines changes it; None without one."""
    return termios.tcgetattr(0) if os.isatty(0) else None


def show_warnings(args: argparse.Namespace) -> None:
    """Say what an option does not do, and from now on what the engine warns of, such as too little memory."""
    if args.trust_remote_code:
        note("--trust-remote-code has no effect: no code from a checkpoint is ever executed here")
    logging.basicConfig(format="eightfold: %(message)s")


@contextmanager
def progress(title: str, unit: str, scale: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar that is moved by calls with (done, total), and goes away at the end; none unless on a terminal."""
    bar: tqdm[None] | None = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        bar = bar if bar is not None else new_bar(title, unit, total, scale)
        bar.update(done - bar.n)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def new_bar(title: str, unit: str, total: int, scale: bool = False) -> tqdm[None]:
    """A progress bar; one that does nothing where standard error is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=unit, unit_scale=scale, leave=False, disable=not sys.stderr.isatty())


def statistics(outputs: Iterable[RequestOutput], seconds: float) -> str:
    """One line on what was generated in `seconds`: tokens, time to first token, speed.

    The speed of one answer is that of the tokens after its first; of several requests, that of all tokens together.
    """
    listed = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in listed)
    generated = sum(len(one.token_ids) for output in listed for one in output.outputs)
    cached = sum(output.metrics.num_cached_tokens for output in listed if output.metrics)
    parts = [f"{prompt} prompt tokens" + f" ({cached} cached)" * bool(cached), f"{generated} output tokens"]
    firsts = [wait for output in listed if (wait := first_token_seconds(output)) is not None]
    if firsts:
        parts.append(f"first token after {sum(firsts) / len(firsts):.3f} s" + (" (mean)" if len(firsts) > 1 else ""))
    if len(listed) > 1:
        parts.append(f"{generated / seconds:.1f} tokens/s")
    elif firsts and generated > 1:
        parts.append(f"{(generated - len(listed[0].outputs)) / max(seconds - firsts[0], 1e-9):.1f} tokens/s")
    if any(one.finish_reason == "length" for output in listed for one in output.outputs):
        parts.append("cut off at the token limit")
    return " · ".join(parts)


def first_token_seconds(output: RequestOutput) -> float | None:
    """From the request's arrival to its first token."""
    times = output.metrics
    if times is None or times.first_token_time is None:
        return None
    return times.first_token_time - times.arrival_time

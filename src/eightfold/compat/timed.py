"""Requests run together and timed step by step, as the reference system counts: steps of prefill, steps of decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from eightfold.compat.console import CaseError
from eightfold.engine import Engine
from eightfold.scheduler import Scheduler
from eightfold.types import Request, RequestOutput


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of each step that computed some of a prompt, of each that only decoded, and of all; the outputs in the
    order of the requests."""

    outputs: tuple[RequestOutput, ...]
    prefills: tuple[float, ...]
    decodes: tuple[float, ...]
    seconds: float

    @property
    def prefill_seconds(self) -> float:
        return sum(self.prefills)

    def decode_token_seconds(self, most_tokens: int) -> float:
        """Of a token after the first, where answers have `most_tokens` tokens; 0 where there is none after it."""
        return sum(self.decodes) / (most_tokens - 1) if most_tokens > 1 else 0.0


def run_timed(engine: Engine, requests: Sequence[Request]) -> Timed:
    """Run all requests to their ends; their output kind must be FINAL_ONLY.

    Raises EightfoldError if one can't be run, with nothing started, and CaseError if one fails in the middle.
    """
    done: dict[str, RequestOutput] = {}
    times: dict[bool, list[float]] = {True: [], False: []}
    start = time.perf_counter()
    try:
        for request in requests:
            request.arrival_time = time.perf_counter()
            engine.add(request)
        while engine.has_unfinished_requests:
            before = _unread(engine.scheduler)
            began = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - began
            after = _unread(engine.scheduler)
            times[any(after.get(key) != left for key, left in before.items())].append(seconds)
            for output in outputs:
                if output.error is not None:
                    raise CaseError(output.error)
                done[output.request_id] = output
    finally:
        for request in requests:
            engine.abort(request.request_id)
    seconds = time.perf_counter() - start
    ended = tuple(done[request.request_id] for request in requests)
    return Timed(ended, tuple(times[True]), tuple(times[False]), seconds)


def _unread(scheduler: Scheduler) -> dict[int, int]:
    """Tokens of its prompt that each sequence still has to compute, of those that have some."""
    sequences = [*scheduler.waiting, *scheduler.running]
    return {id(one): left for one in sequences if (left := one.num_prompt - one.computed) > 0}

"""Requests in, printed answers out: what `run` and `chat` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from eightfold.types import CompletionOutput, Request, RequestOutput, RequestOutputKind

if TYPE_CHECKING:
    from eightfold.engine import Engine


def steps(engine: Engine, requests: Sequence[Request], kind: RequestOutputKind) -> Generator[RequestOutput]:
    """What the engine puts out for these requests, until all have finished or the caller stops asking.

    Raises EightfoldError, before anything runs, if one of them can't be run.
    """
    try:
        for request in requests:
            params = replace(request.params, output_kind=kind)
            engine.add(replace(request, params=params, arrival_time=time.perf_counter()))
        while engine.has_unfinished_requests:
            yield from engine.step()
    finally:
        for request in requests:
            engine.abort(request.request_id)


def stream(engine: Engine, request: Request, stopped: Callable[[], bool] = lambda: False) -> RequestOutput:
    """Print one answer to standard output as it comes → all of it.

    When `stopped` says so the answer ends where it is, with finish_reason "abort".
    """
    output, whole = None, CompletionOutput(0, "", [])
    running = steps(engine, [request], RequestOutputKind.DELTA)
    for output in running:
        piece = output.outputs[0]
        gap = " " if whole.token_ids and piece.token_ids else ""
        print(shown(piece, request, gap), end="", flush=True)
        whole = replace(piece, text=whole.text + piece.text, token_ids=whole.token_ids + piece.token_ids)
        if stopped() and not output.finished:
            whole.finish_reason = "abort"
            running.close()  # frees the request's pages
    print(flush=True)
    assert output is not None  # a request that was added ends with an output
    return replace(output, outputs=[whole])


def shown(one: CompletionOutput, request: Request, gap: str = "") -> str:
    """An answer as it is printed: its text, or its token ids where there is no tokenizer."""
    return one.text if request.params.detokenize else gap + " ".join(map(str, one.token_ids))

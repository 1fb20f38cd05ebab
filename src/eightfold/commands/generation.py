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


def stream(
    engine: Engine, request: Request, trim: bool = False, stopped: Callable[[], bool] = lambda: False
) -> RequestOutput:
    """Print one answer to standard output as it comes → all of it.

    `trim` keeps the space at its start, where a chat template wants one, from the screen. When `stopped` says so the
    answer ends where it is, with finish_reason "abort".
    """
    output, ids, texts, started = None, [], [], False
    by_token = not request.params.detokenize
    running = steps(engine, [request], RequestOutputKind.DELTA)
    for output in running:
        piece = output.outputs[0]
        fresh = "".join(f" {token}" for token in piece.token_ids) if by_token else piece.text
        fresh = fresh.lstrip() if (trim or by_token) and not started else fresh
        print(fresh, end="", flush=True)
        started = started or bool(fresh)
        ids += piece.token_ids
        texts.append(piece.text)
        if stopped() and not output.finished:
            piece.finish_reason = "abort"
            running.close()  # frees the request's pages
    print(flush=True)
    assert output is not None  # a request that was added ends with an output
    return replace(output, outputs=[replace(output.outputs[0], text="".join(texts), token_ids=ids)])


def shown(one: CompletionOutput, request: Request, trim: bool) -> str:
    """An answer as it is printed: its text, or its token ids where there is no tokenizer."""
    if not request.params.detokenize:
        return " ".join(map(str, one.token_ids))
    return one.text.lstrip() if trim else one.text

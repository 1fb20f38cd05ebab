"""Queries into the engine, answers out: many at once, in whatever order they finish."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol, TypeVar

from eightfold.eval.task import Answer, Compare, Generate, Likelihood, Query
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError, Request, RequestOutput, RequestOutputKind, SamplingParams

AHEAD = 512  # requests that the engine holds at most: enough to fill any batch, and texts are not all tokenized at once

T = TypeVar("T")


class Engines(Protocol):
    """Who answers: an `Engine`, or several of one model (`Replicas`)."""

    tokenizer: Tokenizer | None
    max_model_len: int

    def add(self, request: Request) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def abort(self, request_id: str) -> object: ...


@dataclass(frozen=True, slots=True)
class Prompting:
    """How text becomes tokens. `max_input` is the most tokens of a prompt (longer ones lose their middle); `chat` puts
    each prompt to the model as a user's message, in `chat_template` or the folder's own."""

    max_input: int
    chat: bool = False
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What to run for a query: a prompt; the tokens whose log-probabilities after it are wanted; and how many tokens at
    the prompt's end are themselves part of the continuation."""

    ids: list[int]
    params: SamplingParams
    choices: tuple[int, ...] = ()
    continued: int = 0
    shortened: int = 0


def ask(engine: Engines, queries: Iterable[tuple[T, Query]], prompting: Prompting) -> Iterator[tuple[T, Answer]]:
    """Put queries to the model; each answer comes with what came with its query, as soon as it is there.

    Raises EightfoldError if a query can't be run; a request that fails in the middle gives an Answer with an error.
    """
    if engine.tokenizer is None:
        raise EightfoldError("data sets are text: an engine without a tokenizer can't be asked")
    tokenizer = engine.tokenizer
    plans = ((tag, plan(tokenizer, query, prompting, engine.max_model_len)) for tag, query in queries)
    for tag, scored, output in run(engine, plans):
        yield tag, answer(scored, output)


def run(engine: Engines, plans: Iterable[tuple[T, Scored]]) -> Iterator[tuple[T, Scored, RequestOutput]]:
    """Run requests together, at most AHEAD in the engine at a time; each comes back when it has finished."""
    waiting = iter(plans)
    running: dict[str, tuple[T, Scored]] = {}
    numbers = count()
    exhausted = False
    try:
        while running or not exhausted:
            while len(running) < AHEAD and not exhausted:
                following = next(waiting, None)
                if following is None:
                    exhausted = True
                    break
                name = f"eval-{next(numbers)}"
                scored = following[1]
                now = time.perf_counter()
                engine.add(Request(name, scored.ids, scored.params, arrival_time=now, passing=True))
                running[name] = following
            if running:
                for output in engine.step():
                    yield (*running.pop(output.request_id), output)
    finally:
        for name in running:
            engine.abort(name)


def plan(tokenizer: Tokenizer, query: Query, prompting: Prompting, context: int) -> Scored:
    """A query as tokens; `context` is the most tokens of prompt and answer together."""
    match query:
        case Generate(prompt, max_tokens, stop):
            params = SamplingParams(
                temperature=0, max_tokens=max_tokens, stop=stop, output_kind=RequestOutputKind.FINAL_ONLY
            )
            room = context - min(max_tokens, context // 2)
            ids, shortened = shorten(encode(tokenizer, prompt, prompting), min(prompting.max_input, room))
            return Scored(ids, params, shortened=shortened)
        case Compare(prompt, choices):
            tokens = tuple(tokenizer.encode(choice, add_bos=False)[-1] for choice in choices)
            ids, shortened = shorten(encode(tokenizer, prompt, prompting), min(prompting.max_input, context - 1))
            return Scored(ids, scoring(tokens), tokens, shortened=shortened)
        case Likelihood(prompt, continuation):
            start = encode(tokenizer, prompt, prompting)
            if prompting.chat:
                rest = tokenizer.encode(continuation, add_bos=False, parse_special=False)
            else:
                rest = encode(tokenizer, prompt + continuation, prompting)[len(start) :]
            if not rest:
                raise EightfoldError(f"the continuation {continuation!r:.40} adds no token to its prompt")
            most = min(prompting.max_input, context - len(rest))
            if most < 2:
                raise EightfoldError(f"a continuation of {len(rest)} tokens leaves no room in a context of {context}")
            start, shortened = shorten(start, most)
            return continuation_scores(start, rest, shortened)
    raise AssertionError(query)


def continuation_scores(start: list[int], rest: list[int], shortened: int = 0) -> Scored:
    """The request for the log-probability of `rest` after `start`: all but the last token as a prompt, whose own
    log-probabilities are asked for from `start`'s end on; those of the last follow the prompt. What continuations of
    one beginning share is computed once."""
    ids = start + rest[:-1]
    return Scored(ids, scoring(rest[-1:], len(start) if len(rest) > 1 else None), (rest[-1],), len(rest) - 1, shortened)


def scoring(tokens: Iterable[int], start: int | None = None) -> SamplingParams:
    """One step, for the log-probabilities of these tokens; with `start` also those of the prompt from there on."""
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        logprob_token_ids=list(tokens),
        prompt_logprobs=None if start is None else 0,
        prompt_logprobs_start=start or 0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def answer(scored: Scored, output: RequestOutput) -> Answer:
    """What came back, with the log-probabilities that were asked for."""
    one = output.outputs[0]
    if output.error:
        return Answer(scored.ids, one.token_ids, shortened=scored.shortened, error=output.error)
    values = [value for value, _ in token_scores(scored, output)] if scored.choices else []
    return Answer(scored.ids, one.token_ids, one.text, tuple(values), scored.shortened)


def token_scores(scored: Scored, output: RequestOutput) -> list[tuple[float, bool]]:
    """(log-probability, whether it is the likeliest) of the continued tokens of the prompt, then of the choices."""
    found = []
    if scored.continued:
        assert output.prompt_logprobs is not None
        tail = zip(scored.ids[-scored.continued :], output.prompt_logprobs[-scored.continued :], strict=True)
        found = [entries[token] for token, entries in tail if entries is not None]
    assert output.outputs[0].logprobs is not None
    found += [output.outputs[0].logprobs[0][token] for token in scored.choices]
    return [(one.logprob, one.rank == 1) for one in found]


def encode(tokenizer: Tokenizer, prompt: str, prompting: Prompting) -> list[int]:
    """A prompt's tokens. What it spells never becomes a control token: it comes from a data set."""
    if prompting.chat:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}], True, prompting.chat_template)
    return tokenizer.encode(prompt, parse_special=False)


def shorten(ids: list[int], most: int) -> tuple[list[int], int]:
    """At most `most` tokens, from the beginning and the end in equal parts, and how many were left out."""
    if len(ids) <= most:
        return ids, 0
    tail = most // 2
    return ids[: most - tail] + (ids[-tail:] if tail else []), len(ids) - most

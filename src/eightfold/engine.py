"""The engine: requests in by `add`, outputs out by `step`, gone by `abort`. Everything that generates enters here."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from eightfold.runner import Runner
from eightfold.sampling import Sample, SamplerState, TokenLogprobs, sample, token_logprobs
from eightfold.scheduler import Row, Scheduler, Sequence
from eightfold.tokenizer import Detokenizer, Tokenizer
from eightfold.types import (
    CompletionOutput,
    EightfoldError,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
)


@dataclass(slots=True, eq=False)
class _Continuation:
    """One of a request's `n` outputs while it runs."""

    index: int
    sequence: Sequence
    sampler: SamplerState
    detokenizer: Detokenizer | None
    max_tokens: int
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    sent_tokens: int = 0
    sent_text: int = 0

    @property
    def num_output(self) -> int:
        return len(self.sequence.tokens) - self.sequence.num_prompt


@dataclass(slots=True, eq=False)
class _RequestState:
    request: Request
    metrics: RequestMetrics
    continuations: list[_Continuation]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    sent_prompt: bool = False
    error: str | None = None


class Engine:
    """Runs any number of requests together, each as if it were alone.

    `eos_token_ids` and `eos_sequences` (of several tokens) end a sequence unless its parameters ignore them;
    `max_model_len` bounds prompt and output together; `seed` makes requests without a seed of their own repeatable from
    run to run.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        eos_token_ids: Seq[int],
        max_model_len: int,
        seed: int = 0,
        eos_sequences: Seq[tuple[int, ...]] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.scheduler = scheduler
        self._runner = runner
        self._eos = frozenset(eos_token_ids)
        self._eos_sequences = tuple(eos_sequences)
        self._vocab_size = runner.vocab_size
        self._seed = seed
        self._num_added = 0
        self._requests: dict[str, _RequestState] = {}
        self._owner: dict[Sequence, tuple[_RequestState, _Continuation]] = {}

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Take a request. Raises EightfoldError, and takes nothing, if it can't be run."""
        self._check(request)
        params = request.params
        metrics = RequestMetrics(request.arrival_time or time.perf_counter())
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None] * max(1, params.prompt_logprobs_start)  # nothing comes before the first token
        state = _RequestState(request, metrics, [], prompt_logprobs)
        for index in range(params.n):
            continuation = self._continuation(request, index)
            state.continuations.append(continuation)
            self._owner[continuation.sequence] = (state, continuation)
            self.scheduler.add(continuation.sequence)
        self._requests[request.request_id] = state
        self._num_added += 1

    def close(self) -> None:
        """Let other ranks go, where there are any. The engine can't be used afterwards."""
        self._runner.close()

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request and free its pages; its output so far, or None if there is no such request."""
        state = self._requests.get(request_id)
        if state is None:
            return None
        for continuation in state.continuations:
            self._end(continuation, "abort")
        return self._output(state)

    def step(self) -> list[RequestOutput]:
        """Run the model once over all that is due → outputs of the requests that have something new."""
        rows, plan = self.scheduler.schedule()
        if not rows:
            return []
        owners = [self._owner[row.sequence] for row in rows]
        self._note_start(rows, owners)
        logits = self._runner.run(plan)
        for row, (state, _) in zip(rows, owners, strict=True):
            if row.num_prompt_logits:
                self._take_prompt_logits(row, state, logits)
        due = [(row, owner) for row, owner in zip(rows, owners, strict=True) if row.samples]
        picked = [row.first_logit + row.num_prompt_logits for row, _ in due]
        samples = sample(logits[picked], [continuation.sampler for _, (_, continuation) in due]) if due else []
        changed: dict[str, _RequestState] = {}
        for (_, (state, continuation)), one in zip(due, samples, strict=True):
            if continuation.finish_reason is None:  # else a sibling failed in this very step
                self._take_sample(state, continuation, one)
                changed[state.request.request_id] = state
        outputs = [self._output(state) for state in changed.values()]
        return [output for output in outputs if output is not None]

    def _check(self, request: Request) -> None:
        name, tokens, params = request.request_id, request.prompt_token_ids, request.params
        if name in self._requests:
            raise EightfoldError(f"request {name!r} is running already; each request needs an id of its own")
        if not tokens:
            raise EightfoldError(f"request {name!r} has an empty prompt; it needs at least one token")
        if len(tokens) >= self.max_model_len:
            raise EightfoldError(
                f"request {name!r} has a prompt of {len(tokens)} tokens; the context holds {self.max_model_len}, of "
                "which at least one is for the answer: shorten the prompt or raise --max-model-len"
            )
        for what, ids in (
            ("prompt", tokens),
            ("stop_token_ids", params.stop_token_ids or ()),
            ("logprob_token_ids", params.logprob_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            outside = next((token for token in ids if not 0 <= token < self._vocab_size), None)
            if outside is not None:
                raise EightfoldError(
                    f"request {name!r}: {what} holds token id {outside}; ids go from 0 to {self._vocab_size - 1}"
                )
        if params.prompt_logprobs_start > len(tokens):
            raise EightfoldError(
                f"request {name!r}: prompt_logprobs_start is {params.prompt_logprobs_start}, beyond the prompt of "
                f"{len(tokens)} tokens"
            )
        if params.stop and self.tokenizer is None:
            raise EightfoldError(f"request {name!r}: stop strings need a tokenizer, which this engine runs without")

    def _continuation(self, request: Request, index: int) -> _Continuation:
        params, prompt = request.params, request.prompt_token_ids
        seed: object = f"{self._seed}/{self._num_added}" if params.seed is None else params.seed
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self._eos)
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                self.tokenizer,
                prompt,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop or (),
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
        room = self.max_model_len - len(prompt)
        return _Continuation(
            index=index,
            sequence=Sequence(
                list(prompt),
                len(prompt),
                wants_prompt_logits=params.prompt_logprobs is not None and not index,
                passing=request.passing,
                prompt_logits_done=max(0, params.prompt_logprobs_start - 1),  # a position's logits are about the next
            ),
            sampler=SamplerState(params, random.Random(f"{seed}/{index}"), frozenset(prompt), stops),
            detokenizer=detokenizer,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            logprobs=None if params.logprobs is None and not params.logprob_token_ids else [],
        )

    def _note_start(self, rows: Seq[Row], owners: Seq[tuple[_RequestState, _Continuation]]) -> None:
        now = time.perf_counter()
        for row, (state, _) in zip(rows, owners, strict=True):
            if state.metrics.first_scheduled_time is None:
                state.metrics.first_scheduled_time = now
                state.metrics.num_cached_tokens = row.sequence.cached

    def _take_prompt_logits(self, row: Row, state: _RequestState, logits: Tensor) -> None:
        count, prompt = state.request.params.prompt_logprobs, state.request.prompt_token_ids
        assert count is not None and state.prompt_logprobs is not None
        for offset in range(row.num_prompt_logits):
            token = prompt[row.first_prompt_logit + offset + 1]  # a position's logits are about the next token
            state.prompt_logprobs.append(self._named(token_logprobs(logits[row.first_logit + offset], token, count)))

    def _take_sample(self, state: _RequestState, continuation: _Continuation, one: Sample) -> None:
        """Append a token, and end the continuation if that was its last."""
        metrics, params = state.metrics, state.request.params
        if one.token is None:
            self._fail(state, continuation)
            return
        if metrics.first_token_time is None:
            metrics.first_token_time = time.perf_counter()
        continuation.sequence.tokens.append(one.token)
        if one.logprobs is not None and continuation.logprobs is not None:
            continuation.logprobs.append(self._named(one.logprobs))
            continuation.cumulative_logprob += one.logprobs[0][1]
        stop = continuation.detokenizer.push([one.token]) if continuation.detokenizer else None
        early = continuation.num_output < params.min_tokens
        if not early and not params.ignore_eos and self._at_eos(continuation):
            self._end(continuation, "stop")
        elif not early and one.token in (params.stop_token_ids or ()):
            self._end(continuation, "stop", one.token)
        elif stop is not None:
            self._end(continuation, "stop", stop)
        elif continuation.num_output >= continuation.max_tokens:
            self._end(continuation, "length")

    def _at_eos(self, continuation: _Continuation) -> bool:
        tokens, written = continuation.sequence.tokens, continuation.num_output
        return tokens[-1] in self._eos or any(
            len(end) <= written and tuple(tokens[-len(end) :]) == end for end in self._eos_sequences
        )

    def _fail(self, state: _RequestState, failed: _Continuation) -> None:
        position = len(failed.sequence.tokens) - 1
        state.error = (
            f"request {state.request.request_id!r} failed: the model's logits after position {position} are not finite "
            "numbers; the checkpoint holds NaN or Inf, or its values overflow"
        )
        for continuation in state.continuations:
            self._end(continuation, "error")

    def _end(self, continuation: _Continuation, reason: str, stop_reason: int | str | None = None) -> None:
        if continuation.finish_reason is not None:
            return
        continuation.finish_reason, continuation.stop_reason = reason, stop_reason
        self.scheduler.finish(continuation.sequence, trust_pages=reason != "error")
        del self._owner[continuation.sequence]
        if continuation.detokenizer:
            continuation.detokenizer.finish()

    def _output(self, state: _RequestState) -> RequestOutput | None:
        """What the request's output_kind asks for now; forgets the request once it has ended."""
        finished = all(continuation.finish_reason for continuation in state.continuations)
        request, kind = state.request, state.request.params.output_kind
        if finished:
            state.metrics.finished_time = time.perf_counter()
            del self._requests[request.request_id]
        elif kind is RequestOutputKind.FINAL_ONLY:
            return None
        delta = kind is RequestOutputKind.DELTA
        prompt_logprobs = None if delta and state.sent_prompt else state.prompt_logprobs
        state.sent_prompt = True
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._completion(continuation, delta) for continuation in state.continuations],
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            metrics=state.metrics,
            error=state.error,
        )

    def _completion(self, continuation: _Continuation, delta: bool) -> CompletionOutput:
        text = continuation.detokenizer.text if continuation.detokenizer else ""
        start = continuation.sequence.num_prompt + (continuation.sent_tokens if delta else 0)
        tokens = continuation.sequence.tokens[start:]
        logprobs = continuation.logprobs
        if delta:
            logprobs = None if logprobs is None else logprobs[continuation.sent_tokens :]
            text, continuation.sent_text = text[continuation.sent_text :], len(text)
            continuation.sent_tokens += len(tokens)
        return CompletionOutput(
            index=continuation.index,
            text=text,
            token_ids=tokens,
            cumulative_logprob=None if continuation.logprobs is None else continuation.cumulative_logprob,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=continuation.finish_reason,
            stop_reason=continuation.stop_reason,
        )

    def _named(self, entries: TokenLogprobs) -> dict[int, Logprob]:
        text = self.tokenizer.token_text if self.tokenizer else lambda token: None
        return {token: Logprob(value, rank, text(token)) for token, value, rank in entries}

"""Plain data that every room shares. No torch here: importing this module costs nothing.

The names and shapes of `SamplingParams`, `RequestOutput`, `CompletionOutput` and `Logprob` are those that
vLLM's users know.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Progress = Callable[[int, int], None]  # (done, in all), of whatever the function that takes it says


class EightfoldError(ValueError):
    """A mistake in the input. Its text is one line that names what is wrong and what would be right."""


class RankError(EightfoldError):
    """Not a mistake in the input: a rank was lost, or ranks don't fit together, while they ran one model."""


class RequestOutputKind(enum.Enum):
    """What `Engine.step` returns for a request: all so far, only what is new, or nothing until the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(slots=True)
class SamplingParams:
    """How to turn logits into tokens, and when to stop.

    `temperature` 0 is greedy; `top_k` 0 or -1 keeps the whole vocabulary. `seed` makes a request repeatable
    whatever runs beside it. `logprobs=k` returns the k best tokens at each position, and the chosen one; -1
    returns the whole vocabulary. `logprob_token_ids` adds these tokens at each position, whatever their rank: to score
    a few known answers without their whole vocabulary. `prompt_logprobs=k` does the same for the prompt, from its token
    number `prompt_logprobs_start` on (those before have None, and may come from the prefix cache).
    Log-probabilities are those of the model, before temperature and penalties.
    Raises `EightfoldError` on values outside their range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    logprob_token_ids: Sequence[int] | None = None
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        self.logprob_token_ids = list(self.logprob_token_ids or [])
        self._check_numbers()
        self._check_types()

    def _check_numbers(self) -> None:
        rules: list[tuple[str, object, bool, str]] = [
            ("n", self.n, _whole(self.n) and self.n >= 1, "a whole number from 1"),
            (
                "temperature",
                self.temperature,
                _finite(self.temperature) and self.temperature >= 0,
                "0 (greedy) or more",
            ),
            ("top_p", self.top_p, _finite(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, _whole(self.top_k) and self.top_k >= -1, "a whole number, 0 or -1 for no limit"),
            ("min_p", self.min_p, _finite(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1"),
            ("presence_penalty", self.presence_penalty, _within(self.presence_penalty, 2), "from -2 to 2"),
            ("frequency_penalty", self.frequency_penalty, _within(self.frequency_penalty, 2), "from -2 to 2"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                _finite(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0 (1 changes nothing)",
            ),
            (
                "max_tokens",
                self.max_tokens,
                self.max_tokens is None or (_whole(self.max_tokens) and self.max_tokens >= 1),
                "a whole number from 1, or None for as many as the context holds",
            ),
            ("min_tokens", self.min_tokens, _whole(self.min_tokens) and self.min_tokens >= 0, "a whole number from 0"),
            ("logprobs", self.logprobs, _count(self.logprobs), "a whole number from 0, -1 for all, or None"),
            (
                "prompt_logprobs",
                self.prompt_logprobs,
                _count(self.prompt_logprobs),
                "a whole number from 0, -1 for all, or None",
            ),
            (
                "prompt_logprobs_start",
                self.prompt_logprobs_start,
                _whole(self.prompt_logprobs_start) and self.prompt_logprobs_start >= 0,
                "a whole number from 0",
            ),
            ("seed", self.seed, self.seed is None or _whole(self.seed), "a whole number or None"),
        ]
        for name, value, good, right in rules:
            if not good:
                raise EightfoldError(f"{name} is {value!r}; it must be {right}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise EightfoldError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")

    def _check_types(self) -> None:
        if any(not isinstance(s, str) or not s for s in self.stop or ()):
            raise EightfoldError(f"stop is {self.stop!r}; it must be one string or several, none of them empty")
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logprob_token_ids", self.logprob_token_ids)):
            if any(not _whole(t) for t in ids or ()):
                raise EightfoldError(f"{name} is {ids!r}; it must hold token ids (whole numbers)")
        if self.stop and not self.detokenize:
            raise EightfoldError("stop strings need detokenize=True; with token ids alone use stop_token_ids")
        for token, bias in (self.logit_bias or {}).items():
            if not _whole(token) or not _finite(bias):
                raise EightfoldError(f"logit_bias[{token!r}] is {bias!r}; it maps token ids to finite numbers")


def _whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _finite(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _within(x: float, limit: float) -> bool:
    return _finite(x) and -limit <= x <= limit


def _count(x: int | None) -> bool:
    return x is None or (_whole(x) and x >= -1)


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token, its rank (1 is the likeliest) and its text where that was asked for."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. `finish_reason` is None while it runs, then "stop", "length", "abort" or "error".

    `stop_reason` is the stop string or token id that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds of `time.perf_counter`; `num_cached_tokens` came from the prefix cache."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """What a request has produced. `error` says why it failed when an output's finish_reason is "error"."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass(slots=True)
class Request:
    """A request as the engine takes it. Times are those of `time.perf_counter`. One that is `passing`, which nobody
    will continue, leaves the prefix cache to others: only requests that follow soon find what it computed."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    arrival_time: float = 0.0
    passing: bool = False


@dataclass(slots=True)
class Plan:
    """One step of the model, in plain integers: R rows of one sequence each, T tokens in all.

    Row r contributes the tokens `ids[query_starts[r]:query_starts[r + 1]]`, whose positions end at
    `kv_lens[r] - 1`. A Plan is all that a rank needs to take part in the step.
    """

    ids: list[int]  # [T] token ids, row after row
    query_starts: list[int]  # [R + 1]
    kv_lens: list[int]  # [R] tokens in the cache once this step has written its own
    page_table: list[list[int]]  # [R][ceil(kv_len / page_size)]
    logit_rows: list[int]  # [L] indices into the T tokens at which logits are wanted

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

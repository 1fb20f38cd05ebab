"""Requests as users send them, timed: everything enters by `Engine.add` and comes out of `Engine.step`.

`Bench.run` keeps a number of requests in flight until all have ended, and says when each token came, and what each
step held. A fixed pair of lengths times a batch is that many requests at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eightfold.bench.accounting import Row, Step, model_step
from eightfold.bench.measure import model_formats
from eightfold.bench.probes import Prober, major_faults, memory
from eightfold.bench.requests.lengths import Case
from eightfold.bench.routes import watch_routes
from eightfold.checkpoint import resolve
from eightfold.config import load_model_config
from eightfold.llm import LLM
from eightfold.loader import kv_bytes_per_token
from eightfold.ops import Ops
from eightfold.scheduler import Sequence as Scheduled
from eightfold.types import EightfoldError, Request, RequestOutputKind, SamplingParams


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to come: its prompt, and the most tokens of its answer (that many, if `ignore_eos`)."""

    prompt: Sequence[int]
    output_len: int
    ignore_eos: bool = True
    text: bool = False  # whether the answer is wanted as text too


@dataclass(slots=True)
class RequestTimes:
    """A request, in seconds from the run's start."""

    input_tokens: int
    arrival: float
    token_times: list[float] = field(default_factory=list)  # when each token of the answer was there
    text: str = ""
    finish_reason: str | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.token_times)

    @property
    def first_token_seconds(self) -> float:
        """From its arrival to its first token."""
        return self.token_times[0] - self.arrival

    @property
    def seconds(self) -> float:
        """From its arrival to its last token."""
        return self.token_times[-1] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the next: inter-token latencies."""
        return [late - early for early, late in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def seconds_per_token(self) -> float | None:
        """Time per output token after the first; None of an answer of one token."""
        gaps = self.output_tokens - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps else None


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A step of the engine: seconds from the run's start, and what it computed for each sequence."""

    start: float
    seconds: float
    rows: tuple[Row, ...]
    prompt_tokens: int  # of prompts, or computed again after a preemption
    decoded: int  # sequences that only got their next token
    outputs: int  # tokens that it put out

    @property
    def is_prefill(self) -> bool:
        """Whether it computed some of a prompt (perhaps beside sequences that were decoding)."""
        return self.prompt_tokens > 0


@dataclass(frozen=True, slots=True)
class Run:
    """What `Bench.run` saw. Times are in seconds; works are what the steps needed at least, on all ranks
    together; None on several machines."""

    in_flight: int
    seconds: float  # from the first request's arrival to the last one's end
    requests: tuple[RequestTimes, ...]
    steps: tuple[StepTimes, ...]
    prefill_work: Step | None
    decode_work: Step | None
    expert_counts: np.ndarray[Any, np.dtype[np.int64]]  # [layers, experts] how often each was chosen
    experts_hit: float  # different experts a layer and step, on average
    kv_bytes: int  # of keys and values, when they were most
    anonymous_bytes: int  # of this process, at the end
    major_faults: int
    preemptions: int

    @property
    def input_tokens(self) -> int:
        return sum(one.input_tokens for one in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(one.output_tokens for one in self.requests)

    @property
    def prefill_times(self) -> list[float]:
        """Seconds of each step that computed some of a prompt."""
        return [step.seconds for step in self.steps if step.is_prefill]

    @property
    def decode_times(self) -> list[float]:
        """Seconds of each step that only decoded."""
        return [step.seconds for step in self.steps if not step.is_prefill]

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies of all requests."""
        return [gap for one in self.requests for gap in one.gaps]

    @property
    def output_per_second(self) -> float:
        """Tokens of all answers over the whole time."""
        return self.output_tokens / self.seconds

    @property
    def total_per_second(self) -> float:
        """Tokens of prompts and answers over the whole time."""
        return (self.input_tokens + self.output_tokens) / self.seconds

    @property
    def prefill_per_second(self) -> float:
        """Prompt tokens over the time of the steps that computed some."""
        return sum(step.prompt_tokens for step in self.steps) / sum(self.prefill_times)

    @property
    def decode_per_second(self) -> float | None:
        """Tokens over time of the steps that only decoded; None without such steps."""
        times = self.decode_times
        return sum(step.decoded for step in self.steps if not step.is_prefill) / sum(times) if times else None

    @property
    def decode_seconds_per_token(self) -> float | None:
        """Mean time of a step that only decodes: what each sequence waits for its next token. None without one."""
        times = self.decode_times
        return sum(times) / len(times) if times else None


class Bench:
    """A loaded model under measurement. Random token ids come from `seed`."""

    def __init__(self, llm: LLM, model: str, block_size: int, seed: int = 0) -> None:
        self.model = load_model_config(resolve(model))
        self.llm = llm
        self._block_size = block_size
        self._routes = watch_routes(llm.engine)
        self._formats = model_formats(self.model, self._routes.ops, self._routes.kv_dtype)
        self._random = random.Random(seed)
        self._count = 0

    @property
    def ops(self) -> Ops:
        return self._routes.ops

    def prober(self) -> Prober:
        """Reads the limits of all threads of this machine's ranks."""
        return Prober(self.ops, self.llm.world_size // self.llm.nodes, self.llm.cores)

    @property
    def products(self) -> str:
        """Number format of the layers' products: "int8", "bf16" or "fp32"."""
        return self._formats.matrices.products

    def random_asks(self, case: Case, batch: int) -> list[Ask]:
        """As many requests of random token ids, none like one before; the end of a sequence is ignored."""
        ids = range(self.model.vocab_size)
        return [Ask(self._random.choices(ids, k=case.input_len), case.output_len) for _ in range(batch)]

    def run(self, asks: Sequence[Ask], in_flight: int) -> Run:
        """Run all of them, `in_flight` at a time: the next is added when one has ended.

        Raises EightfoldError if the engine refuses one, or one fails.
        """
        engine, waiting = self.llm.engine, list(reversed(asks))
        known: dict[str, RequestTimes] = {}
        steps: list[StepTimes] = []
        self._routes.take_counts(self.model.num_experts)
        preemptions, faults, start = engine.scheduler.num_preemptions, major_faults(), time.perf_counter()
        try:
            for _ in range(min(in_flight, len(asks))):
                self._add(waiting.pop(), known, start)
            while engine.has_unfinished_requests:
                step, ended = self._step(known, start)
                steps.append(step)
                for _ in range(min(ended, len(waiting))):
                    self._add(waiting.pop(), known, start)
        finally:
            for name in known:
                engine.abort(name)
        seconds = time.perf_counter() - start
        return self._result(in_flight, seconds, tuple(known.values()), steps, faults, preemptions)

    def _add(self, ask: Ask, known: dict[str, RequestTimes], start: float) -> None:
        params = SamplingParams(
            temperature=0,
            ignore_eos=ask.ignore_eos,
            max_tokens=ask.output_len,
            detokenize=ask.text,
            output_kind=RequestOutputKind.DELTA,
        )
        self._count += 1
        now = time.perf_counter()
        self.llm.engine.add(Request(str(self._count), list(ask.prompt), params, arrival_time=now))
        known[str(self._count)] = RequestTimes(len(ask.prompt), now - start)

    def _step(self, known: dict[str, RequestTimes], start: float) -> tuple[StepTimes, int]:
        """One step, timed, and how many requests it ended. What it held is read off the scheduler's sequences, before
        and after."""
        scheduler = self.llm.engine.scheduler
        before = [(one, one.computed, len(one.tokens)) for one in scheduler.running]
        before += [(one, -1, len(one.tokens)) for one in scheduler.waiting]
        began = time.perf_counter()
        outputs = self.llm.engine.step()
        ended = time.perf_counter()
        for output in outputs:
            times, one = known[output.request_id], output.outputs[0]
            if output.error is not None:
                raise EightfoldError(output.error)
            times.token_times += [ended - start] * len(one.token_ids)
            times.text += one.text
            times.finish_reason = one.finish_reason
        parts = [part for sequence, begin, count in before if (part := _part(sequence, begin, count)) is not None]
        prompt = sum(row.new for row, decodes in parts if not decodes)
        decoded = sum(decodes for _, decodes in parts)
        rows = tuple(row for row, _ in parts)
        step = StepTimes(began - start, ended - began, rows, prompt, decoded, len(outputs))
        return step, sum(output.finished for output in outputs)

    def _result(
        self,
        in_flight: int,
        seconds: float,
        requests: tuple[RequestTimes, ...],
        steps: list[StepTimes],
        faults: int,
        preemptions: int,
    ) -> Run:
        layers = self.model.num_layers
        counts = self._routes.take_counts(self.model.num_experts)  # [steps · layers, E]
        if len(counts) != layers * len(steps):
            raise AssertionError(f"{len(counts)} routes in {len(steps)} steps of {layers} layers: steps ran otherwise")
        hits = np.count_nonzero(counts, axis=1)  # [steps · layers]
        works: dict[bool, Step] = {}
        for number, step in enumerate(steps):
            own = hits[number * layers : (number + 1) * layers].tolist()
            work = model_step(self.model, self._formats, step.rows, step.outputs, own)
            works[step.is_prefill] = works[step.is_prefill] + work if step.is_prefill in works else work
        return Run(
            in_flight=in_flight,
            seconds=seconds,
            requests=requests,
            steps=tuple(steps),
            # Of other machines the limits are not probed, so the work of all can't be judged by them.
            prefill_work=works.get(True) if self.llm.nodes == 1 else None,
            decode_work=works.get(False) if self.llm.nodes == 1 else None,
            expert_counts=counts.reshape(len(steps), layers, -1).sum(axis=0),
            experts_hit=float(hits.mean()),
            kv_bytes=max(sum(map(self._kv_bytes, step.rows)) for step in steps),
            anonymous_bytes=memory().get("anonymous", 0),
            major_faults=major_faults() - faults,
            preemptions=self.llm.engine.scheduler.num_preemptions - preemptions,
        )

    def _kv_bytes(self, row: Row) -> int:
        pages = -(-row.kv_len // self._block_size)
        return pages * self._block_size * kv_bytes_per_token(self.model, self._routes.kv_dtype)


def _part(sequence: Scheduled, begin: int, count: int) -> tuple[Row, bool] | None:
    """A sequence's part in the step that has just ended, and whether it only decoded; None if it had none.

    Before, it had `count` tokens, `begin` of them computed (-1: it was waiting, and what the prefix cache then held
    counts as computed).
    """
    grew = len(sequence.tokens) > count
    end = count if grew else sequence.computed  # one that has ended gave its pages up: all its tokens had been computed
    begin = sequence.cached if begin < 0 else begin
    if end <= begin:
        return None  # it waited, or lost its pages
    return Row(end - begin, end), begin >= sequence.num_prompt and end - begin == 1

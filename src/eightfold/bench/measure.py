"""An engine under measurement: prefill and decode samples, timed around `Engine.step` and nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eightfold.bench.accounting import Formats, Row, Step, kv_format, model_step, weight_format
from eightfold.bench.probes import major_faults
from eightfold.bench.routes import watch_routes
from eightfold.checkpoint import resolve
from eightfold.config import EngineConfig, ModelConfig, load_model_config
from eightfold.engine import Engine
from eightfold.loader import kv_bytes_per_token, load_engine
from eightfold.ops import Ops
from eightfold.types import Request, RequestOutputKind, SamplingParams


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed stretch: tokens that it computed, seconds, major faults meanwhile, and what it needed at least."""

    tokens: int
    seconds: float
    faults: int
    experts_hit: float  # different experts a layer and step, on average
    work: Step


class Session:
    """An engine of its own for one set of options; random token ids, no end of sequence."""

    def __init__(self, engine: Engine, config: EngineConfig, seed: int = 0) -> None:
        self.config = config
        self.model = load_model_config(resolve(config.model))
        self._engine = engine
        self._routes = watch_routes(engine)
        self._random = random.Random(seed)
        self._count = 0
        self._prefixes: dict[tuple[int, int], list[int]] = {}

    @classmethod
    def open(cls, fields: Mapping[str, Any]) -> Session:
        """Load the model that these fields of EngineConfig describe. Raises EightfoldError as `load_engine` does."""
        config = EngineConfig(**fields)
        return cls(load_engine(config), config)

    @property
    def ops(self) -> Ops:
        return self._routes.ops

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its pages; none should, or what was timed is not what was asked for."""
        return self._engine.scheduler.num_preemptions

    def random_prompt(self, length: int) -> list[int]:
        return self._random.choices(range(self.model.vocab_size), k=length)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the pages that this many tokens of one sequence take, in all layers."""
        model, size = self.model, self.config.block_size
        return -(-tokens // size) * size * kv_bytes_per_token(model, self._routes.kv_dtype)

    def formats(self) -> Formats:
        """How this session's weights, keys and values are stored and multiplied."""
        return model_formats(self.model, self.ops, self._routes.kv_dtype)

    def generate(self, prompt: Sequence[int], output_len: int) -> None:
        """Run one request to its end, untimed."""
        self._add(prompt, output_len)
        while self._engine.has_unfinished_requests:
            self._engine.step()
        self._routes.take()

    def prefill(self, tokens: int) -> Sample:
        """A new prompt up to its first output token: one step, or as many as max_num_batched_tokens asks for."""
        prompt, most = self.random_prompt(tokens), self.config.max_num_batched_tokens
        before = major_faults()
        start = time.perf_counter()
        self._add(prompt, 1)
        while self._engine.has_unfinished_requests:
            self._engine.step()
        seconds = time.perf_counter() - start
        ends = [*range(most, tokens, most), tokens]
        rows = [[Row(end - begin, end)] for begin, end in zip([0, *ends], ends, strict=False)]
        return self._sample(tokens, seconds, major_faults() - before, rows, [int(end == tokens) for end in ends])

    def decode(self, batch: int, depth: int, steps: int, distinct: bool = False) -> Sample:
        """`steps` steps of `batch` sequences that each start `depth` tokens deep.

        Their first `depth` tokens (whole pages of them) are the same and come from the prefix cache, unless they are
        to be `distinct`: then each sequence's own do. Getting there is not timed.
        """
        size = self.config.block_size
        shared = depth // size * size
        prompts = []
        for number in range(batch):
            prefix = self._prefix(shared, number if distinct else 0)
            prompts.append([*prefix, *self.random_prompt(depth - shared + 1)])
        names = [self._add(prompt, steps + 2) for prompt in prompts]
        started: set[str] = set()
        while len(started) < batch:
            started.update(output.request_id for output in self._engine.step())
        self._engine.step()  # the first step of decoding only warms up
        self._routes.take()
        before, tokens, start = major_faults(), 0, time.perf_counter()
        for _ in range(steps):
            tokens += len(self._engine.step())
        seconds = time.perf_counter() - start
        faults = major_faults() - before
        for name in names:
            self._engine.abort(name)
        rows = [[Row(1, depth + 3 + step)] * batch for step in range(steps)]
        return self._sample(tokens, seconds, faults, rows, [batch] * steps, 0 if distinct else shared)

    def _prefix(self, length: int, number: int) -> list[int]:
        """A prompt that lies in the prefix cache: it is computed when it is first asked for."""
        key = (length, number)
        if length and key not in self._prefixes:
            self._prefixes[key] = self.random_prompt(length)
            self.generate([*self._prefixes[key], 0], 1)
        return self._prefixes.get(key, [])

    def _add(self, prompt: Sequence[int], output_len: int) -> str:
        params = SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=output_len, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self._count += 1
        self._engine.add(Request(str(self._count), list(prompt), params))
        return str(self._count)

    def _sample(
        self,
        tokens: int,
        seconds: float,
        faults: int,
        rows: Sequence[list[Row]],
        logit_rows: Sequence[int],
        shared: int = 0,
    ) -> Sample:
        """`rows` and `logit_rows` of each step."""
        layers, hits = self.model.num_layers, self._routes.take()
        if len(hits) != layers * len(rows):
            raise AssertionError(f"{len(hits)} routes in {len(rows)} steps of {layers} layers: the steps ran otherwise")
        formats = self.formats()
        works = [
            model_step(self.model, formats, step, count, hits[i * layers : (i + 1) * layers], shared)
            for i, (step, count) in enumerate(zip(rows, logit_rows, strict=True))
        ]
        work = works[0]
        for other in works[1:]:
            work += other
        return Sample(tokens, seconds, faults, sum(hits) / len(hits), work)


def model_formats(model: ModelConfig, ops: Ops, kv_dtype: torch.dtype) -> Formats:
    """How a loaded model's weights, and its keys and values, are stored and multiplied on this backend."""
    dtype, kept = (str(one).removeprefix("torch.") for one in (ops.dtype, kv_dtype))
    # fp32 arithmetic takes narrower floats as they are stored; narrower arithmetic converts when loading.
    stored = model.torch_dtype or dtype if dtype == "float32" else dtype
    floats = weight_format("dense", dtype, stored)
    matrices = floats if model.scheme == "dense" else weight_format(model.scheme, dtype)
    return Formats(matrices, floats, kv_format(kept, dtype))

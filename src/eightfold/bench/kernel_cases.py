"""What `bench kernels` measures: each operation of the contract, at a model's shapes, with what it needs at least.

Every case takes turns over several sets of weights, or of pages, so that none is found in a processor's cache: in a
model, the other layers' weights come in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from eightfold.bench.accounting import (
    Format,
    Work,
    activations,
    attended,
    attention,
    experts,
    kv_format,
    kv_token_bytes,
    linear,
    weight_format,
)
from eightfold.bench.routes import different
from eightfold.config import ModelConfig
from eightfold.machine import available_memory
from eightfold.ops import Batch, Expert, Ops, Pages, Rope, Weight
from eightfold.quant import get_scheme
from eightfold.quant_config import W4A16_GROUPS
from eightfold.rope import rope_tables
from eightfold.types import EightfoldError

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
DEPTHS = (512, 8192, 32768)
BATCHES = (1, 8)
PREFILLS = ((512, 512), (2048, 2048), (512, 8704))  # (new tokens, kv_len): whole prompts, and a chunk at depth 8192
PAGE_SIZE = 32
ROTATION_BYTES = 512 << 20  # far beyond any processor's cache
_MOST_SETS = 32
_SQUARE = 128  # a matrix that every scheme can store
_BLOCK = 1 << 22  # random numbers drawn; memory is filled with them again and again

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `prepare` gives what to call, once for each set of operands. `products` is the format of its
    operations, or of its floats where it has none to speak of."""

    operation: str
    kind: str  # the scheme, or the dtype of keys and values
    detail: str
    tokens: int
    work: Work
    products: str
    prepare: Callable[[], Sequence[Run]]

    @property
    def name(self) -> str:
        return f"{self.operation}/{self.kind}/{self.detail}"


def matching(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """The cases whose names match a shell-style pattern, or hold it. Raises EightfoldError if there are none."""
    if pattern is None:
        return list(cases)
    chosen = [case for case in cases if fnmatch(case.name, pattern) or pattern in case.name]
    if not chosen:
        kinds = ", ".join(dict.fromkeys(f"{case.operation}/{case.kind}" for case in cases))
        raise EightfoldError(f"--only {pattern!r} matches no kernel; they are named like {cases[0].name}: {kinds}")
    return chosen


class Cases:
    """All cases for a model's shapes on a backend. Memory is taken by the first case that needs it, and shared."""

    def __init__(
        self, config: ModelConfig, ops: Ops, tokens: Sequence[int] = TOKENS, rotation_bytes: int = ROTATION_BYTES
    ) -> None:
        self._config = config
        self._ops = ops
        self._tokens = tokens
        self._rotation_bytes = rotation_bytes
        self._generator = torch.Generator().manual_seed(0)
        self._weights: dict[str, _Pool] = {}
        self._pages: dict[torch.dtype, Pages] = {}

    def all(self) -> list[Case]:
        """Linear layers and experts by scheme, attention by dtype of the pages, and the small operations."""
        config = self._config
        inputs = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        grouped = not any(width % W4A16_GROUPS[0] for width in inputs)  # else int4's groups do not fit the model
        schemes = ("w8a8", "w8a16", "w4a16", "dense") if grouped else ("w8a8", "w8a16", "dense")
        cases = [case for scheme in schemes for case in self._linears(scheme)]
        cases += [case for scheme in schemes for case in self._moes(scheme)]
        for dtype in (torch.bfloat16, torch.int8, torch.float32):
            cases += self._attentions(dtype)
        return cases + list(self._small())

    def _linears(self, scheme: str) -> Iterator[Case]:
        config = self._config
        query, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, width = config.hidden_size, config.intermediate_size
        shapes = {"qkv": ((query, keys, keys), hidden), "o": ((hidden,), query), "w1": ((width,), hidden)}
        shapes["w2"] = ((hidden,), width)
        if scheme == "dense":  # lm_head is never quantized
            shapes["lm_head"] = ((config.vocab_size,), hidden)
        weights = self._format(scheme)
        for name, (outs, ins) in shapes.items():
            for tokens in self._tokens:
                work = linear(tokens, sum(outs), ins, weights) + activations(tokens, ins, sum(outs))
                prepare = self._linear_runs(scheme, outs, ins, tokens)
                yield Case("linear", scheme, f"{name}/T{tokens}", tokens, work, weights.products, prepare)

    def _linear_runs(self, scheme: str, outs: Sequence[int], ins: int, tokens: int) -> Callable[[], Sequence[Run]]:
        def prepare() -> Sequence[Run]:
            pool, x = self._pool(scheme), self._random(tokens, ins)
            size = linear(1, sum(outs), ins, self._format(scheme)).bytes
            count = max(1, min(_MOST_SETS, int(self._rotation_bytes // size)))
            handles = [self._ops.prepare_linear([pool.matrix(out, ins) for out in outs]) for _ in range(count)]
            return [lambda handle=handle: self._ops.linear(x, handle) for handle in handles]  # type: ignore[misc]

        return prepare

    def _moes(self, scheme: str) -> Iterator[Case]:
        config, weights = self._config, self._format(scheme)
        for tokens in self._tokens:
            choices = [self._choice(tokens) for _ in range(8)]
            hit = sum(different(ids) for ids in choices) / len(choices)
            pairs = tokens * config.experts_per_token
            work = experts(pairs, hit, config.hidden_size, config.intermediate_size, weights)
            work += activations(tokens, config.hidden_size, config.hidden_size)
            prepare = self._moe_runs(scheme, tokens, choices)
            yield Case("moe", scheme, f"T{tokens}", tokens, work, weights.products, prepare)

    def _moe_runs(self, scheme: str, tokens: int, choices: Sequence[Tensor]) -> Callable[[], Sequence[Run]]:
        hidden, width = self._config.hidden_size, self._config.intermediate_size

        def prepare() -> Sequence[Run]:
            pool, x = self._pool(scheme), self._random(tokens, hidden)
            shares = torch.full(choices[0].shape, 1 / choices[0].shape[1])
            shapes = ((width, hidden), (hidden, width), (width, hidden))
            layer = [Expert(*(pool.matrix(*shape) for shape in shapes)) for _ in range(self._config.num_experts)]
            handle = self._ops.prepare_experts(layer)
            return [lambda ids=ids: self._ops.moe(x, ids, shares, handle) for ids in choices]  # type: ignore[misc]

        return prepare

    def _choice(self, tokens: int) -> Tensor:
        """Random experts for each token, none twice."""
        scores = torch.rand(tokens, self._config.num_experts, generator=self._generator)
        return scores.argsort(-1)[:, : self._config.experts_per_token].int().contiguous()

    def _attentions(self, dtype: torch.dtype) -> Iterator[Case]:
        limit = self._config.max_position_embeddings
        decodes = [(f"decode/B{rows}/depth{depth}", rows, 1, depth) for depth in DEPTHS for rows in BATCHES]
        prefills = [(f"prefill/T{new}/kv{kv_len}", 1, new, kv_len) for new, kv_len in PREFILLS]
        for detail, rows, new, kv_len in [*decodes, *prefills]:
            if kv_len <= limit:
                yield self._attention(dtype, detail, rows, new, kv_len)

    def _attention(self, dtype: torch.dtype, detail: str, rows: int, new: int, kv_len: int) -> Case:
        config, kind = self._config, dtype_name(dtype)
        # Narrower products are allowed only where both the pages and the compute dtype are narrow.
        formats = kv_format(kind, dtype_name(self._ops.dtype))
        products, token_bytes = formats.products, kv_token_bytes(config, formats)
        pairs = rows * attended(new, kv_len)
        work = attention(pairs, config.num_heads, config.head_dim, products, rows * kv_len, token_bytes)
        work += activations(2 * rows * new, config.num_heads * config.head_dim)

        def prepare() -> Sequence[Run]:
            pages, q = self._kv(dtype), self._random(rows * new, config.num_heads, config.head_dim)
            batches = self._batches(rows, new, kv_len, len(pages.k))
            return [lambda batch=batch: self._ops.attention(q, batch, pages) for batch in batches]  # type: ignore[misc]

        return Case("attention", kind, detail, rows * new, work, products, prepare)

    def _batches(self, rows: int, new: int, kv_len: int, pages: int) -> list[Batch]:
        """The same rows over different pages each time, as far as there are any."""
        each = -(-kv_len // PAGE_SIZE)
        sets = max(1, min(_MOST_SETS, pages // (rows * each)))
        tables = torch.arange(sets * rows * each, dtype=torch.int32).view(sets, rows, each)
        return [make_batch(table, new, kv_len) for table in tables]

    def _small(self) -> Iterator[Case]:
        """Norm, rotation and router: what they touch is mostly in a cache, as it is in a model."""
        config, hidden = self._config, self._config.hidden_size
        query, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for tokens in self._tokens:
            norm = Work({"fp32": 4.0 * tokens * hidden}) + activations(tokens, *[hidden] * 4)
            yield Case("rms_norm", "fp32", f"T{tokens}", tokens, norm, "fp32", self._norm_runs(tokens))
        for tokens in self._tokens:
            rope = Work({"fp32": 3.0 * tokens * (query + keys)}, 2.0 * tokens * 2 * keys)
            rope += activations(tokens, query + 2 * keys, query)
            yield Case("rope_write_kv", "bfloat16", f"T{tokens}", tokens, rope, "fp32", self._rope_runs(tokens))
        gate = Format("fp32", self._ops.dtype.itemsize)
        for tokens in self._tokens:
            route = linear(tokens, config.num_experts, hidden, gate) + activations(tokens, hidden)
            yield Case("route", "fp32", f"T{tokens}", tokens, route, "fp32", self._route_runs(tokens))

    def _norm_runs(self, tokens: int) -> Callable[[], Sequence[Run]]:
        def prepare() -> Sequence[Run]:
            hidden = self._config.hidden_size
            x, residual = self._random(tokens, hidden), self._random(tokens, hidden)
            weight = self._ops.prepare_tensor(torch.ones(hidden, dtype=self._ops.dtype))
            return [lambda: self._ops.rms_norm(x, weight, 1e-5, residual)]

        return prepare

    def _rope_runs(self, tokens: int) -> Callable[[], Sequence[Run]]:
        def prepare() -> Sequence[Run]:
            config, ops = self._config, self._ops
            width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
            qkv, pages = self._random(tokens, width), self._kv(torch.bfloat16)
            cos, sin = rope_tables(config.rope, config.head_dim, tokens)
            rope = Rope(ops.prepare_tensor(cos), ops.prepare_tensor(sin), config.rope.interleaved)
            batches = self._batches(1, tokens, tokens, len(pages.k))
            return [lambda batch=batch: ops.rope_write_kv(qkv, rope, batch, pages) for batch in batches]  # type: ignore[misc]

        return prepare

    def _route_runs(self, tokens: int) -> Callable[[], Sequence[Run]]:
        def prepare() -> Sequence[Run]:
            config = self._config
            x = self._random(tokens, config.hidden_size)
            gate = self._ops.prepare_tensor(self._random(config.num_experts, config.hidden_size).to(self._ops.dtype))
            return [lambda: self._ops.route(x, gate, config.experts_per_token)]

        return prepare

    def _format(self, scheme: str) -> Format:
        return weight_format(scheme, dtype_name(self._ops.dtype))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _pool(self, scheme: str) -> _Pool:
        if scheme not in self._weights:
            hidden, width = self._config.hidden_size, self._config.intermediate_size
            layer = 3 * self._config.num_experts * hidden * width
            largest = max(layer, self._config.vocab_size * hidden)
            largest = max(largest, int(self._rotation_bytes / self._format(scheme).element))
            self._weights[scheme] = _Pool(scheme, self._ops.dtype, largest, self._generator)
        return self._weights[scheme]

    def _kv(self, dtype: torch.dtype) -> Pages:
        """Pages for the largest batch, filled."""
        if dtype not in self._pages:
            config = self._config
            depths = [
                depth for depth in (*DEPTHS, *(kv for _, kv in PREFILLS)) if depth <= config.max_position_embeddings
            ]
            needed = max(BATCHES) * max(depths, default=0)
            count = -(-max(needed, max(self._tokens)) // PAGE_SIZE)
            afford(count * PAGE_SIZE * kv_token_bytes(config, kv_format(dtype_name(dtype))), f"pages of {dtype}")
            pages = self._ops.new_pages(count, PAGE_SIZE, config.num_kv_heads, config.head_dim, dtype)
            block = self._random(_BLOCK)
            block = (block * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else block.to(dtype)
            for part, scale in ((pages.k, pages.k_scale), (pages.v, pages.v_scale)):
                fill(part, block)
                if scale is not None:
                    scale.fill_(1 / 40)
            self._pages[dtype] = pages
        return self._pages[dtype]


class _Pool:
    """Memory full of weights of one scheme, from which matrices are cut one after the other, over and over."""

    def __init__(self, scheme: str, dtype: torch.dtype, elements: int, generator: torch.Generator) -> None:
        self._scheme = get_scheme(scheme)
        self._part, part = next(iter(self._scheme.stored((_SQUARE, _SQUARE)).items()))
        self._each = _SQUARE * _SQUARE // math.prod(part.shapes[0])  # weights of an element
        self._dtype = dtype if dtype in part.dtypes else part.dtypes[0]
        count = elements // self._each
        afford(count * self._dtype.itemsize, f"weights of scheme {scheme}")
        self._memory = torch.empty(count, dtype=self._dtype)
        if self._each > 1:
            block = torch.randint(-(2**31), 2**31, (_BLOCK,), generator=generator)
        else:
            block = torch.randn(_BLOCK, generator=generator) * (0.02 if self._dtype.is_floating_point else 40)
            block = block.clamp(-127, 127)
        fill(self._memory, block.to(self._dtype))
        self._used = 0

    def matrix(self, outs: int, ins: int) -> Weight:
        """The next [outs, ins]; its scales, if it has any, are all alike."""
        count = outs * ins // self._each
        if self._used + count > self._memory.numel():
            self._used = 0
        weight = self._memory[self._used : self._used + count].view(outs, -1)
        self._used += count
        parts: dict[str, Tensor] = {self._part: weight}
        for name, part in self._scheme.stored((outs, ins)).items():
            if name != self._part and not part.optional:
                parts[name] = torch.full(part.shapes[0], 5e-4, dtype=part.dtypes[0])
        return self._scheme.wrap(parts)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_batch(table: Tensor, new: int, kv_len: int) -> Batch:
    """Rows of `new` tokens at the end of `kv_len` positions each; table [rows, pages] int32."""
    rows = len(table)
    positions = torch.arange(kv_len - new, kv_len, dtype=torch.int32).repeat(rows)
    row = torch.arange(rows).repeat_interleave(new)
    at = positions.long()
    return Batch(
        ids=torch.zeros(rows * new, dtype=torch.int64),
        positions=positions,
        slots=table[row, at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE,
        query_starts=torch.arange(0, rows * new + 1, new, dtype=torch.int32),
        kv_lens=torch.full((rows,), kv_len, dtype=torch.int32),
        page_table=table.contiguous(),
        logit_rows=torch.arange(new - 1, rows * new, new),
    )


def afford(size: int, what: str) -> None:
    """Raises EightfoldError if there are not `size` bytes free."""
    free = available_memory()
    if size > free:
        raise EightfoldError(
            f"{what} to measure with take {size / 2**30:.1f} GiB but {free / 2**30:.1f} GiB are free: choose fewer "
            "kernels with --only"
        )


def fill(memory: Tensor, block: Tensor) -> None:
    """Write a block into memory again and again."""
    for piece in torch.split(memory.view(-1), len(block)):
        piece.copy_(block[: len(piece)])

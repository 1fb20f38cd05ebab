"""Does a device compute what the contract says? Each operation and scheme against the torch reference on the CPU, and
the demo model against the CPU's answers. `eightfold doctor` runs it where the device is, tests on an emulator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eightfold.llm import LLM
from eightfold.ops import Batch, Expert, Ops, Rope
from eightfold.quant import SCHEMES, get_scheme
from eightfold.quant import Weight as StoredWeight
from eightfold.types import CompletionOutput, EightfoldError, SamplingParams

# The largest error allowed, as a share of the largest value: a few roundings of what an operation computes.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Beside int8 activations: a value that is rounded to 16 bits first may be quantized to the next integer.
QUANTIZED = {torch.float32: 1e-2, torch.float16: 1.5e-2, torch.bfloat16: 2.5e-2}
INT8_PAGES = 2e-2  # beside pages of int8, where a rounding before may lead to the next integer
ROWS = ((1, 1), (5, 5), (1, 130), (70, 200), (3, 300), (1, 257))  # (queries, keys) of a ragged batch
SHAPES = ((8, 2, 128), (4, 4, 64), (6, 1, 32))  # query heads, KV heads, head size
TOKENS = (1, 7, 40)
PROMPTS = (
    "Who is the CEO of Google?",
    "Who is the CEO of Apple?",
    "The capital of France is Paris. The capital of Italy is Rome. " * 8 + "The capital of France is",
)
CLEAR = 0.5  # a lead of the likeliest token, in nats, that the noise of 16 bits does not turn


@dataclass(frozen=True, slots=True)
class Check:
    """A check by name; `run` gives an error that must not exceed `bound`."""

    name: str
    run: Callable[[], float]
    bound: float


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a check: its error, or what was raised in it."""

    name: str
    error: float
    bound: float
    failure: str = ""

    @property
    def good(self) -> bool:
        return not self.failure and self.error <= self.bound


def examine(checks: Iterator[Check]) -> Iterator[Finding]:
    """Runs checks one by one; whatever one raises is its finding, and the next go on."""
    yield from map(_examined, checks)


def _examined(check: Check) -> Finding:
    try:
        with torch.inference_mode():  # as the engine runs
            return Finding(check.name, check.run(), check.bound)
    except Exception as error:  # a report of all that is wrong is the purpose
        lines = str(error).strip().splitlines() or [""]
        return Finding(check.name, math.nan, check.bound, f"{type(error).__name__}: {lines[0]}")


def checks(ops: Ops, device: str) -> Iterator[Check]:
    """All checks of a backend, in the order in which it is built."""
    yield from operation_checks(ops)
    for scheme in supported(ops):
        yield from product_checks(ops, scheme)
    name = str(ops.dtype).removeprefix("torch.")
    yield Check(f"demo model, tokens that differ from the CPU's, {name}", lambda: demo_differences(device, name), 0.0)


def supported(ops: Ops) -> list[str]:
    """The schemes that the backend multiplies by, in its dtype."""
    return [scheme for scheme in SCHEMES if ops.kernel("linear", scheme) != "none"]


def operation_checks(ops: Ops) -> Iterator[Check]:
    """Everything but products of weights."""
    bound, wide = ROUNDING[ops.dtype], ROUNDING[ops.dtype] * 2
    yield Check("embed", lambda: _embed(ops), 0.0)
    yield Check("rms_norm", lambda: _rms_norm(ops, residual=False), bound)
    yield Check("rms_norm with a residual", lambda: _rms_norm(ops, residual=True), bound)
    for heads, kv_heads, dim in SHAPES:
        for interleaved in (False, True):
            turned = ", interleaved" if interleaved else ""
            for what, rows in (("ragged", ROWS), ("single queries", ((1, 1), (1, 300))), ("a prompt", ((150, 150),))):
                yield Check(
                    f"rope_write_kv and attention, {what}, {heads}/{kv_heads} heads of {dim}{turned}",
                    lambda shape=(heads, kv_heads, dim), i=interleaved, r=rows: _attention(ops, shape, i, r),  # type: ignore[misc]
                    wide,
                )
    if stores_int8(ops):
        for heads, kv_heads, dim in SHAPES:
            yield Check(
                f"rope_write_kv and attention, ragged, int8 pages, {heads}/{kv_heads} heads of {dim}",
                lambda shape=(heads, kv_heads, dim): _attention(ops, shape, False, ROWS, torch.int8),  # type: ignore[misc]
                INT8_PAGES,
            )
    yield Check("route", lambda: _route(ops), 1e-4)


def stores_int8(ops: Ops) -> bool:
    """Whether the backend has pages of int8 beside its dtype."""
    try:
        ops.new_pages(1, ops.page_size(32), 1, 32, torch.int8)
    except EightfoldError:
        return False
    return True


def product_checks(ops: Ops, scheme: str) -> Iterator[Check]:
    """Products of one scheme, against the scheme's own definition; where that quantizes activations, a device may also
    leave them float, which loses less."""
    bound = QUANTIZED[ops.dtype] if "a8" in scheme else ROUNDING[ops.dtype] * 2
    for tokens in TOKENS:
        yield Check(f"linear {scheme}, {tokens} tokens", lambda n=tokens: _linear(ops, scheme, n), bound)  # type: ignore[misc]
        yield Check(f"moe {scheme}, {tokens} tokens", lambda n=tokens: _moe(ops, scheme, n), bound)  # type: ignore[misc]
    yield Check(f"moe {scheme}, wide experts", lambda: _moe(ops, scheme, 9, inner=5632), bound)
    yield Check(f"moe {scheme}, one expert for all", lambda: _moe(ops, scheme, 9, same=True), bound)


def demo_differences(device: str, dtype: str, count: int = 24) -> float:
    """How many of the demo model's greedy answers, run as one batch and in chunks, leave those of the CPU's fp32 at a
    token whose lead is clear; in float32 at any token."""
    greedy = SamplingParams(temperature=0, max_tokens=count, logprobs=2, ignore_eos=True)
    answers = []
    for where, precision in (("cpu", "float32"), (device, dtype)):
        with LLM(
            "demo",
            device=where,
            dtype=precision,
            max_model_len=512,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=64 << 20,
        ) as llm:
            answers.append([output.outputs[0] for output in llm.generate(PROMPTS, greedy)])
    return float(sum(_differs(a, b, 0 if dtype == "float32" else CLEAR) for a, b in zip(*answers, strict=True)))


def _differs(want: CompletionOutput, got: CompletionOutput, clear: float) -> bool:
    """Whether the first token that is not the wanted one had a lead above `clear`, in nats."""
    assert want.logprobs is not None
    for expected, token, best in zip(want.token_ids, got.token_ids, want.logprobs, strict=True):
        if token != expected:
            first, second = sorted((entry.logprob for entry in best.values()), reverse=True)[:2]
            return first - second > clear
    return False


def _embed(ops: Ops) -> float:
    table, ids = _Random()(50, 96).to(ops.dtype), torch.tensor([3, 0, 49, 3])
    return _error(ops.embed(_on(ops, ids), ops.prepare_tensor(table)), Ops().embed(ids, table))


def _rms_norm(ops: Ops, residual: bool) -> float:
    random = _Random()
    x, other, weight = (random(9, 512).to(ops.dtype) for _ in range(3))
    weight = weight[0] + 1
    second = other if residual else None
    want, want_total = Ops().rms_norm(x.float(), weight, 1e-5, None if second is None else second.float())
    device = ops.prepare_tensor(weight)
    got, total = ops.rms_norm(_on(ops, x), device, 1e-5, None if second is None else _on(ops, second))
    return max(_error(got, want), _error(total, want_total))


def _attention(
    ops: Ops,
    shape: tuple[int, int, int],
    interleaved: bool,
    rows: Sequence[tuple[int, int]],
    kv_dtype: torch.dtype | None = None,
) -> float:
    """Keys and values of whole rows are written first, as prompts; then the rows' queries are asked."""
    heads, kv_heads, dim = shape
    size = ops.page_size(32)
    angles = torch.arange(400)[:, None] * 1e4 ** (-torch.arange(dim // 2) / (dim // 2))[None]
    rope = Rope(angles.cos(), angles.sin(), interleaved)
    whole, count = batch_of([(length, length) for _, length in rows], size)
    asked, _ = batch_of(rows, size)
    written = _Random()(len(whole.ids), (heads + 2 * kv_heads) * dim).to(ops.dtype)
    last: list[int] = []
    starts = whole.query_starts.tolist()
    for row, (queries, _) in enumerate(rows):
        last += range(starts[row + 1] - queries, starts[row + 1])
    results = []
    for backend in (ops, Ops()):
        pages = backend.new_pages(count, size, kv_heads, dim, kv_dtype or ops.dtype)
        device = Rope(backend.prepare_tensor(rope.cos), backend.prepare_tensor(rope.sin), interleaved)
        qkv = _on(backend, written).to(backend.activation_dtype)
        backend.rope_write_kv(qkv, device, _batch_on(backend, whole), pages)
        batch = _batch_on(backend, asked)
        q = backend.rope_write_kv(qkv[last], device, batch, pages)
        results.append((q.flatten(1), backend.attention(q, batch, pages)))
    return max(_error(got, want) for got, want in zip(*results, strict=True))


def _route(ops: Ops) -> float:
    random = _Random()
    x, gate = random(40, 256).to(ops.dtype), random(8, 256).to(ops.dtype)
    ids, weights = ops.route(_on(ops, x), ops.prepare_tensor(gate), 2)
    want_ids, want = Ops().route(x, gate, 2)
    return math.inf if ids.tolist() != want_ids.tolist() else _error(weights, want)


def _linear(ops: Ops, scheme: str, tokens: int) -> float:
    """Three matrices side by side."""
    random = _Random()
    weights = [_matrix(random, rows, 320, scheme, ops.dtype) for rows in (256, 64, 64)]
    x = random(tokens, 320).to(ops.dtype)
    got = ops.linear(_on(ops, x), ops.prepare_linear(weights))
    allowed = [weights, [_float(w) for w in weights]] if "a8" in scheme else [weights]
    return min(_row_error(got, Ops(ops.dtype).linear(x, each)) for each in allowed)


def _moe(ops: Ops, scheme: str, tokens: int, inner: int = 192, same: bool = False) -> float:
    hidden, count, random = 256, 4, _Random()

    def make(rows: int, columns: int) -> StoredWeight:
        return _matrix(random, rows, columns, scheme, ops.dtype)

    matrices = [(make(inner, hidden), make(hidden, inner), make(inner, hidden)) for _ in range(count)]
    experts = [Expert(*three) for three in matrices]
    x = random(tokens, hidden).to(ops.dtype)
    ids = torch.stack([torch.randperm(count, generator=random.generator)[:2] for _ in range(tokens)]).int()
    if same:
        ids[:] = torch.tensor([3, 1])
    weights = torch.rand(tokens, 2, generator=random.generator)
    got = ops.moe(_on(ops, x), _on(ops, ids), _on(ops, weights), ops.prepare_experts(experts))
    allowed = [experts, [Expert(*map(_float, three)) for three in matrices]] if "a8" in scheme else [experts]
    return min(_row_error(got, Ops(ops.dtype).moe(x, ids, weights, each)) for each in allowed)


class _Random:
    """Normal numbers, the same in every check, whichever ran before it: two reports can be compared line by line."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _matrix(random: _Random, rows: int, columns: int, scheme: str, dtype: torch.dtype) -> StoredWeight:
    kind = get_scheme("w4a16-g64" if scheme == "w4a16" else scheme)  # the widths here are multiples of 64
    return kind.wrap(kind.quantize((random(rows, columns) / math.sqrt(columns)).to(dtype)))


def _float(weight: StoredWeight) -> StoredWeight:
    return get_scheme("dense").wrap({"weight": weight.dequantize()})


def batch_of(rows: Sequence[tuple[int, int]], size: int) -> tuple[Batch, int]:
    """A batch on the host with rows of (queries, keys), over shuffled pages, and how many pages there are."""
    needed = [-(-length // size) for _, length in rows]
    count = sum(needed) + 3
    free = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    table = torch.zeros(len(rows), max(needed), dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for row, (queries, length) in enumerate(rows):
        mine = [free.pop() for _ in range(needed[row])]
        table[row, : len(mine)] = torch.tensor(mine)
        positions += range(length - queries, length)
        slots += [mine[p // size] * size + p % size for p in range(length - queries, length)]
        starts.append(starts[-1] + queries)
    lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
    at = torch.tensor(positions, dtype=torch.int32)
    ids, ends = torch.zeros(len(positions), dtype=torch.int64), torch.tensor(starts, dtype=torch.int32)
    return Batch(ids, at, torch.tensor(slots), ends, lens, table, torch.zeros(1, dtype=torch.int64)), count


def _batch_on(ops: Ops, batch: Batch) -> Batch:
    return Batch(*(getattr(batch, field.name).to(ops.device) for field in fields(Batch)))


def _on(ops: Ops, tensor: Tensor) -> Tensor:
    """Activations as the backend has them between operations."""
    return tensor.to(ops.device)


def _error(got: Tensor, want: Tensor) -> float:
    """The largest difference as a share of the largest value wanted."""
    return float((got.cpu().double() - want.double()).abs().max() / want.double().abs().max())


def _row_error(got: Tensor, want: Tensor) -> float:
    """The largest norm of a row's difference as a share of the row's norm."""
    return float(((got.cpu().double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)).max())

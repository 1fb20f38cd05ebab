"""Conformance of the operations: every backend, scheme and instruction set against the contract's torch reference, and
the reference itself against formulas written out here."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from eightfold import _native
from eightfold.ops import Batch, Expert, Ops, Pages, Rope, Weight, quantize_rows
from eightfold.ops.cpu import CpuOps
from eightfold.quant import get_scheme
from eightfold.types import EightfoldError

ISAS = _native.available_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KV_DTYPES = (*DTYPES, torch.int8)


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """CpuOps sets torch to one thread; later tests of other files should not notice."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def matrix(rows: int, columns: int, scheme: str = "dense", dtype: torch.dtype = torch.float32) -> Weight:
    kind = get_scheme(scheme)
    return kind.wrap(kind.quantize((torch.randn(rows, columns) / math.sqrt(columns)).to(dtype)))


def experts(count: int, width: int, inner: int, scheme: str, dtype: torch.dtype = torch.float32) -> list[Expert]:
    def make(rows: int, columns: int) -> Weight:
        return matrix(rows, columns, scheme, dtype)

    return [Expert(make(inner, width), make(width, inner), make(inner, width)) for _ in range(count)]


def moved(x: Tensor, by: int) -> Tensor:
    """The same matrix at an address `by` bytes off an aligned one, as in a file."""
    raw = torch.zeros(x.numel() * x.element_size() + 64, dtype=torch.uint8)
    raw[by : by + x.numel() * x.element_size()] = x.contiguous().view(torch.uint8).flatten()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = memoryview(raw.numpy())[by : by + x.numel() * x.element_size()]
        return torch.frombuffer(buffer, dtype=x.dtype).view(x.shape)


def batch_of(rows: Sequence[tuple[int, int]], size: int, seed: int = 0) -> tuple[Batch, int]:
    """Rows of (tokens, positions in the cache) over shuffled pages, and how many pages there are."""
    count = sum(-(-length // size) for _, length in rows) + 3
    free = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    widest = max(-(-length // size) for _, length in rows)
    positions: list[int] = []
    slots: list[int] = []
    table: list[list[int]] = []
    starts = [0]
    for tokens, length in rows:
        mine = [free.pop() for _ in range(-(-length // size))]
        own = range(length - tokens, length)
        positions += own
        slots += [mine[p // size] * size + p % size for p in own]
        table.append(mine + [0] * (widest - len(mine)))
        starts.append(starts[-1] + tokens)
    batch = Batch(
        torch.zeros(starts[-1], dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(slots),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([length for _, length in rows], dtype=torch.int32),
        torch.tensor(table, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
    )
    return batch, count


def fill(pages: Pages, batch: Batch, row: int, keys: Tensor, values: Tensor) -> None:
    """Writes [Hkv, positions, D] into the pages of a row."""
    size = pages.page_size
    for part, scale, source in ((pages.k, pages.k_scale, keys), (pages.v, pages.v_scale, values)):
        for position in range(source.shape[1]):
            page, x = int(batch.page_table[row, position // size]), source[:, position]
            if scale is not None:
                x, scale[page, :, position % size] = quantize_rows(x)
            part[page, :, position % size] = x.to(part.dtype)


def fill_randomly(pages: Pages) -> None:
    for part, scale in ((pages.k, pages.k_scale), (pages.v, pages.v_scale)):
        if scale is None:
            part.normal_()
        else:
            part.random_(-127, 128)
            scale.uniform_(0.001, 0.03)


def parts_of(pages: Pages) -> list[Tensor]:
    return [part for part in (pages.k, pages.v, pages.k_scale, pages.v_scale) if part is not None]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


# The reference against formulas of its own


def test_reference_attention_is_the_formula() -> None:
    ops, heads, kv_heads, dim, window = Ops(), 4, 2, 6, 3
    rows = [(2, 5), (1, 1), (4, 4)]
    batch, count = batch_of(rows, 2)
    pages = ops.new_pages(count, 2, kv_heads, dim, torch.float32)
    content = [(torch.randn(kv_heads, length, dim), torch.randn(kv_heads, length, dim)) for _, length in rows]
    for row, (keys, values) in enumerate(content):
        fill(pages, batch, row, keys, values)
    q = torch.randn(7, heads, dim)
    for limit in (None, window):
        out = ops.attention(q, batch, pages, limit).view(7, heads, dim)
        token = 0
        for row, (tokens, length) in enumerate(rows):
            for position in range(length - tokens, length):
                first = 0 if limit is None else max(0, position - limit + 1)
                for head in range(heads):
                    keys, values = (content[row][i][head // 2, first : position + 1].double() for i in (0, 1))
                    weights = torch.exp(keys @ q[token, head].double() / math.sqrt(dim))
                    want = (weights[:, None] * values).sum(0) / weights.sum()
                    assert torch.allclose(out[token, head].double(), want, atol=1e-5)
                token += 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_rope_turns_pairs(interleaved: bool) -> None:
    ops, dim = Ops(), 8
    batch, count = batch_of([(3, 9)], 4)
    pages = ops.new_pages(count, 4, 1, dim, torch.float32)
    angles = torch.arange(16)[:, None] * torch.rand(dim // 2)[None]
    qkv = torch.randn(3, 3 * dim)
    q = ops.rope_write_kv(qkv, Rope(angles.cos(), angles.sin(), interleaved), batch, pages)
    for token in range(3):
        position, slot = 6 + token, int(batch.slots[token])
        for pair in range(dim // 2):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dim // 2)
            turn = torch.polar(torch.tensor(1.0), angles[position, pair])
            for x, y in ((qkv[token, :dim], q[token, 0]), (qkv[token, dim : 2 * dim], pages.k[slot // 4, 0, slot % 4])):
                want = torch.complex(x[a], x[b]) * turn
                assert torch.allclose(torch.complex(y[a], y[b]), want, atol=1e-6)
        assert torch.equal(pages.v[slot // 4, 0, slot % 4], qkv[token, 2 * dim :])


# Matrix products


def check_products(ops: CpuOps, weight: Weight, tokens: int) -> None:
    """Against fp64, within what fp32 sums of the input rounded as the contract says may lose."""
    x = torch.randn(tokens, weight.shape[1])
    got = ops.linear(x, ops.prepare_linear([weight]))
    rounded = x.bfloat16().double() if ops.dtype == torch.bfloat16 else x.double()
    dense = weight.parts["weight"].double()
    bound = 1e-6 * (rounded.abs() @ dense.abs().T) + 1e-30
    assert got.dtype == torch.float32
    assert bool(((got.double() - rounded @ dense.T).abs() <= bound).all())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_dense(isa: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    ops = CpuOps(dtype, threads=2, isa=isa)
    for rows, columns in ((1, 1), (67, 45), (5, 129), (131, 2085)):
        weight = matrix(rows, columns, dtype=stored)
        for tokens in (1, 2, 3, 5, 9, 17, 40, 150):
            check_products(ops, weight, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_w8a16(isa: str, dtype: torch.dtype) -> None:
    """int8 weights enter as they are stored: all that is lost is the rounding of the input and of fp32 sums."""
    ops = CpuOps(dtype, threads=2, isa=isa)
    for rows, columns in ((1, 1), (67, 45), (5, 129), (131, 2085)):
        weights = [matrix(rows, columns, "w8a16"), matrix(7, columns, "w8a16"), matrix(3, columns, "w8a8")]
        handle = ops.prepare_linear(weights)
        for tokens in (1, 2, 3, 5, 9, 17, 40, 150):
            x = torch.randn(tokens, columns)
            got = ops.linear(x, handle)[:, : rows + 7]
            rounded = x.bfloat16().double() if dtype == torch.bfloat16 else x.double()
            dense = torch.cat([weight.dequantize() for weight in weights[:2]]).double()  # type: ignore[attr-defined]
            bound = 1e-6 * (rounded.abs() @ dense.abs().T) + 1e-30
            assert bool(((got.double() - rounded @ dense.T).abs() <= bound).all()), (rows, columns, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_w8a8_is_exactly_the_reference(isa: str, dtype: torch.dtype) -> None:
    ops, reference = CpuOps(dtype, threads=2, isa=isa), Ops(dtype)
    for rows, columns in ((1, 1), (67, 45), (5, 129), (131, 2085), (30, 4500)):
        weights = [matrix(rows, columns, "w8a8"), matrix(7, columns, "w8a8")]
        handle = ops.prepare_linear(weights)
        for tokens in (1, 2, 3, 5, 7, 9, 17, 40, 150):
            x = torch.randn(tokens, columns)
            x[0] *= 0 if tokens == 3 else 1  # a zero row is legal
            assert torch.equal(ops.linear(x, handle), reference.linear(x, weights)), (rows, columns, tokens)


def test_few_tokens_by_long_int8_rows_are_exactly_the_reference(isa: str) -> None:
    """Rows that a few tokens pass in panels: odd numbers of them, rows in one part and in several, short last parts."""
    ops, reference = CpuOps(threads=2, isa=isa), Ops()
    for rows, columns in ((109, 2048), (25, 2176), (14, 5760), (27, 14336)):
        weights = [matrix(rows, columns, "w8a8"), matrix(1, columns, "w8a8")]
        handle = ops.prepare_linear(weights)
        for tokens in range(1, 14):
            x = torch.randn(tokens, columns)
            assert torch.equal(ops.linear(x, handle), reference.linear(x, weights)), (rows, columns, tokens)


def test_w8a8_sums_do_not_saturate_or_overflow(isa: str) -> None:
    ops = CpuOps(threads=1, isa=isa)
    weight = torch.full((3, 70001), 127, dtype=torch.int8)
    weight[1] = -128
    weight[2, ::2] = -127
    wrapped = get_scheme("w8a8").wrap({"weight": weight, "weight_scale": torch.ones(3, 1)})
    x = torch.cat([torch.full((1, 70001), 127.0), torch.full((1, 70001), -127.0), torch.eye(1, 70001) * 127])
    sums = x.double() @ weight.double().T
    for tokens in (1, 3):
        assert torch.equal(ops.linear(x[:tokens], ops.prepare_linear([wrapped])), sums[:tokens].float())


def test_w8a8_shows_what_is_not_finite(isa: str) -> None:
    ops, reference, weight = CpuOps(threads=1, isa=isa), Ops(), matrix(9, 33, "w8a8")
    x = torch.randn(3, 33)
    x[0, 5], x[2, 32] = math.nan, -math.inf
    got = ops.linear(x, ops.prepare_linear([weight]))
    assert bool(got[[0, 2]].isnan().all())
    assert torch.equal(got[1], reference.linear(x, [weight])[1])


@pytest.mark.parametrize("scheme", ["dense", "w8a8", "w8a16"])
@pytest.mark.parametrize("stored", DTYPES)
def test_linear_of_unaligned_rows_and_columns(isa: str, scheme: str, stored: torch.dtype) -> None:
    """Weights where the file has them: at odd addresses, and views by rows and columns for tensor parallel."""
    whole = matrix(50, 200, scheme, stored)
    views = {"moved": moved(whole.parts["weight"], 3)} if scheme == "dense" or stored == torch.float32 else {}
    for dtype in (torch.float32, torch.bfloat16):
        ops = CpuOps(dtype, threads=2, isa=isa)
        for axis, start, stop in ((0, 3, 46), (1, 64, 131), (1, 77, 200)):
            view = whole.slice(axis, start, stop)
            copy = get_scheme(scheme).wrap({name: part.clone() for name, part in view.parts.items()})
            for tokens in (1, 4, 33):
                x = torch.randn(tokens, view.shape[1])
                got, want = (ops.linear(x, ops.prepare_linear([w])) for w in (view, copy))
                assert torch.equal(got, want)
        for weight in views.values():
            odd = get_scheme(scheme).wrap({**whole.parts, "weight": weight})
            for tokens in (1, 4, 33):
                x = torch.randn(tokens, 200)
                got, want = (ops.linear(x, ops.prepare_linear([w])) for w in (odd, whole))
                assert torch.equal(got, want)


def test_linear_takes_columns_of_wider_activations(isa: str) -> None:
    ops, weight = CpuOps(threads=1, isa=isa), matrix(20, 30)
    wide = torch.randn(5, 90)
    handle = ops.prepare_linear([weight])
    for x in (wide[:, 30:60], wide[:, ::3]):
        assert torch.equal(ops.linear(x, handle), ops.linear(x.contiguous(), handle))


def test_fp16_products_do_not_overflow(isa: str) -> None:
    ops = CpuOps(torch.float16, threads=1, isa=isa)
    weight = get_scheme("dense").wrap({"weight": torch.full((8, 300), 6e4, dtype=torch.float16)})
    x = torch.full((3, 300), 1e5)
    assert torch.allclose(ops.linear(x, ops.prepare_linear([weight])), torch.tensor(6e4).half().float() * 1e5 * 300)


@pytest.mark.parametrize(
    ("scheme", "stored"), [("dense", d) for d in DTYPES] + [("w8a8", torch.float32), ("w8a16", torch.float32)]
)
def test_moe(isa: str, scheme: str, stored: torch.dtype) -> None:
    dtype = torch.float32
    ops, reference = CpuOps(dtype, threads=2, isa=isa), Ops(dtype)
    layer = experts(5, 70, 45, scheme, stored)
    handle = ops.prepare_experts(layer)
    for tokens in (1, 2, 7, 60, 300):
        x, ids = torch.randn(tokens, 70), torch.stack([torch.randperm(5)[:2] for _ in range(tokens)]).int()
        if tokens == 60:
            ids[:] = torch.tensor([3, 1])  # all tokens with the same experts
        weights = torch.rand(tokens, 2)
        got, want = ops.moe(x, ids, weights, handle), reference.moe(x, ids, weights, layer)
        assert error(got, want) < (2e-2 if scheme == "w8a8" else 2e-6)


@pytest.mark.parametrize("scheme", ["dense", "w8a16"])
def test_moe_in_bf16(isa: str, scheme: str) -> None:
    """Within a few roundings to bf16 of the fp32 reference."""
    ops, layer = CpuOps(torch.bfloat16, threads=2, isa=isa), experts(4, 96, 80, scheme, torch.bfloat16)
    x, ids, weights = torch.randn(50, 96), torch.randint(0, 4, (50, 2)).int(), torch.rand(50, 2)
    assert error(ops.moe(x, ids, weights, ops.prepare_experts(layer)), Ops().moe(x, ids, weights, layer)) < 1e-2


# The others


def test_rms_norm(isa: str) -> None:
    ops, reference = CpuOps(threads=2, isa=isa), Ops()
    for tokens, width in ((1, 1), (3, 45), (70, 1000)):
        for dtype in DTYPES:
            x, residual, weight = torch.randn(tokens, width), torch.randn(tokens, width), torch.rand(width).to(dtype)
            for second in (None, residual):
                (got, total), (want, want_total) = (o.rms_norm(x, weight, 1e-5, second) for o in (ops, reference))
                assert torch.equal(total, want_total)
                assert error(got, want) < 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rope_write_kv_is_exactly_the_reference(isa: str, kv_dtype: torch.dtype, interleaved: bool) -> None:
    ops, reference = CpuOps(threads=2, isa=isa), Ops()
    for heads, kv_heads, dim, size in ((4, 2, 64, 16), (3, 3, 18, 5)):
        batch, count = batch_of([(1, 7), (30, 41), (5, 5)], size)
        angles = torch.arange(50)[:, None] * torch.rand(dim // 2)[None]
        rope = Rope(angles.cos(), angles.sin(), interleaved)
        qkv = torch.randn(36, (heads + 2 * kv_heads) * dim) * 100
        qkv[0] = 1e-7  # subnormal in fp16
        qkv[1] = 1e5  # too large for it
        qkv[2] = 0
        qkv[3] = 1e-33
        if kv_dtype == torch.int8:
            qkv[4, heads * dim] = math.nan  # a key
            qkv[5, -1] = -math.inf  # a value
        first, second = (reference.new_pages(count, size, kv_heads, dim, kv_dtype) for _ in range(2))
        for pages in (first, second):
            for part in parts_of(pages):
                part.zero_()
        got, want = ops.rope_write_kv(qkv, rope, batch, first), reference.rope_write_kv(qkv, rope, batch, second)
        assert torch.equal(got, want)
        for mine, theirs in zip(parts_of(first), parts_of(second), strict=True):
            assert torch.equal(mine.nan_to_num(-1.0), theirs.nan_to_num(-1.0))
        if first.k_scale is not None and first.v_scale is not None:
            assert torch.equal(first.k_scale.isnan(), first.v_scale.isnan())
            assert int(first.k_scale.isnan().sum()) == 2


def test_int8_rows_are_within_half_a_step() -> None:
    x = torch.randn(50, 3, 24) * torch.logspace(-20, 20, 50)[:, None, None]
    x[7], x[8, 1], x[9, 2, 5], x[10, 0, 1] = 0, 1e-31, math.nan, -math.inf
    q, scale = quantize_rows(x)
    bad = scale.isnan()
    assert bad.nonzero().tolist() == [[9, 2], [10, 0]]
    assert not q[bad].any() and not scale[7].any() and scale[8, 1] == 0
    good = ~bad & (x.abs().amax(-1) > 1e-30)
    off = (q.double() * scale.double()[..., None] - x.double()).abs() / scale.double()[..., None]
    assert float(off[good].max()) <= 0.5 + 1e-4
    assert torch.equal(q.abs().amax(-1)[good], torch.full((int(good.sum()),), 127, dtype=torch.int8))


ATTENTION_ROWS = [(1, 1), (5, 5), (1, 130), (70, 200), (3, 1100), (1, 2050)]


@pytest.mark.parametrize("window", [None, 37, 1500])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention(isa: str, kv_dtype: torch.dtype, window: int | None) -> None:
    reference = Ops()
    for heads, kv_heads, dim, size in ((8, 2, 64, 16), (5, 5, 18, 7), (6, 1, 128, 64)):
        batch, count = batch_of(ATTENTION_ROWS, size)
        pages = reference.new_pages(count, size, kv_heads, dim, kv_dtype)
        fill_randomly(pages)
        q = torch.randn(len(batch.positions), heads, dim)
        want = reference.attention(q, batch, pages, window)
        for dtype in (torch.float32, torch.bfloat16):
            # Only bf16 arithmetic may round queries and probabilities: to bf16, or over int8 to 16-bit integers.
            bound = {torch.bfloat16: 1e-2, torch.int8: 1e-4}.get(kv_dtype, 2e-6) if dtype == torch.bfloat16 else 2e-6
            got = CpuOps(dtype, threads=2, isa=isa).attention(q, batch, pages, window)
            assert error(got, want) < bound


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_attention_reads_nothing_beyond_a_row(isa: str, kv_dtype: torch.dtype) -> None:
    """Pages are not cleared: what lies behind the last position may be anything."""
    ops = CpuOps(torch.bfloat16, threads=1, isa=isa)
    for new in (3, 20):  # a single tile of query rows, and several
        batch, count = batch_of([(new, 21), (1, 70)], 16)
        pages = ops.new_pages(count, 16, 2, 32, kv_dtype)
        for part in parts_of(pages):
            part.fill_(math.nan if part.is_floating_point() else 77)
        for row, length in enumerate((21, 70)):
            fill(pages, batch, row, torch.randn(2, length, 32), torch.randn(2, length, 32))
        out = ops.attention(torch.randn(new + 1, 4, 32), batch, pages)
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("device", ["cpu", "torch"])
@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_int8_pages_do_not_hide_numbers_that_are_not_finite(isa: str, device: str, what: str) -> None:
    """Rows that see the bad token get NaN; what came before it, and the other row, do not."""
    heads, kv_heads, dim = 4, 2, 16
    for dtype in (torch.float32, torch.bfloat16):
        ops = CpuOps(dtype, threads=1, isa=isa) if device == "cpu" else Ops(dtype)
        for bad in (math.nan, math.inf):
            batch, count = batch_of([(5, 5), (5, 5)], 4)
            pages = ops.new_pages(count, 4, kv_heads, dim, torch.int8)
            qkv = torch.randn(10, (heads + 2 * kv_heads) * dim)
            qkv[4, {"query": 0, "key": heads, "value": heads + kv_heads}[what] * dim] = bad
            q = ops.rope_write_kv(qkv, Rope(torch.ones(8, dim // 2), torch.zeros(8, dim // 2)), batch, pages)
            out = ops.attention(q, batch, pages).view(10, heads, dim)
            assert bool(out[4, 0].isnan().all()) and bool(out[4, 2:].isfinite().all())
            assert bool(out[5:].isfinite().all())


def test_attention_with_large_scores(isa: str) -> None:
    ops, reference = CpuOps(threads=1, isa=isa), Ops()
    batch, count = batch_of([(40, 100)], 16)
    pages = ops.new_pages(count, 16, 1, 16, torch.float32)
    pages.k.normal_().mul_(100)
    pages.v.normal_()
    q = torch.randn(40, 2, 16) * 100
    assert error(ops.attention(q, batch, pages), reference.attention(q, batch, pages)) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_route(isa: str, dtype: torch.dtype) -> None:
    ops, reference = CpuOps(threads=2, isa=isa), Ops()
    for tokens, width, count, chosen in ((1, 64, 8, 2), (50, 77, 8, 2), (9, 33, 5, 5), (3, 16, 1, 1)):
        x, gate = torch.randn(tokens, width), torch.randn(count, width).to(dtype)
        (ids, weights), (want_ids, want) = ops.route(x, gate, chosen), reference.route(x, gate, chosen)
        assert torch.equal(ids, want_ids)
        assert ids.dtype == torch.int32
        assert error(weights, want) < 1e-5


def test_route_prefers_the_lower_of_equal_experts(isa: str) -> None:
    gate = torch.randn(1, 40).expand(6, 40).contiguous()
    ids, weights = CpuOps(threads=1, isa=isa).route(torch.randn(3, 40), gate, 2)
    assert ids.tolist() == [[0, 1]] * 3
    assert torch.equal(weights, torch.full((3, 2), 0.5))


# An answer depends on its own tokens only


@pytest.mark.parametrize(
    ("scheme", "dtype", "stored"),
    [
        ("dense", torch.float32, torch.float32),
        ("dense", torch.bfloat16, torch.bfloat16),
        ("dense", torch.float16, torch.float16),
        ("w8a8", torch.bfloat16, torch.float32),
        ("w8a16", torch.bfloat16, torch.float32),
        ("w8a16", torch.float32, torch.float32),
    ],
)
def test_products_do_not_depend_on_the_batch(isa: str, scheme: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    rows, width, inner = 101, 2090, 133
    weight, layer = matrix(rows, width, scheme, stored), experts(3, width, inner, scheme, stored)
    x, ids, weights = torch.randn(160, width), torch.randint(0, 3, (160, 2)).int(), torch.rand(160, 2)
    alone = CpuOps(dtype, threads=1, isa=isa)
    linear, moe = alone.prepare_linear([weight]), alone.prepare_experts(layer)
    want = torch.cat([alone.linear(x[i : i + 1], linear) for i in range(160)])
    want_moe = torch.cat([alone.moe(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], moe) for i in range(160)])
    for threads in (1, 2, 3):
        ops = CpuOps(dtype, threads=threads, isa=isa)
        linear, moe = ops.prepare_linear([weight]), ops.prepare_experts(layer)
        for tokens in (*range(2, 20), 37, 70, 145, 160):
            order = torch.randperm(160)[:tokens]
            assert torch.equal(ops.linear(x[order], linear), want[order]), (threads, tokens)
            if tokens in (2, 5, 9, 19, 70, 160):
                got = ops.moe(x[order], ids[order], weights[order], moe)
                assert torch.equal(got, want_moe[order]), (threads, tokens)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_products_have_the_same_bits(isa: str, stored: torch.dtype) -> None:
    """Over a short K many tokens are multiplied with packed weights in fp32, and are cut into items by tokens too."""
    for rows, width in ((101, 133), (32, 512), (7, 16), (33, 5)):
        weight, x = matrix(rows, width, "dense", stored), torch.randn(150, width)
        alone = CpuOps(torch.float32, threads=1, isa=isa)
        linear = alone.prepare_linear([weight])
        want = torch.cat([alone.linear(x[i : i + 1], linear) for i in range(150)])
        assert torch.allclose(want, x @ weight.parts["weight"].float().T, atol=1e-4)
        two = CpuOps(torch.float32, threads=2, isa=isa)
        linear = two.prepare_linear([weight])
        for tokens in (23, 24, 25, 29, 150):
            order = torch.randperm(150)[:tokens]
            assert torch.equal(two.linear(x[order], linear), want[order]), (rows, width, tokens)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_decoding_does_not_depend_on_which_heads_go_together(isa: str, kv_dtype: torch.dtype) -> None:
    """An item has all KV heads, a third of them, or one, and all of the context or a segment: the same bits."""
    heads, kv_heads, dim, size = 12, 6, 40, 32
    lengths = (2100, 70, 1024, 3)
    batch, count = batch_of([(1, length) for length in lengths], size)
    pages = Ops().new_pages(count, size, kv_heads, dim, kv_dtype)
    fill_randomly(pages)
    q = torch.randn(len(lengths), heads, dim)
    want = CpuOps(torch.bfloat16, threads=1, isa=isa).attention(q, batch, pages)
    for threads in (2, 3, 5):
        ops = CpuOps(torch.bfloat16, threads=threads, isa=isa)
        assert torch.equal(ops.attention(q, batch, pages), want)
        for row in range(len(lengths)):
            alone = dataclasses.replace(
                batch,
                positions=batch.positions[row : row + 1],
                slots=batch.slots[row : row + 1],
                query_starts=batch.query_starts[:2],
                kv_lens=batch.kv_lens[row : row + 1],
                page_table=batch.page_table[row : row + 1],
            )
            assert torch.equal(ops.attention(q[row : row + 1], alone, pages)[0], want[row])


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
    ],
)
def test_attention_does_not_depend_on_the_batch(
    isa: str, dtype: torch.dtype, kv_dtype: torch.dtype, window: int | None
) -> None:
    """Whole prompt, chunks, single tokens; any page size, neighbours and threads: the same bits."""
    length, heads, kv_heads, dim = 2200, 4, 2, 24
    keys, values = torch.randn(2, kv_heads, length, dim)
    q = torch.randn(length, heads, dim)
    wanted = range(0, length, 7)  # of single tokens: these

    def run(rows: list[tuple[int, int]], size: int, threads: int) -> dict[int, Tensor]:
        """Results by position; every row is the same sequence, cut off at its length."""
        ops = CpuOps(dtype, threads=threads, isa=isa)
        batch, count = batch_of(rows, size, seed=size)
        pages = ops.new_pages(count, size, kv_heads, dim, kv_dtype)
        for row, (_, end) in enumerate(rows):
            pages_of_row = batch.page_table[row, : -(-end // size)].long()
            for stored, scale, source in ((pages.k, pages.k_scale, keys), (pages.v, pages.v_scale, values)):
                padded = torch.zeros(kv_heads, len(pages_of_row) * size, dim)
                padded[:, :end] = source[:, :end]
                by_page = padded.view(kv_heads, -1, size, dim).transpose(0, 1)
                if scale is not None:
                    by_page, scale[pages_of_row] = quantize_rows(by_page)
                stored[pages_of_row] = by_page.to(kv_dtype)
        out = ops.attention(q[batch.positions.long()], batch, pages, window)
        return dict(zip(batch.positions.tolist(), out, strict=True))

    whole = run([(length, length)], 16, 1)
    for rows, size, threads in (
        ([(1, length)], 16, 1),
        ([(1, length)], 16, 3),  # few rows, many threads: the context is split
        ([(1, length)], 7, 2),
        ([(100, 1100)], 32, 2),
        ([(1, 3), (63, 1088), (1, 1025), (200, length), (1, 64)], 48, 3),
        ([(1, p + 1) for p in wanted if p < 200], 16, 2),
    ):
        got = run(rows, size, threads)
        assert all(torch.equal(got[p], whole[p]) for p in got), (rows, size, threads)


def test_pointwise_operations_do_not_depend_on_the_batch(isa: str) -> None:
    x, weight, gate = torch.randn(90, 100), torch.rand(100), torch.randn(8, 100)
    alone = CpuOps(threads=1, isa=isa)
    norms = torch.cat([alone.rms_norm(x[i : i + 1], weight, 1e-6)[0] for i in range(90)])
    routes = torch.cat([alone.route(x[i : i + 1], gate, 2)[1] for i in range(90)])
    for threads in (1, 3):
        ops = CpuOps(threads=threads, isa=isa)
        assert torch.equal(ops.rms_norm(x.repeat(9, 1), weight, 1e-6)[0], norms.repeat(9, 1))
        assert torch.equal(ops.route(x.repeat(9, 1), gate, 2)[1], routes.repeat(9, 1))


# Threads and processes


def test_two_python_threads_may_share_the_backend() -> None:
    ops, weight = CpuOps(threads=2), matrix(200, 300)
    handle = ops.prepare_linear([weight])
    inputs = [torch.randn(n, 300) for n in (1, 40)]
    wants = [ops.linear(x, handle) for x in inputs]
    failures: list[int] = []

    def work(which: int) -> None:
        good = [torch.equal(ops.linear(inputs[which], handle), wants[which]) for _ in range(100)]
        failures.extend([which] * good.count(False))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    ops, weight = CpuOps(threads=2), matrix(300, 300)
    handle, x = ops.prepare_linear([weight]), torch.randn(20, 300)
    want = ops.linear(x, handle)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.linear(x, handle), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(ops.linear(x, handle), want)


# Mistakes


def test_isa_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EIGHTFOLD_CPU_ISA", "portable")
    ops = CpuOps(threads=1)
    assert ops.isa == "portable"
    for scheme in ("dense", "w8a8", "w8a16", "w4a16-g64"):
        assert ops.kernel("linear", scheme) == ops.kernel("moe", scheme) == "native portable"
    assert ops.kernel("embed", "dense") == "torch"
    monkeypatch.setenv("EIGHTFOLD_CPU_ISA", "avx1024")
    with pytest.raises(EightfoldError, match="EIGHTFOLD_CPU_ISA is 'avx1024', but it is not known; it may be port"):
        CpuOps()


def test_an_isa_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available_isas", lambda: ["portable"])
    monkeypatch.setattr(_native, "known_isas", lambda: ["portable", "avx2"])
    with pytest.raises(EightfoldError, match="'avx2', but this processor cannot run it; it may be portable"):
        CpuOps(isa="avx2")


def test_bad_arguments() -> None:
    with pytest.raises(EightfoldError, match=r"dtype is torch\.float64"):
        CpuOps(torch.float64)
    with pytest.raises(EightfoldError, match="threads is 0"):
        CpuOps(threads=0)
    ops = CpuOps(threads=1)
    with pytest.raises(EightfoldError, match="activations are 9 wide where the weights are 10"):
        ops.linear(torch.zeros(2, 9), ops.prepare_linear([matrix(4, 10)]))
    with pytest.raises(EightfoldError, match="3 experts a token are wanted of 2"):
        ops.route(torch.zeros(1, 4), torch.zeros(2, 4), 3)


def test_what_no_kernel_supports_falls_back_once_or_is_refused() -> None:
    weight = get_scheme("dense").wrap({"weight": torch.randn(5, 8).double()})
    ops = CpuOps(threads=1)
    with pytest.warns(RuntimeWarning, match="linear has no native kernel for weights of torch.float64"):
        handle = ops.prepare_linear([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.prepare_linear([weight])
    x = torch.randn(3, 8)
    assert torch.allclose(ops.linear(x, handle), x @ weight.parts["weight"].float().T, atol=1e-5)
    with pytest.raises(EightfoldError, match="without strict_kernels torch would run it"):
        CpuOps(threads=1, strict_kernels=True).prepare_linear([weight])
    with pytest.warns(RuntimeWarning, match="moe has no native kernel"):
        layer = ops.prepare_experts([Expert(weight, get_scheme("dense").wrap({"weight": torch.randn(8, 5)}), weight)])
    assert ops.moe(x, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), layer).shape == (3, 8)


def test_numbers_that_kernels_would_follow_out_of_memory_are_refused() -> None:
    ops = CpuOps(threads=1)
    batch, count = batch_of([(2, 2)], 4)
    pages = ops.new_pages(count, 4, 1, 4, torch.float32)
    rope = Rope(torch.ones(8, 2), torch.zeros(8, 2))
    qkv = torch.zeros(2, 12)
    with pytest.raises(ValueError, match="slot"):
        ops.rope_write_kv(qkv, rope, batch, Pages(pages.k[:0], pages.v[:0]))
    with pytest.raises(ValueError, match="position"):
        ops.rope_write_kv(qkv, Rope(rope.cos[:1], rope.sin[:1]), batch, pages)
    with pytest.raises(ValueError, match="page"):
        ops.attention(torch.zeros(2, 1, 4), batch, Pages(pages.k[:0], pages.v[:0]))
    narrow = ops.new_pages(count, 4, 1, 4, torch.int8)
    with pytest.raises(EightfoldError, match=r"int8 pages need fp32 scales of shape \[4, 1, 4\]"):
        ops.attention(torch.zeros(2, 1, 4), batch, Pages(narrow.k, narrow.v, narrow.k_scale))
    layer = ops.prepare_experts(experts(2, 4, 4, "dense"))
    with pytest.raises(ValueError, match="expert"):
        ops.moe(torch.zeros(1, 4), torch.tensor([[5]]), torch.ones(1, 1), layer)


# Sizes of real work


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dense", "w8a8"])
def test_thousands_of_tokens(scheme: str) -> None:
    ops, reference = CpuOps(threads=2), Ops()
    layer = experts(4, 160, 224, scheme)
    x, ids = torch.randn(3000, 160), torch.stack([torch.randperm(4)[:2] for _ in range(3000)]).int()
    ids[:2000, 0] = 1  # more of one expert than one group of slots holds
    weights = torch.rand(3000, 2)
    assert error(ops.moe(x, ids, weights, ops.prepare_experts(layer)), reference.moe(x, ids, weights, layer)) < 1e-2
    batch, count = batch_of([(3000, 3000), (1, 5000)], 32)
    pages = ops.new_pages(count, 32, 2, 64, torch.bfloat16)
    pages.k.normal_()
    pages.v.normal_()
    q = torch.randn(3001, 4, 64)
    assert error(ops.attention(q, batch, pages), reference.attention(q, batch, pages)) < 1e-5

"""Quantization schemes: what they store, refuse, slice, and multiply."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eightfold.quant import SCHEMES, get_scheme
from eightfold.quant.w8a8 import W8A8Weight, integer_sums, quantize_rows
from eightfold.types import EightfoldError

W8A8 = get_scheme("w8a8")
DENSE = get_scheme("dense")
sizes = st.integers(1, 40)
magnitudes = st.sampled_from([1e-44, 1e-38, 1e-20, 1e-4, 1.0, 1e4, 1e30])


def random(rows: int, columns: int, seed: int, magnitude: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude


def quantized(rows: int, columns: int, seed: int = 0) -> W8A8Weight:
    weight = W8A8.wrap(W8A8.quantize(random(rows, columns, seed)))
    assert isinstance(weight, W8A8Weight)
    return weight


def test_unknown_scheme() -> None:
    with pytest.raises(
        EightfoldError, match="quantization scheme 'w3' is not known; there are dense, w8a8, w8a16, w4a16"
    ):
        get_scheme("w3")


KINDS = [name for name in SCHEMES if name != "w4a16"] + ["w4a16-g32", "w4a16-g128", "w4a16-channel"]
UNITS = {"w4a16-g32": 32, "w4a16-g128": 128, "w4a16-channel": 8}  # matrices have multiples of so many columns


@pytest.mark.parametrize("name", KINDS)
def test_stored_parts_are_what_quantize_makes(name: str) -> None:
    scheme, columns = get_scheme(name), 9 * UNITS.get(name, 1)
    parts, stored = scheme.quantize(random(6, columns, 0)), scheme.stored((6, columns))
    assert parts.keys() == {part for part, kind in stored.items() if not kind.optional}
    for part, tensor in parts.items():
        assert tuple(tensor.shape) == stored[part].shapes[0]
        assert tensor.dtype in stored[part].dtypes
    weight = scheme.wrap(parts)
    assert (weight.scheme, weight.shape) == (name.partition("-")[0], (6, columns))
    assert weight.parts[next(iter(parts))] is next(iter(parts.values()))
    constants = scheme.constants((6, columns))
    assert constants.keys() <= {part for part, kind in stored.items() if kind.optional}
    assert scheme.wrap({**parts, **constants}).shape == (6, columns)


@pytest.mark.parametrize("name", KINDS)
@given(rows=sizes, columns=sizes, seed=st.integers(0, 99), data=st.data())
def test_slices_are_views_of_the_same_numbers(
    name: str, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    scheme = get_scheme(name)
    unit = UNITS.get(name, 1)
    weight = scheme.wrap(scheme.quantize(random(rows, columns * unit, seed)))
    axis = data.draw(st.integers(0, 1))
    unit = unit if axis else 1
    start = unit * data.draw(st.integers(0, weight.shape[axis] // unit - 1))
    stop = unit * data.draw(st.integers(start // unit + 1, weight.shape[axis] // unit))
    view = weight.slice(axis, start, stop)
    assert torch.equal(view.dequantize(), weight.dequantize().narrow(axis, start, stop - start))
    for part, tensor in view.parts.items():
        assert tensor.untyped_storage().data_ptr() == weight.parts[part].untyped_storage().data_ptr()


@given(rows=sizes, columns=sizes, seed=st.integers(0, 99), magnitude=magnitudes)
def test_w8a8_is_within_half_a_step_everywhere(rows: int, columns: int, seed: int, magnitude: float) -> None:
    source = random(rows, columns, seed, magnitude)
    source[0] = 0
    parts = W8A8.quantize(source)
    back = parts["weight"].double() * parts["weight_scale"].double()
    assert bool(((back - source.double()).abs() <= parts["weight_scale"].double() * (0.5 + 1e-4)).all())
    assert float(parts["weight_scale"][0]) == 0
    assert int(parts["weight"].min()) >= -127
    assert torch.equal(W8A8.wrap(parts).dequantize()[0], torch.zeros(columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_w8a8_quantizes_floats_of_any_dtype_and_sources_in_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random(33, 50, 1).to(dtype)
    whole = W8A8.quantize(source)
    monkeypatch.setattr("eightfold.quant.int8.BLOCK_BYTES", 1000)
    blocks = W8A8.quantize(source)
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)
    weight, x = W8A8.wrap(whole), random(4, 50, 2)
    assert torch.equal(weight.matmul(x)[:, :33], weight.matmul(x))


@given(tokens=sizes, rows=sizes, seed=st.integers(0, 99))
def test_w8a8_sums_are_exact(tokens: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, w = (torch.randint(-128, 128, (n, 2500), dtype=torch.int8, generator=generator) for n in (tokens, rows))
    w[0], q[0] = -128, 127
    assert torch.equal(integer_sums(q, w).double(), q.double() @ w.double().T)


def test_w8a8_activations() -> None:
    x = torch.tensor([[0.0, 0.0], [127.0, 0.5], [-254.0, 3.0], [1.0, math.inf], [math.nan, 1.0], [1e-38, 1e-40]])
    q, scale = quantize_rows(x)
    assert q[:3].tolist() == [[0, 0], [127, 0], [-127, 2]]  # half to even
    assert scale[:3].flatten().tolist() == [0.0, 1.0, 2.0]
    assert bool(scale[3:5].isnan().all())
    assert q[3:].count_nonzero() == 0
    assert float(scale[5]) == 0


def test_w8a8_matmul_is_near_the_dequantized_product() -> None:
    weight, x = quantized(30, 400), random(7, 400, 3)
    want = x @ weight.dequantize().T
    assert float((weight.matmul(x) - want).abs().max() / want.abs().max()) < 0.02
    assert torch.equal(weight.matmul(x)[3:5], weight.matmul(x[3:5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_w8a8_scales_of_any_shape_and_dtype(dtype: torch.dtype) -> None:
    parts = W8A8.quantize(random(5, 8, 0))
    column = parts["weight_scale"].to(dtype)
    first, second = (W8A8.wrap({**parts, "weight_scale": scale}) for scale in (column, column.flatten()))
    x = random(3, 8, 1)
    assert torch.equal(first.matmul(x), second.matmul(x))
    assert first.matmul(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "weight_scale is nan in row 2; it must be finite"),
        (math.inf, "weight_scale is inf in row 2; it must be finite"),
        (-0.5, "weight_scale is -0.5 in row 2; it must be positive"),
        (0.0, "weight_scale is 0 in row 2, whose weights are not all 0; it must be positive"),
    ],
)
def test_w8a8_refuses_bad_scales(value: float, message: str) -> None:
    parts = W8A8.quantize(random(5, 8, 0))
    parts["weight_scale"][2] = value
    with pytest.raises(EightfoldError, match=message):
        W8A8.wrap(parts)


def test_w8a8_offset_must_be_zero() -> None:
    parts = W8A8.quantize(random(5, 8, 0))
    W8A8.wrap({**parts, "weight_offset": torch.zeros(5, 1)})
    offset = torch.zeros(5, 1)
    offset[4] = 3
    with pytest.raises(EightfoldError, match=r"weight_offset is 3\.0 in row 4; it must be 0, as w8a8 is symmetric"):
        W8A8.wrap({**parts, "weight_offset": offset})


def test_w8a8_refuses_to_quantize_what_is_not_finite() -> None:
    source = random(5, 8, 0)
    source[3, 2] = math.nan
    with pytest.raises(EightfoldError, match="row 3 of a matrix to quantize holds an infinity or a NaN"):
        W8A8.quantize(source)


def test_dense_products_of_unlike_dtypes_are_in_fp32() -> None:
    weight = DENSE.wrap({"weight": torch.full((2, 300), 6e4, dtype=torch.float16)})
    assert bool(weight.matmul(torch.full((1, 300), 6e4, dtype=torch.float16)).isfinite().all())

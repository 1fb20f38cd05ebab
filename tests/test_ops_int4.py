"""Native products with int4 weights against the scheme's definition, in every instruction set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eightfold import _native
from eightfold.ops import Expert, Ops
from eightfold.ops.cpu import CpuOps
from eightfold.quant import Weight, get_scheme
from eightfold.quant.w4a16 import W4A16Weight
from eightfold.quantize import QuantizeConfig, quantize
from eightfold.types import EightfoldError
from tiny import Bare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows that end within a cache line, a line, a block of sums; and longer than a block.
COLUMNS = {
    "w4a16-g32": (32, 96, 416, 2208),
    "w4a16-g64": (64, 192, 2112),
    "w4a16-g128": (128, 384, 2176, 4224),
    "w4a16-channel": (8, 72, 136, 2056),
}


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def matrix(rows: int, columns: int, scheme: str, seed: int = 0, scale: torch.dtype = torch.bfloat16) -> W4A16Weight:
    kind = get_scheme(scheme)
    source = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    parts = kind.quantize(source)
    weight = kind.wrap({**parts, "weight_scale": parts["weight_scale"].to(scale)})
    assert isinstance(weight, W4A16Weight)
    return weight


def row_error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want.double()).norm(dim=1) / want.double().norm(dim=1)).max())


@pytest.mark.parametrize("scheme", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(isa: str, dtype: torch.dtype, scheme: str) -> None:
    """Near the reference with scales of each dtype; and a token's bits are the same with any others beside it."""
    ops, reference = CpuOps(dtype, threads=1, isa=isa, strict_kernels=True), Ops(dtype)
    bound = 1e-3 if dtype == torch.float16 else 1e-6  # of fp16 the reference rounds the input
    for columns in COLUMNS[scheme]:
        weights = [
            matrix(rows, columns, scheme, rows, scale) for rows, scale in zip((13, 96, 103), DTYPES, strict=True)
        ]
        handle, x = ops.prepare_linear(weights), torch.randn(150, columns)
        got = ops.linear(x, handle)
        assert row_error(got[:20], reference.linear(x[:20], weights)) < bound
        for tokens in (1, 2, 3, 4, 5, 9):
            assert torch.equal(ops.linear(x[:tokens], handle), got[:tokens])


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g128", "w4a16-channel"])
def test_parts_and_odd_addresses(isa: str, scheme: str) -> None:
    """Rows and columns as views, as ranks have them, and bytes where a file may have them."""
    whole = matrix(50, 1024, scheme)
    views = [whole.slice(0, 3, 46), whole.slice(1, 128, 640), whole.slice(1, 896, 1024)]
    for dtype in (torch.float32, torch.bfloat16):
        ops = CpuOps(dtype, threads=2, isa=isa, strict_kernels=True)
        for view in views:
            copy = W4A16Weight(view.weight_packed.clone(), view.weight_scale.clone())
            odd = W4A16Weight(moved(copy.weight_packed), moved(copy.weight_scale))
            for tokens in (1, 4, 33):
                x = torch.randn(tokens, view.shape[1])
                one, two, three = (ops.linear(x, ops.prepare_linear([w])) for w in (view, copy, odd))
                assert torch.equal(one, two)
                assert torch.equal(one, three)
                assert row_error(one, Ops(dtype).linear(x, [view])) < 1e-6


def moved(tensor: Tensor) -> Tensor:
    """The same at an odd address."""
    memory = bytearray(tensor.nbytes + 64)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64 + 1
    result = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return result.copy_(tensor)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe(isa: str, dtype: torch.dtype, scheme: str) -> None:
    ops, reference = CpuOps(dtype, threads=2, isa=isa, strict_kernels=True), Ops(dtype)
    layer = [
        Expert(*(matrix(*shape, scheme, 3 * e + i) for i, shape in enumerate(((256, 384), (384, 256), (256, 384)))))
        for e in range(4)
    ]
    handle = ops.prepare_experts(layer)
    x = torch.randn(300, 384)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(300)]).int()
    ids[40:60] = torch.tensor([3, 1])  # many tokens with the same experts
    weights = torch.rand(300, 2)
    got = ops.moe(x, ids, weights, handle)
    # What is between the two products is rounded to bf16 after sums in another order.
    assert row_error(got[:64], reference.moe(x[:64], ids[:64], weights[:64], layer)) < (
        1e-6 if dtype == torch.float32 else 5e-3
    )
    for a, b in ((0, 1), (5, 7), (40, 60), (3, 150)):
        assert torch.equal(ops.moe(x[a:b], ids[a:b], weights[a:b], handle), got[a:b])


def test_threads_change_nothing(isa: str) -> None:
    weight, x = matrix(700, 512, "w4a16-g128"), torch.randn(40, 512)
    results = []
    for threads in (1, 2):
        ops = CpuOps(torch.bfloat16, threads=threads, isa=isa)
        results.append(ops.linear(x, ops.prepare_linear([weight])))
    assert torch.equal(*results)


def test_beside_other_schemes(isa: str) -> None:
    ops = CpuOps(torch.bfloat16, threads=1, isa=isa, strict_kernels=True)
    others = [get_scheme(name).wrap(get_scheme(name).quantize(torch.randn(9, 256))) for name in ("w8a16", "w8a8")]
    weights: list[Weight] = [others[0], matrix(20, 256, "w4a16-g64"), others[1]]
    x = torch.randn(6, 256)
    want = torch.cat([ops.linear(x, ops.prepare_linear([weight])) for weight in weights], 1)
    assert torch.equal(ops.linear(x, ops.prepare_linear(weights)), want)


def test_what_is_not_finite_shows(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ops = CpuOps(dtype, threads=1, isa=isa)
        x = torch.randn(3, 256)
        x[1, 77] = torch.nan
        got = ops.linear(x, ops.prepare_linear([matrix(9, 256, "w4a16-g128")]))
        assert bool(got[1].isnan().all())
        assert bool(got[[0, 2]].isfinite().all())


def test_scales_that_no_kernel_reads_are_refused() -> None:
    weight = matrix(9, 256, "w4a16-g64")
    turned = W4A16Weight(weight.weight_packed, weight.weight_scale.T.contiguous().T)
    with pytest.raises(EightfoldError, match="no native kernel for scales whose rows are not contiguous"):
        CpuOps(strict_kernels=True).prepare_linear([turned])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model(dtype: torch.dtype, demo: Path, tmp_path: Path) -> None:
    """The engine on native kernels computes what the reference does."""
    quantize(demo, tmp_path / "w4", QuantizeConfig("w4a16"))
    ids = list(range(3, 60))
    ours, reference = (Bare(tmp_path / "w4", device, dtype).logits(ids) for device in ("cpu", "torch"))
    assert float((ours - reference).norm() / reference.norm()) < (1e-5 if dtype == torch.float32 else 0.05)

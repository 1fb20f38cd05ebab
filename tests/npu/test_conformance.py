"""The contract on the emulator: all of the doctor's checks, and that they notice a backend that computes otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulator.dispatch import CALLS
from torch import Tensor

from eightfold import doctor
from eightfold.ops import Expert, Ops, get_ops
from eightfold.ops.npu import NpuOps, attention, experts, weights
from eightfold.parallel import Ranks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = {dtype: get_ops("npu", dtype) for dtype in DTYPES}
CHECKS = [(dtype, check) for dtype in DTYPES for check in doctor.checks(BACKENDS[dtype], "npu")]


def name(value: object) -> str:
    return value.name if isinstance(value, doctor.Check) else str(value).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore:attention has no NPU kernel")
@pytest.mark.parametrize(("dtype", "check"), CHECKS, ids=name)
def test_check(dtype: torch.dtype, check: doctor.Check) -> None:
    error = check.run()
    assert error <= check.bound


def test_every_fused_operation_that_the_backend_names_ran() -> None:
    """After the checks above; `-k` that selects only this one can't see it."""
    ops = BACKENDS[torch.bfloat16]
    for check in (
        *doctor.operation_checks(ops),
        *(c for s in doctor.supported(ops) for c in doctor.product_checks(ops, s)),
    ):
        check.run()
    from eightfold.ops.npu.device import OPERATORS

    of_several_ranks = {"npu_mm_all_reduce_base"}  # test_ranks.py
    assert {op for op in OPERATORS if not CALLS.get(op)} - of_several_ranks == set()


def test_schemes_are_those_of_the_package() -> None:
    assert doctor.supported(BACKENDS[torch.bfloat16]) == [s for s in doctor.SCHEMES if s in weights.SCHEMES]
    assert doctor.supported(BACKENDS[torch.float32]) == ["dense"]


def failures(ops: Ops) -> int:
    checks = (*doctor.operation_checks(ops), *(c for s in doctor.supported(ops) for c in doctor.product_checks(ops, s)))
    return sum(not finding.good for finding in doctor.examine(iter(checks)))


def unnormalized(choose: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def wrong(logits: Tensor, k: int, fused: bool) -> tuple[Tensor, Tensor]:
        ids, shares = choose(logits, k, fused)
        return ids, shares * 0.9

    return wrong


def swapped(grouped: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, ids, shares, *rest: grouped(x, ids.flip(-1), shares, *rest)


def late(write: Callable[..., None]) -> Callable[..., None]:
    return lambda k, v, batch, pages: write(v, k, batch, pages)


def unscaled(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, *rest: attend(q * math.sqrt(q.shape[-1]), *rest)


@pytest.mark.parametrize(
    ("where", "what", "wrong"),
    [
        (experts, "choose", unnormalized),
        (experts, "grouped", swapped),
        (attention, "write", late),
        (attention, "attend", unscaled),
    ],
    ids=["shares that don't sum to 1", "shares of the other expert", "keys for values", "scores without a scale"],
)
def test_the_doctor_notices(
    where: object, what: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = NpuOps(torch.bfloat16)
    monkeypatch.setattr(where, what, wrong(getattr(where, what)))
    assert failures(ops) > 0


class Silent:
    """A group whose sums are left to the test: each rank runs alone, one after the other."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert x.device.type == "npu"  # not by way of the host
        return x


def ranks_of(rank: int, ep: int, tp: int) -> Any:
    world, moe_tp, moe_ep = Silent(rank, ep * tp), Silent(rank % tp, tp), Silent(rank // tp, ep)
    return Ranks(world, moe_tp, moe_ep)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("scheme", ["dense", "w8a8", "w8a16"])
def test_shares_of_ranks_add_up(scheme: str, ep: int, tp: int) -> None:
    """Experts shared out, their widths shared out, and a row-parallel product."""
    ops, count, width = BACKENDS[torch.bfloat16], 8, 96
    make = partial(doctor._matrix, doctor._Random(), scheme=scheme, dtype=torch.bfloat16)
    layer = [Expert(make(width, 64), make(64, width), make(width, 64)) for _ in range(count)]
    o = make(64, 128)
    x, wide = torch.randn(30, 64).bfloat16().to(ops.device), torch.randn(30, 128).bfloat16().to(ops.device)
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(30)]).int()
    ids[:10] = torch.tensor([0, 1])  # tokens of which some ranks have no expert at all
    ids, shares = ids.to(ops.device), torch.rand(30, 2).to(ops.device)
    whole = ops.moe(x, ids, shares, ops.prepare_experts(layer)).float().cpu()
    product = ops.linear(wide, ops.prepare_linear([o])).float().cpu()
    total, summed, size = torch.zeros(30, 64), torch.zeros(30, 64), ep * tp
    for rank in range(size):
        ranks, each, part = ranks_of(rank, ep, tp), count // ep, width // tp
        first, start, column = rank // tp * each, rank % tp * part, 128 // size * rank
        mine = [
            Expert(
                e.w1.slice(0, start, start + part),
                e.w2.slice(1, start, start + part),
                e.w3.slice(0, start, start + part),
            )
            for e in layer[first : first + each]
        ]
        share = SimpleNamespace(first=first, total=count, ranks=ranks)
        total += ops.moe(x, ids, shares, ops.prepare_experts(mine, share)).float().cpu()
        handle = ops.prepare_linear([o.slice(1, column, column + 128 // size)], ranks)
        summed += ops.linear(wide[:, column : column + 128 // size], handle).float().cpu()
    bound = 3e-2 if scheme == "w8a8" else 1e-2  # a rank's own scales of activations are finer than one rank's
    assert float((total - whole).norm() / whole.norm()) < bound
    assert float((summed - product).norm() / product.norm()) < bound

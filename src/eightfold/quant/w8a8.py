"""Scheme `w8a8`: int8 weights with one scale an output channel, activations quantized to int8 token by token.

    q[t, i]   = round(x[t, i] · 127 / absmax[t])          half to even, in fp32
    y[t, n]   = (Σ q[t, i] · weight[n, i]) · (absmax[t] / 127) · weight_scale[n]

The sum is an exact integer; it is rounded to fp32 and multiplied by the two scales in that order. Storage is described
in `eightfold.quant.int8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.parallel import Group
from eightfold.quant.int8 import BLOCK_BYTES, Int8Scheme, Int8Weight

EXACT_COLUMNS = 1024  # 1024 · 127 · 128 < 2^24: sums of so many products are exact in fp32
SMALLEST_ABSMAX = 1e-30  # of a row of activations; below it 127 / absmax could overflow, and the row counts as zero


@dataclass(frozen=True, slots=True)
class W8A8Weight(Int8Weight):
    scheme: ClassVar[str] = "w8a8"

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out] fp32; a row of x with an infinity or a NaN gives a row of NaNs."""
        q, scale = quantize_rows(x)
        return integer_sums(q, self.weight).float() * scale * self.weight_scale.float().T

    def matmul_shared(self, x: Tensor, group: Group) -> Tensor:
        """`matmul` of rows that are shared out: x [T, in] and the matrix are this rank's columns of them → the whole
        product [T, out] fp32, with the bits that one rank would give it.

        The ranks agree on each row's absmax, and add up integers.
        """
        q, scale = quantize_rows(x, group.all_reduce_max(row_absmax(x)))
        sums = group.all_reduce_sum(integer_sums(q, self.weight))
        return sums.float() * scale * self.weight_scale.float().T


def row_absmax(x: Tensor) -> Tensor:
    """x [T, in] → [T, 1] fp32; a NaN or an infinity in a row is its absmax."""
    return x.float().abs().amax(-1, keepdim=True)


def quantize_rows(x: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, in] → int8 [T, in] and scales [T, 1] fp32 such that q · scale is x to half a step.

    `absmax` [T, 1], where the rows go on at other ranks; else their own.
    """
    wide = x.float()
    absmax = row_absmax(x) if absmax is None else absmax
    finite = absmax.isfinite()
    empty = ~finite | (absmax < SMALLEST_ABSMAX)
    most = torch.full_like(absmax, 127.0)  # as a tensor: torch divides by or into a number by way of a reciprocal
    inverse = torch.where(empty, 0.0, most / absmax)
    q = torch.where(finite, wide, 0.0).mul(inverse).round().to(torch.int8)
    scale = torch.where(empty, 0.0, absmax / most)
    return q, torch.where(finite, scale, torch.nan)


def integer_sums(q: Tensor, weight: Tensor) -> Tensor:
    """int8 [T, in] and int8 [out, in] → the exact q · weightᵀ as int32 [T, out].

    Taken through fp32 products of some columns and rows at a time, which every device has and which bounds memory.
    """
    rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    blocks = []
    for first in range(0, len(weight), rows):
        block = weight[first : first + rows]
        total = torch.zeros(len(q), len(block), dtype=torch.int32, device=q.device)
        for start in range(0, q.shape[1], EXACT_COLUMNS):
            columns = slice(start, start + EXACT_COLUMNS)
            total += F.linear(q[:, columns].float(), block[:, columns].float()).int()
        blocks.append(total)
    return torch.cat(blocks, -1)


SCHEME = Int8Scheme(W8A8Weight)

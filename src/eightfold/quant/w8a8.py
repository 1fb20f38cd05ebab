"""Scheme `w8a8`: int8 weights with one scale an output channel, activations quantized to int8 token by token.

Stored as `weight` int8 [out, in] and `weight_scale` [out, 1] (or [out]), which is how MindIE's w8a8_dynamic and
compressed-tensors' int8 name them; a `weight_offset` may stand beside them and must be zero: the scheme is symmetric.

    q[t, i]   = round(x[t, i] · 127 / absmax[t])          half to even, in fp32
    y[t, n]   = (Σ q[t, i] · weight[n, i]) · (absmax[t] / 127) · weight_scale[n]

The sum is an exact integer; it is rounded to fp32 and multiplied by the two scales in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.quant import Part
from eightfold.types import EightfoldError

BLOCK_BYTES = 8 << 20
EXACT_COLUMNS = 1024  # 1024 · 127 · 128 < 2^24: sums of so many products are exact in fp32
SMALLEST_ABSMAX = 1e-30  # of a row of activations; below it 127 / absmax could overflow, and the row counts as zero
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class W8A8Weight:
    """A quantized matrix: int8 [out, in] and scales [out, 1]."""

    weight: Tensor
    weight_scale: Tensor
    scheme: str = "w8a8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight, "weight_scale": self.weight_scale}

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out] fp32; a row of x with an infinity or a NaN gives a row of NaNs."""
        q, scale = quantize_rows(x)
        return integer_sums(q, self.weight).float() * scale * self.weight_scale.float().T

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.weight_scale.float()

    def slice(self, axis: int, start: int, stop: int) -> W8A8Weight:
        weight = self.weight.narrow(axis, start, stop - start)
        return W8A8Weight(weight, self.weight_scale.narrow(0, start, stop - start) if axis == 0 else self.weight_scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, in] → int8 [T, in] and scales [T, 1] fp32 such that q · scale is x to half a step."""
    wide = x.float()
    absmax = wide.abs().amax(-1, keepdim=True)
    finite = absmax.isfinite()  # a NaN or an infinity in a row is its absmax
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


class W8A8Scheme:
    name = "w8a8"

    def stored(self, shape: tuple[int, int]) -> dict[str, Part]:
        per_channel = ((shape[0], 1), (shape[0],))
        return {
            "weight": Part((shape,), (torch.int8,)),
            "weight_scale": Part(per_channel, SCALE_DTYPES),
            "weight_offset": Part(per_channel, (*SCALE_DTYPES, torch.int8, torch.int32), optional=True),
        }

    def wrap(self, parts: Mapping[str, Tensor]) -> W8A8Weight:
        """A weight over stored tensors. Raises EightfoldError on a scale that is NaN, infinite or negative, on a zero
        scale of a row that is not zero, and on an offset other than zero."""
        weight, scale = parts["weight"], parts["weight_scale"].reshape(-1)
        wide = scale.float()
        _refuse(~wide.isfinite(), wide, "weight_scale", "finite")
        _refuse(wide < 0, wide, "weight_scale", "positive")
        for row in (wide == 0).nonzero().flatten().tolist():
            if weight[row].any():
                raise EightfoldError(
                    f"weight_scale is 0 in row {row}, whose weights are not all 0; it must be positive"
                )
        if (offset := parts.get("weight_offset")) is not None:
            flat = offset.reshape(-1).float()
            _refuse(flat != 0, flat, "weight_offset", "0, as w8a8 is symmetric")
        return W8A8Weight(weight, scale[:, None])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """A float matrix [out, in] → int8 and scales absmax / 127, which give it back to half a step.

        Raises EightfoldError if a value is not finite.
        """
        rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
        quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
        smallest = torch.finfo(torch.float32).tiny  # a smaller scale would have too few bits to divide by
        for start in range(0, len(weight), rows):
            wide = weight[start : start + rows].float()
            absmax = wide.abs().amax(1, keepdim=True)
            if not bool(absmax.isfinite().all()):
                row = start + int((~absmax.isfinite()).flatten().nonzero()[0])
                raise EightfoldError(
                    f"row {row} of a matrix to quantize holds an infinity or a NaN; weights must be finite"
                )
            scale = (absmax / 127.0).clamp(min=smallest)
            quantized[start : start + rows] = (wide / scale).round().clamp(-127, 127)
            scales[start : start + rows] = torch.where(absmax == 0, 0.0, scale)
        return {"weight": quantized, "weight_scale": scales}


def _refuse(bad: Tensor, values: Tensor, name: str, right: str) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise EightfoldError(f"{name} is {float(values[row])} in row {row}; it must be {right}")


SCHEME = W8A8Scheme()

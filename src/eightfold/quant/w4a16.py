"""Scheme `w4a16`: int4 weights with a scale for each group of inputs, activations in the compute dtype.

    w[n, i]  = q[n, i] · weight_scale[n, i // group]      q in -8 … 7; rounded to bf16 where the activations are bf16
    y[t, n]  = Σ x[t, i] · w[n, i]                        sums are fp32

Stored as compressed-tensors' "pack-quantized" has it: `weight_packed` int32 [out, in / 8] holds q + 8 in 4 bits each,
the first of eight in the lowest; `weight_scale` [out, in / group], or [out, 1] where a row is one group; and
`weight_shape`, which is (out, in). The group is part of a scheme's full name: "w4a16-g128", "w4a16-channel".

A scale is searched for: of several that clip more or less of the group's largest weight, and then are fitted to the
integers by least squares, the one with the smallest squared error is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.quant import Part
from eightfold.quant.int8 import SCALE_DTYPES
from eightfold.quant_config import W4A16_GROUPS, w4a16_group, w4a16_name
from eightfold.types import EightfoldError

BLOCK_BYTES = 2 << 20  # of rows in fp32: they stay in a core's cache
PACKED = 8  # numbers of an int32
ZERO = 8  # what is stored for a weight of 0
STEPS = tuple(7 + half / 2 for half in range(10))  # that a group's largest weight may measure; beyond 7 it is clipped


@dataclass(frozen=True, slots=True)
class W4A16Weight:
    """A matrix [out, in] in int4; `group` divides `in`."""

    weight_packed: Tensor  # [out, in / 8] int32
    weight_scale: Tensor  # [out, in / group]
    scheme: ClassVar[str] = "w4a16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_packed.shape[0], self.weight_packed.shape[1] * PACKED

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.shape[1] // self.weight_scale.shape[1]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"weight_packed": self.weight_packed, "weight_scale": self.weight_scale}

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out] fp32. Rows of the weight are widened a block at a time."""
        wide = x.float()
        rows = max(1, BLOCK_BYTES // (4 * self.shape[1]))
        sums = []
        for start in range(0, self.shape[0], rows):
            block = self.slice(0, start, min(start + rows, self.shape[0])).dequantize()
            sums.append(F.linear(wide, block.bfloat16().float() if x.dtype == torch.bfloat16 else block))
        return torch.cat(sums, -1)

    def dequantize(self) -> Tensor:
        scale = self.weight_scale.float().repeat_interleave(self.group, 1)
        return unpack(self.weight_packed).float() * scale

    def slice(self, axis: int, start: int, stop: int) -> W4A16Weight:
        """Rows or columns as a view. Raises EightfoldError where columns would be cut within a group."""
        if axis == 0:
            size = stop - start
            return W4A16Weight(self.weight_packed.narrow(0, start, size), self.weight_scale.narrow(0, start, size))
        one_group = self.weight_scale.shape[1] == 1
        unit = PACKED if one_group else self.group
        if start % unit or stop % unit:
            raise EightfoldError(f"columns {start} … {stop} cut a group; a w4a16 matrix is cut at multiples of {unit}")
        packed = self.weight_packed.narrow(1, start // PACKED, (stop - start) // PACKED)
        scale = self.weight_scale if one_group else self.weight_scale.narrow(1, start // unit, (stop - start) // unit)
        return W4A16Weight(packed, scale)


class W4A16Scheme:
    """The stored form with groups of `group` inputs, or one a row where it is None."""

    def __init__(self, group: int | None) -> None:
        self.name = w4a16_name(group)
        self.group = group

    def stored(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Raises EightfoldError if `in` is not a whole number of groups."""
        rows, columns = shape
        unit = self.group or PACKED
        if columns % unit:
            fits = [str(group) for group in W4A16_GROUPS if columns % group == 0]
            right = f"a group of {' or '.join(fits)} would do" if fits else "no group divides it: w4a16 does not fit"
            raise EightfoldError(f"a matrix of {columns} inputs is not made of groups of {unit}; {right}")
        return {
            "weight_packed": Part(((rows, columns // PACKED),), (torch.int32,)),
            "weight_scale": Part(
                ((rows, columns // self.group if self.group else 1),), (torch.bfloat16, *SCALE_DTYPES)
            ),
            "weight_shape": Part(((2,),), (torch.int64, torch.int32), optional=True),
        }

    def constants(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {"weight_shape": torch.tensor(shape)}

    def wrap(self, parts: Mapping[str, Tensor]) -> W4A16Weight:
        """A weight over stored tensors. Raises EightfoldError on a scale that is NaN, infinite or negative, and on a
        weight_shape that is not that of the others."""
        weight = W4A16Weight(parts["weight_packed"], parts["weight_scale"])
        stated = tuple(parts["weight_shape"].tolist()) if "weight_shape" in parts else weight.shape
        if stated != weight.shape:
            raise EightfoldError(f"weight_shape is {list(stated)}; its packed weights are {list(weight.shape)}")
        for block in torch.split(weight.weight_scale, 1024):
            good = (block >= 0) & (block != torch.inf)
            if not bool(good.all()):
                value = float(block[~good][0])
                row = int((~(weight.weight_scale >= 0) | weight.weight_scale.isinf()).any(1).nonzero()[0])
                raise EightfoldError(f"weight_scale is {value} in row {row}; it must be finite and not negative")
        return weight

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """A float matrix [out, in] → int4 and bf16 scales. Raises EightfoldError if a value is not finite."""
        kinds = self.stored((weight.shape[0], weight.shape[1]))
        made = {
            part: torch.empty(kinds[part].shapes[0], dtype=kinds[part].dtypes[0], device=weight.device)
            for part in ("weight_packed", "weight_scale")
        }
        rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
        for start in range(0, len(weight), rows):
            wide = weight[start : start + rows].float()
            bad = ~wide.isfinite().all(1)
            if bool(bad.any()):
                row = start + int(bad.nonzero()[0])
                raise EightfoldError(
                    f"row {row} of a matrix to quantize holds an infinity or a NaN; weights must be finite"
                )
            grouped = wide.view(len(wide), -1, self.group or weight.shape[1])
            q, scale = _fit(grouped)
            made["weight_packed"][start : start + rows] = pack(q.view(wide.shape))
            made["weight_scale"][start : start + rows] = scale
        return made


def pack(q: Tensor) -> Tensor:
    """Whole numbers -8 … 7 [out, in] → int32 [out, in / 8]."""
    stored = (q.to(torch.int32) + ZERO).view(len(q), -1, PACKED)
    packed = torch.zeros(stored.shape[:2], dtype=torch.int32, device=q.device)
    for number in range(PACKED):
        packed |= stored[..., number] << 4 * number
    return packed


def unpack(packed: Tensor) -> Tensor:
    """int32 [out, in / 8] → int8 [out, in]."""
    shifts = torch.arange(0, 4 * PACKED, 4, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts & 15) - ZERO).to(torch.int8).flatten(1)


def _fit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, groups, group] fp32 → whole numbers of that shape as fp32, and bf16 scales [out, groups]."""
    absmax = weight.abs().amax(-1, keepdim=True)
    largest = absmax.clamp(min=torch.finfo(torch.float32).tiny)
    unit = weight / largest  # so that squares neither overflow nor vanish
    best_q, best_scale, best_gain = torch.zeros_like(weight), torch.zeros_like(absmax), torch.zeros_like(absmax)
    for steps in STEPS:
        q = (unit * steps).round_().clamp_(-8, 7)
        squares = (q * q).sum(-1, keepdim=True)
        products = (unit * q).sum(-1, keepdim=True)
        scale = (products / squares.clamp(min=1) * absmax).bfloat16().float()
        fitted = scale / largest
        gain = fitted * (2 * products - fitted * squares)  # by how much the squared error is below that of zeros
        better = gain > best_gain
        best_q = torch.where(better, q, best_q)
        best_scale = torch.where(better, scale, best_scale)
        best_gain = torch.where(better, gain, best_gain)
    return best_q, best_scale.squeeze(-1).bfloat16()


def scheme(name: str) -> W4A16Scheme:
    """The scheme of a full name; "w4a16" alone has the usual group."""
    return W4A16Scheme(w4a16_group(name))

"""What the int8 schemes share: how their matrices are stored, checked, sliced and made.

Stored are `weight` int8 [out, in] and `weight_scale` [out, 1] (or [out]), as MindIE and compressed-tensors' int8
name them; a `weight_offset` may stand beside them and must be zero: the schemes are symmetric.

    weight_scale[n] = (max over i of |w[n, i]|) / 127
    weight[n, i]    = round(w[n, i] / weight_scale[n])    half to even, in fp32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from eightfold.quant import Part
from eightfold.types import EightfoldError

BLOCK_BYTES = 8 << 20
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A quantized matrix: int8 [out, in] and scales [out, 1]. A scheme's own class adds its name and its product."""

    scheme: ClassVar[str]
    weight: Tensor
    weight_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight, "weight_scale": self.weight_scale}

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.weight_scale.float()

    def slice(self: W, axis: int, start: int, stop: int) -> W:
        weight = self.weight.narrow(axis, start, stop - start)
        return type(self)(weight, self.weight_scale.narrow(0, start, stop - start) if axis == 0 else self.weight_scale)


W = TypeVar("W", bound=Int8Weight)


class Int8Scheme(Generic[W]):
    """The stored form of a scheme whose weights are of class `weight`."""

    def __init__(self, weight: type[W]) -> None:
        self.name = weight.scheme
        self._weight = weight

    def stored(self, shape: tuple[int, int]) -> dict[str, Part]:
        per_channel = ((shape[0], 1), (shape[0],))
        return {
            "weight": Part((shape,), (torch.int8,)),
            "weight_scale": Part(per_channel, SCALE_DTYPES),
            "weight_offset": Part(per_channel, (*SCALE_DTYPES, torch.int8, torch.int32), optional=True),
        }

    def wrap(self, parts: Mapping[str, Tensor]) -> W:
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
            _refuse(flat != 0, flat, "weight_offset", f"0, as {self.name} is symmetric")
        return self._weight(weight, scale[:, None])

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

    def constants(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {}


def _refuse(bad: Tensor, values: Tensor, name: str, right: str) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise EightfoldError(f"{name} is {float(values[row])} in row {row}; it must be {right}")

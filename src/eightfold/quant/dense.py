"""Scheme `dense`: weights as floats (fp32, bf16 or fp16), used as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.quant import Part

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A float matrix [out, in]."""

    weight: Tensor
    scheme: str = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out] fp32; a product of unlike dtypes is done in fp32, which holds each exactly.

        Rows are widened a block at a time: a whole lm_head in fp32 would cost half a gigabyte.
        """
        if x.dtype == self.weight.dtype != torch.float16:  # products in fp16 would overflow
            return F.linear(x, self.weight).float()
        wide = x.float()
        rows = max(1, BLOCK_BYTES // (4 * self.shape[1]))
        return torch.cat([F.linear(wide, block.float()) for block in torch.split(self.weight, rows)], -1)

    def dequantize(self) -> Tensor:
        return self.weight.float()

    def slice(self, axis: int, start: int, stop: int) -> DenseWeight:
        return DenseWeight(self.weight.narrow(axis, start, stop - start))


class DenseScheme:
    name = "dense"

    def stored(self, shape: tuple[int, int]) -> dict[str, Part]:
        return {"weight": Part((shape,), DTYPES)}

    def wrap(self, parts: Mapping[str, Tensor]) -> DenseWeight:
        return DenseWeight(parts["weight"])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def constants(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {}


SCHEME = DenseScheme()

"""Scheme `w8a16`: int8 weights with one scale an output channel, activations in the compute dtype.

    y[t, n] = (Σ x[t, i] · weight[n, i]) · weight_scale[n]

Every int8 is exact in bf16, fp16 and fp32, so the weights enter the product as they are stored; sums are fp32, and the
scale comes after them. How weights are stored is in `eightfold.quant.int8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.quant.int8 import BLOCK_BYTES, Int8Scheme, Int8Weight


@dataclass(frozen=True, slots=True)
class W8A16Weight(Int8Weight):
    scheme: ClassVar[str] = "w8a16"

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, in] → [T, out] fp32. Rows of the weight are widened a block at a time."""
        wide = x.float()
        rows = max(1, BLOCK_BYTES // (4 * self.shape[1]))
        sums = [F.linear(wide, block.float()) for block in torch.split(self.weight, rows)]
        return torch.cat(sums, -1) * self.weight_scale.float().T


SCHEME = Int8Scheme(W8A16Weight)

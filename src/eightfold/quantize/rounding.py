"""Rows of floats → the parts of a scheme: by a native kernel where there is one, else by the scheme itself.

The kernel gives the same bits as `eightfold.quant.int8` and reads each number from memory once; torch goes over a
block seven times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eightfold import _native
from eightfold.quant import Scheme
from eightfold.quant.int8 import Int8Scheme

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def round_rows(scheme: Scheme, rows: Tensor, isa: str = "") -> dict[str, Tensor] | None:
    """rows [n, in] → what `scheme.quantize` makes of them; None if one of them is not finite.

    `isa` names a kernel variant, by default the best that the processor can run.
    """
    if not isinstance(scheme, Int8Scheme) or rows.dtype not in _CODES or rows.stride(1) != 1:
        return scheme.quantize(rows) if bool(rows.isfinite().all()) else None
    made = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(len(rows), 1)
    count, columns = rows.shape
    bad = _native.round_rows(
        rows.data_ptr(), _CODES[rows.dtype], count, columns, rows.stride(0), made.data_ptr(), scales.data_ptr(), isa
    )
    return {"weight": made, "weight_scale": scales} if bad < 0 else None

"""Constraints of the operations that communicate: products that add up over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emulator import collectives
from emulator.host import need
from emulator.rules import HALVES, INNER_LIMIT, dtype_in, only, plain, rule, shape_is


@rule("npu_mm_all_reduce_base")
def _mm_all_reduce(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    reduce_op: str,
    antiquant_scale: Tensor | None,
    antiquant_offset: Tensor | None,
    dequant_scale: Tensor | None,
    pertoken_scale: Tensor | None,
    **other: Any,
) -> None:
    op = "npu_mm_all_reduce_base"
    only(op, other, antiquant_group_size=0, comm_turn=0, comm_quant_mode=0)
    need(reduce_op == "sum", op, f"reduce_op is {reduce_op!r}; only sum is supported")
    size = collectives.size_of(hcom)
    need(size > 0, op, f"hcom is {hcom!r}, which names no communicator")
    need(size in (1, 2, 4, 8), op, f"{size} ranks; 1, 2, 4 and 8 are supported")
    need(x1.dim() == x2.dim() == 2, op, "x1 and x2 are matrices here")
    need(x1.numel() > 0 and x2.numel() > 0, op, "x1 and x2 must not be empty")
    need(x1.shape[1] == x2.shape[0], op, f"x1 has {x1.shape[1]} columns but x2 {x2.shape[0]} rows")
    need(x1.is_contiguous(), op, "x1 can't be transposed")
    plain(op, x1=x1)
    n = x2.shape[1]
    if x1.dtype == torch.int8:
        dtype_in(op, "x2", x2, (torch.int8,))
        need(antiquant_scale is None and antiquant_offset is None, op, "antiquant is for float x1")
        need(x1.shape[1] <= INNER_LIMIT, op, f"K is at most {INNER_LIMIT}")
        need(n <= INNER_LIMIT or not x2.is_contiguous(), op, f"N is at most {INNER_LIMIT}, but for a transposed x2")
        need(dequant_scale is not None and pertoken_scale is not None, op, "int8 by tokens needs both scales")
        assert dequant_scale is not None and pertoken_scale is not None
        dtype_in(op, "dequant_scale", dequant_scale, (torch.bfloat16, torch.float32))
        need(tuple(dequant_scale.shape) in ((n,), (1, n)), op, f"dequant_scale is [{n}] or [1, {n}]")
        dtype_in(op, "pertoken_scale", pertoken_scale, (torch.float32,))
        shape_is(op, "pertoken_scale", pertoken_scale, (x1.shape[0],))
        plain(op, dequant_scale=dequant_scale, pertoken_scale=pertoken_scale)
        return
    dtype_in(op, "x1", x1, HALVES)
    need(dequant_scale is None and pertoken_scale is None, op, "dequant_scale and pertoken_scale are for int8 x1")
    if x2.dtype != torch.int8:
        need(x2.dtype == x1.dtype, op, f"x2 is {x2.dtype} beside x1 of {x1.dtype}")
        need(antiquant_scale is None and antiquant_offset is None, op, "antiquant is for int8 x2")
        return
    need(max(x2.shape) <= INNER_LIMIT, op, f"K and N are at most {INNER_LIMIT}")
    need(antiquant_scale is not None, op, "int8 x2 beside float x1 needs antiquant_scale")
    for name, values in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        if values is not None:
            need(values.dtype == x1.dtype, op, f"{name} is {values.dtype} beside x1 of {x1.dtype}")
            need(tuple(values.shape) in ((n,), (1, n)), op, f"{name} is [{n}] or [1, {n}]")
            plain(op, **{name: values})

"""Constraints of the operations of the mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emulator.host import NZ, format_of, is_fake, need
from emulator.rules import FLOATS, HALVES, as_dtype, dtype_in, on_310p, only, plain, rule, shape_is

INNER_LIMIT = 65536
MOST_GROUPS = 1024


@rule("npu_moe_init_routing_v2")
def _init_routing(
    x: Tensor,
    expert_idx: Tensor,
    active_num: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
    **other: Any,
) -> None:
    op = "npu_moe_init_routing_v2"
    only(op, other, expert_capacity=-1)
    need(x.dim() == 2 and expert_idx.dim() == 2 and len(x) == len(expert_idx), op, "x is [T, H] and expert_idx [T, K]")
    dtype_in(op, "x", x, (*FLOATS, torch.int8))
    dtype_in(op, "expert_idx", expert_idx, (torch.int32,))
    rows = expert_idx.numel()
    need(active_num in (-1, 0) or active_num >= rows, op, f"active_num {active_num} would drop some of {rows} rows")
    need(0 < expert_num <= 10240, op, f"expert_num is {expert_num}")
    need(drop_pad_mode == 0, op, "drop_pad_mode is 0 only")
    need(expert_tokens_num_type == 1 and expert_tokens_num_flag, op, "counts are asked for: type 1, flag True")
    need(quant_mode in (-1, 1), op, f"quant_mode is {quant_mode}; it must be -1 or 1")
    need(quant_mode == -1 or x.dtype in HALVES, op, f"x of {x.dtype} is not quantized")
    need(len(active_expert_range) == 2, op, "active_expert_range is [first, end]")
    first, end = active_expert_range
    need(0 <= first < end <= expert_num, op, f"active_expert_range {active_expert_range} is not within {expert_num}")
    need(row_idx_type == 0, op, f"row_idx_type {row_idx_type} is not modelled")
    plain(op, x=x, expert_idx=expert_idx)


@rule("npu_grouped_matmul")
def _grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    scale: list[Tensor] | None,
    antiquant_scale: list[Tensor] | None,
    antiquant_offset: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
    group_list: Tensor | None,
    split_item: int,
    group_type: int,
    group_list_type: int,
    output_dtype: Any,
    **other: Any,
) -> None:
    op = "npu_grouped_matmul"
    only(op, other, act_type=0)
    need(len(x) == len(weight) == 1, op, "one x and one weight [E, K, N] are modelled")
    (left,), (right,) = x, weight
    need(group_type == 0, op, f"group_type is {group_type}; groups of rows are 0")
    need(split_item in (2, 3), op, f"split_item is {split_item}; one result is 2 or 3")
    need(left.dim() == 2, op, "x is a matrix")
    need(right.dim() == 3, op, f"a single weight is [E, K, N], not of {right.dim()} axes")
    experts, k, n = right.shape
    if right.dtype == torch.int32:
        n *= 8  # of int4
    need(left.shape[1] == k, op, f"x has {left.shape[1]} columns, the weight {k} rows")
    need(max(left.shape[1], n) < INNER_LIMIT, op, f"last axes are below {INNER_LIMIT}")
    need(group_list is not None, op, "group_list must be given")
    assert group_list is not None
    dtype_in(op, "group_list", group_list, (torch.int64,))
    shape_is(op, "group_list", group_list, (experts,))
    need(experts <= MOST_GROUPS, op, f"at most {MOST_GROUPS} groups")
    need(group_list_type in (0, 1), op, f"group_list_type is {group_list_type}")
    need(left.is_contiguous(), op, "x can't be transposed")
    plain(op, x=left, group_list=group_list)
    if on_310p():
        need(
            left.dtype == right.dtype == torch.float16 and n % 16 == 0, op, "Ascend310P has float16, N a multiple of 16"
        )
    if left.dtype == torch.int8:
        _by_tokens(op, left, right, scale, per_token_scale, output_dtype)
        need(antiquant_scale is None and antiquant_offset is None, op, "antiquant is for float x")
        return
    need(scale is None and per_token_scale is None, op, "scale and per_token_scale are for int8 x")
    need(output_dtype is None or as_dtype(op, output_dtype) == left.dtype, op, "the result has x's dtype")
    if right.dtype not in (torch.int8, torch.int32):
        dtype_in(op, "x", left, FLOATS)
        need(right.dtype == left.dtype, op, f"weight is {right.dtype} beside x of {left.dtype}")
        need(antiquant_scale is None and antiquant_offset is None, op, "antiquant is for int8 weights")
        return
    dtype_in(op, "x", left, HALVES)
    for name, values in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        need(values is not None and len(values) == 1, op, f"integer weights beside float x need one {name}")
        assert values is not None
        need(values[0].dtype == left.dtype, op, f"{name} has the dtype of x")
        if right.dtype == torch.int32 and values[0].dim() == 3:
            groups = values[0].shape[1]
            need(groups > 0 and k % groups == 0, op, f"{groups} groups divide the weight's {k} rows")
            shape_is(op, name, values[0], (experts, groups, n))
        else:
            shape_is(op, name, values[0], (experts, n))
    need(right.dtype == torch.int8 or right.is_contiguous(), op, "a transposed weight of int4 is not modelled")


def _by_tokens(op: str, x: Tensor, weight: Tensor, scale: Any, per_token: Any, output_dtype: Any) -> None:
    experts, _, n = weight.shape
    dtype_in(op, "weight", weight, (torch.int8,))
    need(scale is not None and len(scale) == 1, op, "int8 needs one scale")
    need(per_token is not None and len(per_token) == 1, op, "int8 by tokens needs one per_token_scale")
    shape_is(op, "scale", scale[0], (experts, n))
    dtype_in(op, "per_token_scale", per_token[0], (torch.float32,))
    shape_is(op, "per_token_scale", per_token[0], (x.shape[0],))
    result = as_dtype(op, output_dtype)
    pair = (scale[0].dtype, result)
    pairs = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))
    need(pair in pairs, op, f"scale and result are {pair}; documented are {pairs}")


@rule("npu_grouped_matmul_swiglu_quant")
def _fused(x: Tensor, weight: Tensor, group_list: Tensor, weight_scale: Tensor, x_scale: Tensor, **other: Any) -> None:
    op = "npu_grouped_matmul_swiglu_quant"
    only(op, other)
    dtype_in(op, "x", x, (torch.int8,))
    dtype_in(op, "weight", weight, (torch.int8,))
    need(x.dim() == 2 and weight.dim() == 3, op, "x is [rows, K] and weight, in NZ layout, [E, K, N]")
    need(is_fake(weight) or format_of(weight) == NZ, op, "weight is taken for NZ whatever it is: cast it")
    experts, k, n = weight.shape
    need(x.shape[1] == k, op, f"x has {x.shape[1]} columns, the weight {k} rows")
    need(n <= 10240 and n % 2 == 0, op, f"N is even and at most 10240, not {n}")
    need(k < INNER_LIMIT, op, f"K is below {INNER_LIMIT}")
    dtype_in(op, "group_list", group_list, (torch.int64,))
    shape_is(op, "group_list", group_list, (experts,))
    dtype_in(op, "weight_scale", weight_scale, FLOATS)
    shape_is(op, "weight_scale", weight_scale, (experts, n))
    dtype_in(op, "x_scale", x_scale, (torch.float32,))
    shape_is(op, "x_scale", x_scale, (x.shape[0],))
    plain(op, x=x, group_list=group_list, weight_scale=weight_scale, x_scale=x_scale)

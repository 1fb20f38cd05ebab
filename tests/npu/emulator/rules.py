"""The constraints that torch_npu documents for its operations, as far as shapes, dtypes and layouts tell.

They look at metadata only, so they hold for fake tensors of true model sizes as well. Each is from the operation's
text in `torch_npu/_op_plugin_docs.py`, and from the samples there where the text is silent; what needs values is
asserted by the references in `kernels`. The real shape functions of torch_npu check little of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emulator.host import NZ, Mistake, format_of, is_fake, need

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)
INNER_LIMIT = 65535
RULES: dict[str, Callable[..., None]] = {}

# What the documentation lists for Atlas inference products (Ascend310P); everything else is for A2 and A3 alone.
ON_310P = {
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_apply_rotary_pos_emb",
    "npu_weight_quant_batchmatmul",
    "npu_quant_matmul",
    "npu_grouped_matmul",
    "npu_format_cast",
    "_npu_reshape_and_cache",
    "_npu_paged_attention",
}


def on_310p() -> bool:
    return os.environ.get("NPU_SIM_SOC", "").startswith("Ascend310P")


def rule(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(function: Callable[..., None]) -> Callable[..., None]:
        RULES[name] = function
        return function

    return add


def bind(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, defaults filled in."""
    bound = {}
    for number, argument in enumerate(operator._schema.arguments):
        if number < len(args):
            bound[argument.name] = args[number]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def check(name: str, bound: dict[str, Any]) -> None:
    """Raises Mistake if a call of an operation breaks a constraint, or if it has no rules."""
    if name not in RULES:
        raise Mistake(f"{name} has no rules in tests/npu/emulator; write down what its documentation asks for")
    if on_310p():
        need(name in ON_310P, name, "Ascend310P does not have it")
        for value in bound.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, Tensor):
                    need(tensor.dtype != torch.bfloat16, name, "Ascend310P has no bfloat16")
    RULES[name](**bound)


def only(operation: str, given: dict[str, Any], **expected: Any) -> None:
    """Every argument that the emulator does not model must have its default."""
    for name, value in given.items():
        given_one = isinstance(value, (Tensor, list)) and value is not expected.get(name)
        what = "a value" if given_one else repr(value)
        need(not given_one and value == expected.get(name), operation, f"{name} is {what}, which is not modelled")


def dtype_in(operation: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    need(tensor.dtype in dtypes, operation, f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")


def shape_is(operation: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    need(tuple(tensor.shape) == shape, operation, f"{name} is {list(tensor.shape)}; it must be {list(shape)}")


def contiguous(operation: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        need(tensor.is_contiguous(), operation, f"{name} must be contiguous")


def plain(operation: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            need(format_of(tensor) != NZ, operation, f"{name} has the NZ layout; it must be ND")


@rule("npu_rms_norm")
def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> None:
    op = "npu_rms_norm"
    dtype_in(op, "input", input, FLOATS)
    need(gamma.dtype == input.dtype, op, f"gamma is {gamma.dtype} beside an input of {input.dtype}")
    need(2 <= input.dim() <= 8, op, "input has 2 to 8 axes")
    shape_is(op, "gamma", gamma, tuple(input.shape[-gamma.dim() :]))
    need(epsilon > 0, op, "epsilon must be positive")
    plain(op, input=input, gamma=gamma)


@rule("npu_add_rms_norm")
def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> None:
    need(x1.shape == x2.shape and x1.dtype == x2.dtype, "npu_add_rms_norm", "x1 and x2 have one shape and dtype")
    _rms_norm(x1, gamma, epsilon)


@rule("npu_dynamic_quant")
def _dynamic_quant(
    input: Tensor, smooth_scales: Any, group_index: Any, dst_type: Any, quant_mode: str, dst_type_max: float
) -> None:
    op = "npu_dynamic_quant"
    dtype_in(op, "input", input, HALVES)
    need(input.dim() > 1, op, "input has more than one axis")
    only(op, {"smooth_scales": smooth_scales, "group_index": group_index, "dst_type": dst_type})
    need(quant_mode == "pertoken" and dst_type_max == 0, op, "only quantization by tokens is modelled")
    plain(op, input=input)


@rule("npu_quant_matmul")
def _quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor | None, output_dtype: Any, **other: Any
) -> None:
    op = "npu_quant_matmul"
    only(op, other)
    dtype_in(op, "x1", x1, (torch.int8,))
    dtype_in(op, "x2", x2, (torch.int8,))
    need(x1.dim() == x2.dim() == 2, op, "x1 and x2 are matrices here")
    need(x1.numel() > 0 and x2.numel() > 0, op, "x1, x2 and scale must not be empty")
    need(x1.shape[1] == x2.shape[0], op, f"x1 has {x1.shape[1]} columns but x2 {x2.shape[0]} rows")
    need(max(x1.shape[1], x2.shape[1]) <= INNER_LIMIT, op, f"last axes are at most {INNER_LIMIT}")
    dtype_in(op, "scale", scale, (torch.float32, torch.bfloat16))
    need(scale.dim() == 1 and scale.shape[0] in (1, x2.shape[1]), op, f"scale has 1 axis, of 1 or {x2.shape[1]}")
    need(pertoken_scale is not None, op, "only quantization by tokens is modelled")
    assert pertoken_scale is not None
    need(not on_310p(), op, "Ascend310P has no pertoken_scale")
    dtype_in(op, "pertoken_scale", pertoken_scale, (torch.float32,))
    shape_is(op, "pertoken_scale", pertoken_scale, (x1.shape[0],))
    result = as_dtype(op, output_dtype)
    need(result in HALVES, op, f"with pertoken_scale the result is float16 or bfloat16, not {result}")
    need(result == torch.bfloat16 or scale.dtype == torch.float32, op, "beside float16 results the scale is float32")
    plain(op, x1=x1, scale=scale, pertoken_scale=pertoken_scale)


@rule("npu_weight_quant_batchmatmul")
def _weight_quant(x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_group_size: int, **other: Any) -> None:
    op, group = "npu_weight_quant_batchmatmul", antiquant_group_size
    only(op, other, inner_precise=0)
    dtype_in(op, "x", x, HALVES)
    dtype_in(op, "weight", weight, (torch.int8,) if on_310p() else (torch.int8, torch.int32))
    int4 = weight.dtype == torch.int32
    need(not int4 or weight.is_contiguous(), op, "a transposed weight of int4 is not modelled")
    need(not group or not on_310p(), op, "Ascend310P has no groups")
    need(not group or (group % 32 == 0 and 32 <= group < x.shape[1]), op, f"groups of {group}: 32 to K - 1, by 32")
    need(x.dim() == weight.dim() == 2, op, "x and weight are matrices")
    need(x.numel() > 0, op, "x must not be empty")
    need(x.shape[1] == weight.shape[0], op, f"x has {x.shape[1]} columns but weight {weight.shape[0]} rows")
    need(max(weight.shape) <= INNER_LIMIT, op, f"K and N are at most {INNER_LIMIT}")
    need(antiquant_scale.dtype == x.dtype, op, f"antiquant_scale is {antiquant_scale.dtype} beside x of {x.dtype}")
    n = weight.shape[1] * (8 if int4 else 1)
    need(n <= INNER_LIMIT, op, f"N is at most {INNER_LIMIT}")
    allowed = ((-(-x.shape[1] // group), n),) if group else ((n,), (1, n))
    need(tuple(antiquant_scale.shape) in allowed, op, f"antiquant_scale is one of {allowed}")
    plain(op, x=x, weight=weight, antiquant_scale=antiquant_scale)  # NZ weights run in graphs only


@rule("npu_convert_weight_to_int4pack")
def _int4pack(weight: Tensor, inner_k_tiles: int) -> None:
    op = "npu_convert_weight_to_int4pack"
    need(inner_k_tiles == 0, op, "inner_k_tiles is reserved")
    dtype_in(op, "weight", weight, (torch.int32,))
    need(weight.dim() == 2 and weight.shape[1] % 8 == 0, op, "weight is a matrix, its last axis a multiple of 8")
    contiguous(op, weight=weight)


@rule("npu_format_cast")
def _format_cast(input: Tensor, acl_format: int, **other: Any) -> None:
    op = "npu_format_cast"
    only(op, other)
    need(acl_format == NZ, op, f"format {acl_format} is not modelled")
    need(input.dim() >= 2 and input.is_contiguous(), op, "input is a contiguous matrix or stack of matrices")


@rule("npu_rotary_mul")
def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Any) -> None:
    op = "npu_rotary_mul"
    only(op, {"rotate": rotate})
    need(rotary_mode in ("half", "interleave"), op, f"rotary_mode is {rotary_mode!r}; it must be half or interleave")
    for name, tensor in (("input", input), ("r1", r1), ("r2", r2)):
        dtype_in(op, name, tensor, FLOATS)
        need(tensor.dim() == 4, op, f"{name} has 4 axes")
    need(r1.dtype == r2.dtype == input.dtype, op, "input, r1 and r2 have one dtype")
    b, s, n, d = input.shape  # read as BSND
    need(d < 896 and d % 2 == 0, op, f"the head size is even and below 896, not {d}")
    need(n < 1000 and b < 1000, op, "batch and heads are below 1000")
    need(b * n < 1000 or rotary_mode == "half", op, "batch · heads is below 1000 when interleaved")
    for name, tensor in (("r1", r1), ("r2", r2)):
        allowed = ((1, s, 1, d),) if rotary_mode == "interleave" else ((1, s, 1, d), (b, s, 1, d), (b, s, n, d))
        need(tuple(tensor.shape) in allowed, op, f"{name} is {list(tensor.shape)}; for BSND it may be {allowed}")
    plain(op, input=input, r1=r1, r2=r2)


@rule("npu_apply_rotary_pos_emb")
def _apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str, rotary_mode: str) -> None:
    op = "npu_apply_rotary_pos_emb"
    need(layout == "TND", op, f"layout is {layout!r}; only TND is modelled")
    need(rotary_mode == "half", op, f"rotary_mode is {rotary_mode!r}; A2 and 310P have half only")
    need(query.dim() == key.dim() == cos.dim() == sin.dim() == 3, op, "TND tensors have 3 axes")
    dtype_in(op, "query", query, FLOATS)
    need(query.dtype == key.dtype == cos.dtype == sin.dtype, op, "query, key, cos and sin have one dtype")
    tokens, _, dim = query.shape
    need(dim in (64, 128), op, f"the head size is 64 or 128, not {dim}")
    need(tokens > 0, op, "empty tensors are not supported")
    need(key.shape[0] == tokens and key.shape[2] == dim, op, "key has the tokens and head size of query")
    shape_is(op, "cos", cos, (tokens, 1, dim))
    shape_is(op, "sin", sin, (tokens, 1, dim))
    contiguous(op, query=query, key=key)
    plain(op, query=query, key=key, cos=cos, sin=sin)


@rule("npu_swiglu")
def _swiglu(input: Tensor, dim: int) -> None:
    dtype_in("npu_swiglu", "input", input, FLOATS)
    need(input.shape[dim] % 2 == 0, "npu_swiglu", "the split axis is even")
    plain("npu_swiglu", input=input)


@rule("npu_moe_gating_top_k_softmax")
def _gating(x: Tensor, finished: Any, k: int) -> None:
    op = "npu_moe_gating_top_k_softmax"
    only(op, {"finished": finished})
    dtype_in(op, "x", x, FLOATS)
    need(x.dim() in (2, 3), op, "x has 2 or 3 axes")
    need(0 < k <= min(x.shape[-1], 1024), op, f"k is {k}; it must be 1 to {min(x.shape[-1], 1024)}")


@rule("npu_moe_token_unpermute")
def _unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None, padded_mode: bool, restore_shape: Any
) -> None:
    op = "npu_moe_token_unpermute"
    need(not padded_mode and restore_shape is None, op, "padded_mode is not supported")
    dtype_in(op, "permuted_tokens", permuted_tokens, FLOATS)
    need(permuted_tokens.dim() == 2, op, "permuted_tokens is a matrix")
    dtype_in(op, "sorted_indices", sorted_indices, (torch.int32,))
    shape_is(op, "sorted_indices", sorted_indices, (permuted_tokens.shape[0],))
    need(probs is not None, op, "without probs a token has one choice; that is not modelled")
    assert probs is not None
    dtype_in(op, "probs", probs, FLOATS)
    need(probs.dim() == 2 and probs.numel() == permuted_tokens.shape[0], op, "probs is [tokens, choices]")
    need(probs.shape[1] <= 512, op, "at most 512 choices")


def as_dtype(operation: str, value: Any) -> torch.dtype:
    """An output_dtype as it reaches the operator: a torch.dtype, or its number."""
    numbers = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
    if isinstance(value, int) and value in numbers:
        return numbers[value]
    need(isinstance(value, torch.dtype), operation, f"output_dtype is {value!r}")
    result: torch.dtype = value
    return result


from emulator import rules_attention, rules_experts, rules_ranks  # noqa: E402, F401  they add theirs

__all__ = ["RULES", "bind", "check", "is_fake"]

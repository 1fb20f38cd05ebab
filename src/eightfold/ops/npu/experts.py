"""The mixture of experts on the NPU: routing, and the experts' products in groups or one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.ops.npu.weights import Grouped, OneByOne

IN_ONE_TENSOR = 2  # of npu_grouped_matmul: the results of all groups below one another
GROUPS_OF_ROWS = 0
COUNTS = 1  # how groups are given: by their sizes, not by where they end
GATHER = 0  # row indices that say where each (token, choice) went


def choose(logits: Tensor, k: int, fused: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] fp32 → ids [T, K] int32 and weights [T, K] fp32 that sum to 1.

    The renormalization stays apart from the fused softmax and top-k, where others have seen it go wrong.
    """
    if fused:
        best, ids, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(logits, k=k)
    else:
        best, ids = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        best, ids = best[:, :k], ids[:, :k].int()
    return ids, best / best.sum(-1, keepdim=True)


def grouped(x: Tensor, ids: Tensor, weights: Tensor, experts: Grouped, first: int, total: int) -> Tensor:
    """x [T, H], ids [T, K] int32, weights [T, K] fp32 → [T, H], the weighted sum of each token's experts.

    `experts` are those from number `first` on, of `total`; what the others would add is left out.
    """
    chosen, everyone = ids.shape[1], experts.count == total
    rows, index, sizes, scale = torch.ops.npu.npu_moe_init_routing_v2(
        x,  # → [T·K, H] sorted by expert, [T·K] int32, [E] int64, [T·K] fp32
        ids,
        active_num=x.shape[0] * chosen,
        expert_num=total,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=1 if experts.scheme == "w8a8" else -1,
        active_expert_range=[first, first + experts.count],
        row_idx_type=GATHER,
    )
    if experts.scheme == "w8a8":
        out = _int8(rows, scale, sizes, experts, x.dtype)
    else:
        inner = torch.ops.npu.npu_swiglu(_product(rows, experts.w13, experts.scale13, sizes))  # [T·K, I]
        out = _product(inner, experts.w2, experts.scale2, sizes)  # [T·K, H]
    if not everyone:  # rows behind the last group hold anything, and a choice of another rank has index -1
        mine = index >= 0
        index = torch.where(mine, index, 0)
        weights = weights * mine.view(weights.shape)
        out = torch.where(torch.arange(len(out), device=out.device)[:, None] < sizes.sum(), out, 0)
        return (out[index.long()].view(*ids.shape, -1).float() * weights[..., None]).sum(1).to(x.dtype)
    y: Tensor = torch.ops.npu.npu_moe_token_unpermute(out, index, weights)
    return y


def one_by_one(x: Tensor, ids: Tensor, weights: Tensor, experts: OneByOne, first: int) -> Tensor:
    """As `grouped`, for chips without the grouped operations; it waits for the device to learn who chose whom."""
    parts = torch.zeros(*ids.shape, x.shape[1], dtype=torch.float32, device=x.device)  # [T, K, H]
    for number, (w13, w2) in enumerate(experts.experts, first):
        token, choice = (ids == number).nonzero(as_tuple=True)
        if len(token):
            a, b = w13(x[token]).chunk(2, -1)  # [n, I] each
            parts[token, choice] = w2(F.silu(a) * b).float()
    return (parts * weights[..., None]).sum(1).to(x.dtype)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, sizes: Tensor) -> Tensor:
    """x [rows, K], weight [E, K, N] dense, int8 with scales [E, N], or int4 as in `Grouped` → [rows, N]."""
    extra = {} if scale is None else {"antiquant_scale": [scale], "antiquant_offset": [torch.zeros_like(scale)]}
    y: Tensor = torch.ops.npu.npu_grouped_matmul(
        [x],
        [weight],
        split_item=IN_ONE_TENSOR,
        group_type=GROUPS_OF_ROWS,
        group_list=sizes,
        group_list_type=COUNTS,
        **extra,
    )[0]
    return y


def _int8(rows: Tensor, scale: Tensor, sizes: Tensor, experts: Grouped, dtype: torch.dtype) -> Tensor:
    """rows int8 [T·K, H] and their scales [T·K] → [T·K, H] of `dtype`; what is between is quantized again."""
    if experts.fused:
        inner, scale, _ = torch.ops.npu.npu_grouped_matmul_swiglu_quant(
            rows, experts.w13, sizes.cumsum(0), experts.scale13, scale
        )
    else:
        wide = _int8_product(rows, scale, experts.w13, experts.scale13, sizes, dtype)  # [T·K, 2·I]
        inner, scale = torch.ops.npu.npu_dynamic_quant(torch.ops.npu.npu_swiglu(wide))
    return _int8_product(inner, scale, experts.w2, experts.scale2, sizes, dtype)


def _int8_product(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor | None, sizes: Tensor, dtype: torch.dtype
) -> Tensor:
    y: Tensor = torch.ops.npu.npu_grouped_matmul(
        [q],
        [weight],
        scale=[weight_scale],
        per_token_scale=[scale],
        split_item=IN_ONE_TENSOR,
        group_type=GROUPS_OF_ROWS,
        group_list=sizes,
        group_list_type=COUNTS,
        output_dtype=dtype,
    )[0]
    return y

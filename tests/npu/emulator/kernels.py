"""Reference kernels for torch_npu's operations, on the CPU: what the documentation's formulas say, in fp32 or exactly.

Arguments are CPU tensors that share the device's memory (NZ layouts already undone), so writes into caches are seen
there. What depends on values is asserted here; shapes and dtypes were checked by `rules` before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emulator.collectives import added
from emulator.host import need, to_nz
from emulator.rules import as_dtype
from emulator.rules_attention import workspace_bytes

UNDEFINED = 1.5e30  # what rows of results hold that the documentation leaves undefined; int8 rows hold 99


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = input.float()
    axes = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x1.float() + x2.float()
    y, rstd = rms_norm(total, gamma, epsilon)
    return y.to(x1.dtype), rstd, total.to(x1.dtype)


def dynamic_quant(input: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    wide = input.float()
    scale = wide.abs().amax(-1) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (wide * inverse[..., None]).round().clamp(-128, 127).to(torch.int8), scale


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] · int8 [K, N], exact (fp64 holds every such sum)."""
    return a.double() @ b.double()


def quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor, output_dtype: Any, **_: Any) -> Tensor:
    sums = integer_product(x1, x2).float()
    return (sums * scale.float() * pertoken_scale[:, None]).to(as_dtype("npu_quant_matmul", output_dtype))


def weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_group_size: int, **_: Any
) -> Tensor:
    if weight.dtype == torch.int32:
        weight = int4_unpacked(weight)
    scale = antiquant_scale.float()
    if antiquant_group_size:
        scale = scale.repeat_interleave(antiquant_group_size, 0)[: len(weight)]
    return (x.float() @ (weight.float() * scale)).to(x.dtype)


INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)  # an order of ours: which one CANN has is not documented, and nobody may know it


def int4_packed(weight: Tensor, **_: Any) -> Tensor:
    """[R, C] int32 in -8 … 7 → [R, C / 8] int32."""
    need(bool(((weight >= -8) & (weight <= 7)).all()), "npu_convert_weight_to_int4pack", "numbers are -8 to 7")
    shifts = 4 * torch.tensor(INTERLEAVED, dtype=torch.int64)
    words = ((weight.long() & 15).unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def int4_unpacked(packed: Tensor) -> Tensor:
    shifts = 4 * torch.tensor(INTERLEAVED, dtype=torch.int32)
    bits = packed[..., None] >> shifts & 15
    return torch.where(bits > 7, bits - 16, bits).flatten(-2)


def mm_all_reduce(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    antiquant_scale: Tensor | None,
    antiquant_offset: Tensor | None,
    dequant_scale: Tensor | None,
    pertoken_scale: Tensor | None,
    **_: Any,
) -> Tensor:
    if dequant_scale is not None and pertoken_scale is not None:
        wide = integer_product(x1, x2).float() * dequant_scale.float() * pertoken_scale[:, None]
        return added(wide.to(torch.bfloat16 if dequant_scale.dtype == torch.bfloat16 else torch.float16), hcom)
    weight = x2.float()
    if antiquant_scale is not None:
        weight = (weight + (0 if antiquant_offset is None else antiquant_offset.float())) * antiquant_scale.float()
    return added((x1.float() @ weight).to(x1.dtype), hcom)


def format_cast(input: Tensor, acl_format: int, **_: Any) -> Tensor:
    from emulator.host import host

    return to_nz(host(input), input.device)


def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, **_: Any) -> Tensor:
    need(float(max(r1.abs().max(), r2.abs().max())) <= 1, "npu_rotary_mul", "r1 and r2 are within [-1, 1]")
    wide = input.float()
    if rotary_mode == "half":
        a, b = wide.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    return (wide * r1.float() + turned * r2.float()).to(input.dtype)


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """In place, as documented: whoever goes on using the arguments sees it."""
    for x in (query, key):
        x.copy_(rotary_mul(x, cos, sin, "half"))
    return query.clone(), key.clone()


def scatter_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, **_: Any
) -> None:
    op = "npu_scatter_pa_kv_cache"
    slots = slot_mapping.long()
    need(bool((slots >= 0).all()), op, "slots are not negative")
    need(bool((slots < key_cache.shape[0] * key_cache.shape[1]).all()), op, "slots lie within the cache")
    need(len(slots.unique()) == len(slots), op, "slots are not repeated")
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    actual_seq_lengths: list[int],
    actual_seq_lengths_kv: list[int],
    block_table: Tensor,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    input_layout: str,
    key_antiquant_scale: Tensor | None,
    value_antiquant_scale: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    op = "npu_fused_infer_attention_score"
    if atten_mask is not None:
        causal = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        need(
            torch.equal(atten_mask.view(2048, 2048).bool(), causal),
            op,
            "atten_mask is 1 ahead of the diagonal, 0 elsewhere",
        )
    heads = num_key_value_heads or num_heads
    q = query if input_layout == "TND" else query[:, :, 0]  # [T, Hq, D]
    ends = actual_seq_lengths if input_layout == "TND" else range(1, len(q) + 1)
    out, start = torch.empty_like(q), 0
    for row, (end, length) in enumerate(zip(ends, actual_seq_lengths_kv, strict=True)):
        pages = block_table[row, : -(-length // key.shape[1])].long()
        need(bool(((pages >= 0) & (pages < len(key))).all()), op, "block_table names blocks that exist")
        k, v = (
            _row(cache, scales, pages, length, heads)
            for cache, scales in ((key, key_antiquant_scale), (value, value_antiquant_scale))
        )
        out[start:end] = _attend(q[start:end], k, v, scale)
        start = end
    return out.view(query.shape), torch.empty(0)


def attention_out(out: list[Tensor], workspace: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """As `attention`, into memory that is given; the workspace holds nothing afterwards that anybody should read."""
    workspace.fill_(99)
    result, _ = attention(**call)
    out[0].copy_(result)
    return out[0], out[1]


def attention_workspace(**call: Any) -> Tensor:
    return torch.empty(workspace_bytes(call["num_heads"], call["actual_seq_lengths_kv"]), dtype=torch.uint8)


def attention_output(query: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(0, dtype=torch.float32)


def _row(cache: Tensor, scales: Tensor | None, pages: Tensor, length: int, heads: int) -> Tensor:
    """A row's keys or values, fp32 [Hkv, length, D]."""
    found = cache[pages].flatten(0, 1)[:length].unflatten(-1, (heads, -1)).float()  # [length, Hkv, D]
    if scales is not None:
        found = found * scales[pages].transpose(1, 2).flatten(0, 1)[:length, :, None]
    return found.transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [n, Hq, D], the last n of a row's positions; k, v [Hkv, length, D] → [n, Hq, D]."""
    group = q.shape[1] // len(k)
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * scale  # [Hq, n, length]
    n, length = scores.shape[1:]
    ahead = torch.arange(length)[None] > torch.arange(length - n, length)[:, None]
    return (scores.masked_fill(ahead, -math.inf).softmax(-1) @ v).transpose(0, 1).to(q.dtype)


def swiglu(input: Tensor, dim: int) -> Tensor:
    a, b = input.float().chunk(2, dim)
    return (F.silu(a) * b).to(input.dtype)


def gating(x: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    best, ids = x.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    tokens = len(x)
    rows = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().contiguous()
    return best[..., :k].to(x.dtype), ids[..., :k].int(), rows


def init_routing(
    x: Tensor, expert_idx: Tensor, expert_num: int, quant_mode: int, active_expert_range: list[int], **_: Any
) -> tuple[Tensor, ...]:
    op = "npu_moe_init_routing_v2"
    need(bool(((expert_idx >= 0) & (expert_idx < expert_num)).all()), op, "expert_idx lies within expert_num")
    first, end = active_expert_range
    flat, choices = expert_idx.flatten(), expert_idx.shape[1]
    active = (flat >= first) & (flat < end)
    order = torch.where(active, flat, expert_num).sort(stable=True).indices[: int(active.sum())]
    rows = torch.full((flat.numel(), x.shape[1]), 99 if quant_mode == 1 else UNDEFINED).to(
        torch.int8 if quant_mode == 1 else x.dtype
    )
    scale = torch.full((flat.numel(),), UNDEFINED)
    chosen = x[order // choices]
    if quant_mode == 1:
        rows[: len(order)], scale[: len(order)] = dynamic_quant(chosen)
    else:
        rows[: len(order)] = chosen
    index = torch.full_like(flat, -1)
    index[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(flat[active] - first, minlength=end - first)
    return rows, index, counts, scale


def _groups(op: str, sizes: Tensor, cumulative: bool, rows: int, whole: bool) -> list[int]:
    """Where each group ends."""
    ends = (sizes if cumulative else sizes.cumsum(0)).tolist()
    need(all(a <= b for a, b in zip([0, *ends], ends, strict=False)), op, "group_list: no group is negative")
    need(ends[-1] == rows if whole else ends[-1] <= rows, op, f"group_list covers {ends[-1]} of {rows} rows")
    return [int(end) for end in ends]


def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    scale: list[Tensor] | None,
    antiquant_scale: list[Tensor] | None,
    antiquant_offset: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
    group_list: Tensor,
    group_list_type: int,
    output_dtype: Any,
    **_: Any,
) -> list[Tensor]:
    op, left, right = "npu_grouped_matmul", x[0], weight[0]
    dtype = left.dtype if output_dtype is None else as_dtype(op, output_dtype)
    if right.dtype == torch.int32:
        right = int4_unpacked(right)
    out = torch.full((len(left), right.shape[2]), UNDEFINED).to(dtype)
    # Rows behind the last group are documented as an error, but that is where routing leaves those of other ranks.
    start = 0
    for number, end in enumerate(_groups(op, group_list, group_list_type == 0, len(left), whole=False)):
        part, matrix = left[start:end], right[number]
        if scale is not None and per_token_scale is not None:
            sums = integer_product(part, matrix).float()
            out[start:end] = (sums * scale[0][number].float() * per_token_scale[0][start:end, None]).to(dtype)
        else:
            wide = matrix.float()
            if antiquant_scale is not None and antiquant_offset is not None:
                by, offset = antiquant_scale[0][number].float(), antiquant_offset[0][number].float()
                if by.dim() == 2:  # [groups, N]
                    by, offset = (x.repeat_interleave(len(matrix) // len(x), 0) for x in (by, offset))
                wide = (wide + offset) * by
            out[start:end] = (part.float() @ wide).to(dtype)
        start = end
    return [out]


def grouped_swiglu_quant(
    x: Tensor, weight: Tensor, group_list: Tensor, weight_scale: Tensor, x_scale: Tensor, **_: Any
) -> tuple[Tensor, ...]:
    op = "npu_grouped_matmul_swiglu_quant"
    q = torch.full((len(x), weight.shape[2] // 2), 99, dtype=torch.int8)
    scale, start = torch.full((len(x),), UNDEFINED), 0
    for number, end in enumerate(_groups(op, group_list, True, len(x), whole=False)):
        wide = integer_product(x[start:end], weight[number]).float()
        wide = wide * weight_scale[number].float() * x_scale[start:end, None]
        q[start:end], scale[start:end] = dynamic_quant(swiglu(wide, -1))
        start = end
    return q, scale, torch.empty(())


def unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor, **_: Any) -> Tensor:
    op, rows = "npu_moe_token_unpermute", sorted_indices.long()
    need(bool(((rows >= 0) & (rows < len(permuted_tokens))).all()), op, "sorted_indices lie within permuted_tokens")
    need(len(rows.unique()) == len(rows), op, "sorted_indices are not repeated")
    parts = permuted_tokens[rows].view(*probs.shape, -1).float()
    return (parts * probs.float()[..., None]).sum(1).to(permuted_tokens.dtype)


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    size, slots = key_cache.shape[2], slot_indices.long()
    need(
        bool(((slots >= 0) & (slots < len(key_cache) * size)).all()),
        "_npu_reshape_and_cache",
        "slots lie within the cache",
    )
    for source, cache in ((key, key_cache), (value, value_cache)):
        cache[slots // size, :, slots % size] = source.flatten(1).unflatten(1, (-1, 16))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    **_: Any,
) -> None:
    for row, length in enumerate(context_lens.tolist()):
        pages = block_table[row, : -(-length // key_cache.shape[2])].long()
        need(
            bool(((pages >= 0) & (pages < len(key_cache))).all()),
            "_npu_paged_attention",
            "block_table names blocks that exist",
        )
        k, v = (
            cache[pages]
            .permute(0, 2, 1, 3)
            .flatten(0, 1)[:length]
            .flatten(1)
            .unflatten(1, (num_kv_heads, -1))
            .transpose(0, 1)
            .float()
            for cache in (key_cache, value_cache)
        )
        out[row : row + 1] = _attend(query[row : row + 1], k, v, scale_value)


KERNELS = {
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_dynamic_quant": dynamic_quant,
    "npu_quant_matmul": quant_matmul,
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
    "npu_convert_weight_to_int4pack": int4_packed,
    "npu_mm_all_reduce_base": mm_all_reduce,
    "npu_format_cast": format_cast,
    "npu_rotary_mul": rotary_mul,
    "npu_apply_rotary_pos_emb": apply_rotary,
    "npu_scatter_pa_kv_cache": scatter_cache,
    "npu_fused_infer_attention_score": attention,
    "npu_fused_infer_attention_score.out": attention_out,
    "_npu_fused_infer_attention_score_get_max_workspace": attention_workspace,
    "_npu_fused_infer_attention_score_infer_output": attention_output,
    "npu_swiglu": swiglu,
    "npu_moe_gating_top_k_softmax": gating,
    "npu_moe_init_routing_v2": init_routing,
    "npu_grouped_matmul": grouped_matmul,
    "npu_grouped_matmul_swiglu_quant": grouped_swiglu_quant,
    "npu_moe_token_unpermute": unpermute,
    "_npu_reshape_and_cache": reshape_and_cache,
    "_npu_paged_attention": paged_attention,
}

# Results without content, of operations for which torch_npu has no shape function: those that graphs need, and packing.
FAKES = {
    "npu_convert_weight_to_int4pack": lambda weight, *_, **__: weight.new_empty(weight.shape[0], weight.shape[1] // 8),
    "npu_fused_infer_attention_score.out": lambda out, **_: tuple(out),
    "_npu_fused_infer_attention_score_get_max_workspace": lambda **call: attention_workspace(**call).to("meta"),
    "_npu_fused_infer_attention_score_infer_output": attention_output,
}

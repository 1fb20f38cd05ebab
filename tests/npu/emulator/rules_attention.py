"""Constraints of the operations on pages: writing them, and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emulator.host import NZ, format_of, need
from emulator.rules import HALVES, contiguous, dtype_in, only, plain, rule, shape_is

MASK = 2048
INT32_MAX = 2**31 - 1


@rule("npu_scatter_pa_kv_cache")
def _scatter(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    compress_lens: Any,
    compress_seq_offsets: Any,
    seq_lens: Any,
    cache_mode: str | None,
) -> None:
    op = "npu_scatter_pa_kv_cache"
    only(op, {"compress_lens": compress_lens, "compress_seq_offsets": compress_seq_offsets, "seq_lens": seq_lens})
    need(cache_mode in (None, "Norm"), op, f"cache_mode is {cache_mode!r}, but the cache is ND: it must be 'Norm'")
    contiguous(op, key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    plain(op, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    need(key.dim() == value.dim() == 3, op, "key and value are [tokens, heads, head size]")
    need(key_cache.dim() == value_cache.dim() == 4, op, "caches are [blocks, block size, heads, head size]")
    dtypes = {t.dtype for t in (key, value, key_cache, value_cache)}
    need(len(dtypes) == 1, op, f"key, value and both caches have one dtype, not {dtypes}")
    need(key.shape[:2] == value.shape[:2], op, "key and value have the same tokens and heads")
    need(
        key_cache.shape[2:] == key.shape[1:], op, f"key_cache is {list(key_cache.shape)} for a key of {list(key.shape)}"
    )
    need(value_cache.shape[2:] == value.shape[1:], op, "value_cache has the heads and head size of value")
    need(key_cache.shape[:2] == value_cache.shape[:2], op, "both caches have the same blocks")
    dtype_in(op, "slot_mapping", slot_mapping, (torch.int32, torch.int64))
    shape_is(op, "slot_mapping", slot_mapping, (key.shape[0],))


@rule("npu_fused_infer_attention_score")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    actual_seq_lengths: list[int] | None,
    actual_seq_lengths_kv: list[int] | None,
    block_table: Tensor | None,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    input_layout: str,
    sparse_mode: int,
    block_size: int,
    key_antiquant_scale: Tensor | None,
    value_antiquant_scale: Tensor | None,
    key_antiquant_mode: int,
    value_antiquant_mode: int,
    **other: Any,
) -> None:
    op = "npu_fused_infer_attention_score"
    only(
        op,
        other,
        pre_tokens=INT32_MAX,
        next_tokens=INT32_MAX,
        inner_precise=0,
        antiquant_mode=0,
        softmax_lse_flag=False,
    )
    dtype_in(op, "query", query, HALVES)
    contiguous(op, query=query, key=key, value=value)
    plain(op, query=query, key=key, value=value)
    need(key.shape == value.shape and key.dtype == value.dtype, op, "key and value have one shape and dtype")
    need(scale > 0, op, "scale must be positive")
    need(input_layout in ("TND", "BNSD"), op, f"input_layout {input_layout!r} is not modelled")
    tnd = input_layout == "TND"
    need(query.dim() == (3 if tnd else 4), op, f"a query of {query.dim()} axes is not {input_layout}")
    heads, dim = query.shape[1], query.shape[-1]
    need(num_heads == heads, op, f"num_heads is {num_heads}, but the query has {heads}")
    kv_heads = num_key_value_heads or num_heads
    need(
        heads % kv_heads == 0 and heads // kv_heads <= 64, op, f"{heads} heads over {kv_heads}: a multiple, at most 64"
    )
    need(dim % 16 == 0 and dim <= 512, op, f"the head size is a multiple of 16 up to 512, not {dim}")
    _lengths(op, query, actual_seq_lengths, actual_seq_lengths_kv, tnd)
    assert actual_seq_lengths_kv is not None
    _paged(op, key, block_table, block_size, kv_heads * dim, actual_seq_lengths_kv, one=not tnd)
    if tnd:
        need(sparse_mode == 3, op, f"sparse_mode {sparse_mode} is not modelled: 3 is causal from the end")
        need(atten_mask is not None, op, "sparse_mode 3 needs atten_mask")
        assert atten_mask is not None
        dtype_in(op, "atten_mask", atten_mask, (torch.bool, torch.int8, torch.uint8))
        shape_is(op, "atten_mask", atten_mask.flatten(0, -2), (MASK, MASK))
        contiguous(op, atten_mask=atten_mask)
    else:
        need(query.shape[2] == 1 and sparse_mode == 0 and atten_mask is None, op, "BNSD is modelled for single queries")
    if key_antiquant_scale is None and value_antiquant_scale is None:
        need(key.dtype == query.dtype, op, f"key is {key.dtype} beside a query of {query.dtype}")
        return
    need(key_antiquant_scale is not None and value_antiquant_scale is not None, op, "both antiquant scales or none")
    assert key_antiquant_scale is not None and value_antiquant_scale is not None
    need(not tnd, op, "pages of int8 are for single queries in BNSD")
    dtype_in(op, "key", key, (torch.int8,))
    need(key_antiquant_mode == value_antiquant_mode == 5, op, "scales in pages, a token and head each, are mode 5")
    for name, tensor in (
        ("key_antiquant_scale", key_antiquant_scale),
        ("value_antiquant_scale", value_antiquant_scale),
    ):
        dtype_in(op, name, tensor, (torch.float32,))
        shape_is(op, name, tensor, (key.shape[0], kv_heads, block_size))
        contiguous(op, **{name: tensor})


@rule("npu_fused_infer_attention_score.out")
def _attention_out(workspace: Tensor | None, out: list[Tensor], query: Tensor, **call: Any) -> None:
    op = "npu_fused_infer_attention_score.out"
    _attention(query=query, **call)
    need(len(out) == 2, op, "out is [result, log of the sums of exponents]")
    shape_is(op, "out[0]", out[0], tuple(query.shape))
    need(out[0].dtype == query.dtype, op, f"out[0] is {out[0].dtype} beside a query of {query.dtype}")
    contiguous(op, **{"out[0]": out[0]})
    need(workspace is not None, op, "in a graph the workspace must be given")
    assert workspace is not None
    size = workspace_bytes(call["num_heads"], call["actual_seq_lengths_kv"])
    need(workspace.nbytes >= size, op, f"a workspace of {workspace.nbytes} bytes is too small for these lengths")


@rule("_npu_fused_infer_attention_score_get_max_workspace")
def _attention_workspace(**call: Any) -> None:
    _attention(**call)


@rule("_npu_fused_infer_attention_score_infer_output")
def _attention_output(query: Tensor, value: Tensor, input_layout: str, **other: Any) -> None:
    op = "_npu_fused_infer_attention_score_infer_output"
    need(input_layout in ("TND", "BNSD"), op, f"input_layout {input_layout!r} is not modelled")
    need(query.dim() == (3 if input_layout == "TND" else 4) and value.dim() == 3, op, "query and pages, as attention's")


def workspace_bytes(heads: int, keys: list[int]) -> int:
    """Enough for these lengths: a model of ours, that a workspace for short rows does not suffice for long ones."""
    return 4 * heads * max(keys, default=0)


def _lengths(op: str, query: Tensor, ends: list[int] | None, keys: list[int] | None, tnd: bool) -> None:
    need(keys is not None, op, "with pages actual_seq_lengths_kv must be given")
    assert keys is not None
    need(all(n >= 0 for n in keys), op, "lengths are not negative")
    if not tnd:
        need(len(keys) == query.shape[0], op, f"{len(keys)} lengths of keys for a batch of {query.shape[0]}")
        return
    need(ends is not None, op, "for TND actual_seq_lengths must be given")
    assert ends is not None
    need(len(ends) == len(keys), op, f"{len(ends)} lengths of queries but {len(keys)} of keys")
    need(
        all(a <= b for a, b in zip([0, *ends], ends, strict=False)), op, "actual_seq_lengths add up, so they don't fall"
    )
    need(
        ends[-1] == query.shape[0], op, f"actual_seq_lengths end at {ends[-1]}, but there are {query.shape[0]} queries"
    )
    for start, end, length in zip([0, *ends], ends, keys, strict=False):
        need(end - start <= length, op, f"a row of {end - start} queries has {length} keys only")


def _paged(op: str, key: Tensor, table: Tensor | None, size: int, width: int, keys: list[int], one: bool) -> None:
    need(table is not None, op, "only paged keys are modelled: block_table must be given")
    assert table is not None
    dtype_in(op, "block_table", table, (torch.int32,))
    need(
        table.dim() == 2 and table.shape[0] == len(keys), op, f"block_table is {list(table.shape)} for {len(keys)} rows"
    )
    contiguous(op, block_table=table)
    step = 32 if one and key.dtype == torch.int8 else 16 if one else 128
    need(0 < size <= 512 and size % step == 0, op, f"block_size is {size}; it must be a multiple of {step} up to 512")
    need(key.dim() == 3, op, "pages are [blocks, block size, heads · head size]")
    need(key.shape[1] == size, op, f"block_size is {size}, but pages hold {key.shape[1]}")
    need(key.shape[2] == width, op, f"pages are {key.shape[2]} wide where {width} are asked for")
    need(width <= 65535, op, "heads · head size is at most 65535")
    need(key.numel() <= INT32_MAX, op, f"a cache of {key.numel()} elements is beyond int32")
    need(table.shape[1] * size >= max(keys, default=0), op, "block_table is too narrow for the longest row")


@rule("_npu_reshape_and_cache")
def _reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    op = "_npu_reshape_and_cache"
    need(key.dim() == 3 and key.shape == value.shape, op, "key and value are [tokens, heads, head size]")
    width = key.shape[1] * key.shape[2]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        need(format_of(cache) == NZ, op, f"{name} has the NZ layout on Ascend310P")
        need(
            cache.dim() == 4 and cache.shape[1] == width // 16 and cache.shape[3] == 16,
            op,
            f"{name} is [blocks, {width // 16}, block size, 16]",
        )
        need(cache.dtype == key.dtype, op, f"{name} has the dtype of key")
    contiguous(op, key=key, value=value)
    dtype_in(op, "slot_indices", slot_indices, (torch.int32,))
    shape_is(op, "slot_indices", slot_indices, (key.shape[0],))


@rule("_npu_paged_attention")
def _paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    workspace: Any,
) -> None:
    op = "_npu_paged_attention"
    only(op, {"workspace": workspace})
    need(
        query.dim() == 3 and query.shape == out.shape and query.dtype == out.dtype,
        op,
        "out is like query, [tokens, heads, head size]",
    )
    need(
        num_heads == query.shape[1] and num_heads % num_kv_heads == 0,
        op,
        "num_heads are those of query, a multiple of num_kv_heads",
    )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        need(
            format_of(cache) == NZ and cache.shape[1] * 16 == num_kv_heads * query.shape[2],
            op,
            f"{name} is NZ, of these heads",
        )
        need(cache.dtype == query.dtype, op, f"{name} has the dtype of query")
    need(scale_value > 0, op, "scale must be positive")
    dtype_in(op, "block_table", block_table, (torch.int32,))
    dtype_in(op, "context_lens", context_lens, (torch.int32,))
    need(
        block_table.shape[0] == query.shape[0] == context_lens.shape[0], op, "a row of block_table and a length a query"
    )

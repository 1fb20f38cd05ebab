"""Deliberate mistakes in calls of torch_npu's operations: the emulator must catch each, for what is not caught here is
found on hardware only. torch_npu's own schemas and shape functions catch few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.host import Mistake
from torch import Tensor
from torch.utils._pytree import tree_map_only

NPU = "npu:0"
Call = dict[str, Any]


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16).to(NPU)


def floats(*shape: int) -> Tensor:
    return torch.rand(*shape).to(NPU)


def int8(*shape: int) -> Tensor:
    return torch.randint(-9, 9, shape).to(torch.int8).to(NPU)


def ints(values: list[Any], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(NPU)


def nz(tensor: Tensor) -> Tensor:
    cast: Tensor = torch.ops.npu.npu_format_cast(tensor, 29)
    return cast


def mask() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.int8).triu(1).to(NPU)


def attention() -> Call:
    return {
        "query": half(5, 4, 64),
        "key": half(6, 128, 128),
        "value": half(6, 128, 128),
        "atten_mask": mask(),
        "actual_seq_lengths": [1, 5],
        "actual_seq_lengths_kv": [130, 4],
        "block_table": ints([[2, 5], [1, 0]]),
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 0.125,
        "input_layout": "TND",
        "block_size": 128,
        "sparse_mode": 3,
    }


def attention_int8() -> Call:
    """Single queries over int8 pages with their scales."""
    return {
        "query": half(2, 4, 1, 64),
        "key": int8(6, 128, 128),
        "value": int8(6, 128, 128),
        "actual_seq_lengths_kv": [130, 4],
        "key_antiquant_scale": floats(6, 2, 128),
        "value_antiquant_scale": floats(6, 2, 128),
        "key_antiquant_mode": 5,
        "value_antiquant_mode": 5,
        "block_table": ints([[2, 5], [1, 0]]),
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 0.125,
        "input_layout": "BNSD",
        "block_size": 128,
    }


def scatter() -> Call:
    return {
        "key": half(3, 2, 64),
        "value": half(3, 2, 64),
        "key_cache": half(4, 128, 2, 64),
        "value_cache": half(4, 128, 2, 64),
        "slot_mapping": ints([5, 300, 0]),
        "cache_mode": "Norm",
    }


def grouped() -> Call:
    return {
        "x": [half(6, 32)],
        "weight": [half(3, 32, 48)],
        "split_item": 2,
        "group_type": 0,
        "group_list": ints([1, 3, 2], torch.int64),
        "group_list_type": 1,
    }


def grouped_int8() -> Call:
    return {
        **grouped(),
        "x": [int8(6, 32)],
        "weight": [int8(3, 32, 48)],
        "scale": [half(3, 48)],
        "per_token_scale": [floats(6)],
        "output_dtype": torch.bfloat16,
    }


def grouped_weight_only() -> Call:
    return {
        **grouped(),
        "weight": [int8(3, 32, 48)],
        "antiquant_scale": [half(3, 48)],
        "antiquant_offset": [half(3, 48)],
    }


GOOD: dict[str, Callable[[], Call]] = {
    "npu_rms_norm": lambda: {"input": half(3, 64), "gamma": half(64), "epsilon": 1e-5},
    "npu_add_rms_norm": lambda: {"x1": half(3, 64), "x2": half(3, 64), "gamma": half(64), "epsilon": 1e-5},
    "npu_dynamic_quant": lambda: {"input": half(3, 64)},
    "npu_quant_matmul": lambda: {
        "x1": int8(3, 32),
        "x2": nz(int8(32, 48)),
        "scale": floats(48),
        "pertoken_scale": floats(3),
        "output_dtype": torch.bfloat16,
    },
    "npu_weight_quant_batchmatmul": lambda: {"x": half(3, 32), "weight": int8(48, 32).t(), "antiquant_scale": half(48)},
    "npu_rotary_mul": lambda: {
        "input": half(1, 3, 4, 32),
        "r1": half(1, 3, 1, 32).clamp(-1, 1),
        "r2": half(1, 3, 1, 32).clamp(-1, 1),
        "rotary_mode": "half",
    },
    "npu_apply_rotary_pos_emb": lambda: {
        "query": half(3, 4, 64),
        "key": half(3, 2, 64),
        "cos": half(3, 1, 64).clamp(-1, 1),
        "sin": half(3, 1, 64).clamp(-1, 1),
        "layout": "TND",
        "rotary_mode": "half",
    },
    "npu_scatter_pa_kv_cache": scatter,
    "npu_fused_infer_attention_score": attention,
    "npu_fused_infer_attention_score int8": attention_int8,
    "npu_moe_gating_top_k_softmax": lambda: {"x": floats(5, 8), "k": 2},
    "npu_moe_init_routing_v2": lambda: {
        "x": half(3, 32),
        "expert_idx": ints([[0, 2], [1, 0], [2, 1]]),
        "active_num": 6,
        "expert_num": 3,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "quant_mode": 1,
        "active_expert_range": [0, 3],
        "row_idx_type": 0,
    },
    "npu_grouped_matmul": grouped,
    "npu_grouped_matmul int8": grouped_int8,
    "npu_grouped_matmul weight only": grouped_weight_only,
    "npu_grouped_matmul_swiglu_quant": lambda: {
        "x": int8(6, 32),
        "weight": nz(int8(3, 32, 64)),
        "group_list": ints([1, 4, 6], torch.int64),
        "weight_scale": floats(3, 64),
        "x_scale": floats(6),
    },
    "npu_swiglu": lambda: {"input": half(3, 64), "dim": -1},
    "npu_moe_token_unpermute": lambda: {
        "permuted_tokens": half(6, 32),
        "sorted_indices": ints([3, 1, 0, 5, 4, 2]),
        "probs": floats(3, 2),
    },
    "npu_format_cast": lambda: {"input": half(32, 48), "acl_format": 29},
}

# Operation → mistake → the arguments that make it.
MISTAKES: dict[str, dict[str, Callable[[], Call]]] = {
    "npu_rms_norm": {
        "a gamma of another length": lambda: {"gamma": half(32)},
        "a gamma of another dtype": lambda: {"gamma": floats(64)},
        "an epsilon of 0": lambda: {"epsilon": 0.0},
        "an int8 input": lambda: {"input": int8(3, 64)},
        "one axis": lambda: {"input": half(64)},
        "an unknown argument": lambda: {"weight": half(64)},
        "a text for epsilon": lambda: {"epsilon": "1e-5"},
    },
    "npu_add_rms_norm": {
        "a residual of another dtype": lambda: {"x2": floats(3, 64)},
        "a residual of another shape": lambda: {"x2": half(1, 64)},
        "a gamma of another length": lambda: {"gamma": half(128)},
    },
    "npu_dynamic_quant": {
        "an fp32 input": lambda: {"input": floats(3, 64)},
        "one axis": lambda: {"input": half(64)},
        "smooth scales": lambda: {"smooth_scales": half(64)},
        "an input in NZ layout": lambda: {"input": nz(half(16, 64))},
    },
    "npu_quant_matmul": {
        "weights not transposed": lambda: {"x2": int8(48, 32)},
        "float activations": lambda: {"x1": half(3, 32)},
        "a scale of another length": lambda: {"scale": floats(47)},
        "a scale with two axes": lambda: {"scale": floats(1, 48)},
        "token scales of another length": lambda: {"pertoken_scale": floats(4)},
        "token scales with two axes": lambda: {"pertoken_scale": floats(3, 1)},
        "bf16 token scales": lambda: {"pertoken_scale": half(3)},
        "a float32 result": lambda: {"output_dtype": torch.float32},
        "no result dtype": lambda: {"output_dtype": None},
        "a bf16 scale beside an fp16 result": lambda: {"scale": half(48), "output_dtype": torch.float16},
        "activations in NZ layout": lambda: {"x1": nz(int8(3, 32))},
        "no tokens": lambda: {"x1": int8(0, 32), "pertoken_scale": floats(0)},
        "an axis beyond 65535": lambda: {"x2": int8(32, 65536), "scale": floats(65536)},
        "a cut through NZ weights": lambda: {"x2": nz(int8(32, 64))[:, :48]},
    },
    "npu_weight_quant_batchmatmul": {
        "weights in NZ layout": lambda: {"weight": nz(int8(32, 48))},
        "an fp32 scale": lambda: {"antiquant_scale": floats(48)},
        "a scale of another length": lambda: {"antiquant_scale": half(32)},
        "weights not transposed": lambda: {"weight": int8(48, 32)},
        "fp32 activations": lambda: {"x": floats(3, 32)},
        "float weights": lambda: {"weight": half(32, 48)},
        "groups": lambda: {"antiquant_group_size": 32},
    },
    "npu_rotary_mul": {
        "three axes": lambda: {"input": half(3, 4, 32)},
        "half tables": lambda: {"r1": half(1, 3, 1, 16), "r2": half(1, 3, 1, 16)},
        "tables of another dtype": lambda: {"r1": floats(1, 3, 1, 32), "r2": floats(1, 3, 1, 32)},
        "tables of another layout": lambda: {"r1": half(1, 1, 3, 32), "r2": half(1, 1, 3, 32)},
        "an unknown mode": lambda: {"rotary_mode": "interleaved"},
        "angles for cosines": lambda: {"r1": half(1, 3, 1, 32) + 7},
    },
    "npu_apply_rotary_pos_emb": {
        "no layout": lambda: {"layout": "BSND"},
        "a head size of 32": lambda: {n: half(3, 1, 32) for n in ("query", "key", "cos", "sin")},
        "fp32 tables": lambda: {"cos": floats(3, 1, 64), "sin": floats(3, 1, 64)},
        "tables without the head axis": lambda: {"cos": half(3, 64), "sin": half(3, 64)},
        "interleaved": lambda: {"rotary_mode": "interleave"},
        "keys of other tokens": lambda: {"key": half(4, 2, 64)},
        "queries cut out of a wider tensor": lambda: {"query": half(3, 8, 64)[:, :4]},
    },
    "npu_scatter_pa_kv_cache": {
        "the default cache mode": lambda: {"cache_mode": "PA_NZ"},
        "a cache of another dtype": lambda: {"key_cache": floats(4, 128, 2, 64)},
        "a cache with heads before tokens": lambda: {
            "key_cache": half(4, 2, 128, 64),
            "value_cache": half(4, 2, 128, 64),
        },
        "a view of another cache": lambda: {"key_cache": half(4, 2, 128, 64).transpose(1, 2)},
        "keys cut out of a wider tensor": lambda: {"key": half(3, 8, 64)[:, :2]},
        "flat keys": lambda: {"key": half(3, 128), "value": half(3, 128)},
        "float slots": lambda: {"slot_mapping": floats(3)},
        "too few slots": lambda: {"slot_mapping": ints([5, 300])},
        "a slot behind the end": lambda: {"slot_mapping": ints([5, 512, 0])},
        "a negative slot": lambda: {"slot_mapping": ints([5, -1, 0])},
        "a slot given twice": lambda: {"slot_mapping": ints([5, 5, 0])},
    },
    "npu_fused_infer_attention_score": {
        "fewer heads than there are": lambda: {"num_heads": 2},
        "other KV heads": lambda: {"num_key_value_heads": 4},
        "no KV heads": lambda: {"num_key_value_heads": 0},
        "a page size of 100": lambda: {"block_size": 100, "key": half(6, 100, 128), "value": half(6, 100, 128)},
        "a page size of 16": lambda: {"block_size": 16, "key": half(48, 16, 128), "value": half(48, 16, 128)},
        "a page size that is not the cache's": lambda: {"block_size": 256},
        "an int64 block table": lambda: {"block_table": ints([[2, 5], [1, 0]], torch.int64)},
        "a block table for other rows": lambda: {"block_table": ints([[2, 5]])},
        "a block table too narrow": lambda: {"block_table": ints([[2], [1]])},
        "a block that is not there": lambda: {"block_table": ints([[2, 6], [1, 0]])},
        "no block table": lambda: {"block_table": None},
        "a bf16 mask": lambda: {"atten_mask": mask().bfloat16()},
        "a small mask": lambda: {"atten_mask": torch.ones(64, 64, dtype=torch.int8).triu(1).to(NPU)},
        "a mask turned around": lambda: {"atten_mask": torch.ones(2048, 2048, dtype=torch.int8).tril().to(NPU)},
        "no mask": lambda: {"atten_mask": None},
        "no query lengths": lambda: {"actual_seq_lengths": None},
        "no key lengths": lambda: {"actual_seq_lengths_kv": None},
        "query lengths that are not sums": lambda: {"actual_seq_lengths": [1, 4]},
        "key lengths that are sums, of another count": lambda: {"actual_seq_lengths_kv": [0, 130, 134]},
        "more queries than keys": lambda: {"actual_seq_lengths_kv": [130, 3]},
        "fp32 queries": lambda: {
            n: floats(*s) for n, s in (("query", (5, 4, 64)), ("key", (6, 128, 128)), ("value", (6, 128, 128)))
        },
        "keys of another dtype": lambda: {"key": half(6, 128, 128).half(), "value": half(6, 128, 128).half()},
        "pages with heads before tokens": lambda: {
            "key": half(6, 2, 128, 64).transpose(1, 2).flatten(2).transpose(1, 2)
        },
        "pages with four axes": lambda: {"key": half(6, 128, 2, 64), "value": half(6, 128, 2, 64)},
        "a mode that is not causal": lambda: {"sparse_mode": 0},
        "an unknown layout": lambda: {"input_layout": "THD"},
        "a scale of 0": lambda: {"scale": 0.0},
        "int8 pages without scales": lambda: {"key": int8(6, 128, 128), "value": int8(6, 128, 128)},
        "an argument of the second version": lambda: {"actual_seq_qlen": [1, 5]},
    },
    "npu_fused_infer_attention_score int8": {
        "scales in token order": lambda: {
            n: floats(6, 128, 2) for n in ("key_antiquant_scale", "value_antiquant_scale")
        },
        "bf16 scales": lambda: {n: half(6, 2, 128) for n in ("key_antiquant_scale", "value_antiquant_scale")},
        "scales of keys alone": lambda: {"value_antiquant_scale": None},
        "no scales": lambda: {"key_antiquant_scale": None, "value_antiquant_scale": None},
        "scales by channel": lambda: {"key_antiquant_mode": 0, "value_antiquant_mode": 0},
        "two modes": lambda: {"value_antiquant_mode": 4},
        "bf16 pages beside scales": lambda: {"key": half(6, 128, 128), "value": half(6, 128, 128)},
        "several queries a row": lambda: {"query": half(2, 4, 3, 64)},
        "a ragged layout": lambda: {
            "input_layout": "TND",
            "query": half(2, 4, 64),
            "actual_seq_lengths": [1, 2],
            "atten_mask": mask(),
            "sparse_mode": 3,
        },
        "a mask": lambda: {"atten_mask": mask()},
        "lengths for other rows": lambda: {"actual_seq_lengths_kv": [130]},
    },
    "npu_moe_gating_top_k_softmax": {
        "more choices than experts": lambda: {"k": 9},
        "no choice": lambda: {"k": 0},
        "int8 logits": lambda: {"x": int8(5, 8)},
        "one axis": lambda: {"x": floats(8)},
    },
    "npu_moe_init_routing_v2": {
        "int64 experts": lambda: {"expert_idx": ints([[0, 2], [1, 0], [2, 1]], torch.int64)},
        "an expert that is not there": lambda: {"expert_idx": ints([[0, 3], [1, 0], [2, 1]])},
        "experts of other tokens": lambda: {"expert_idx": ints([[0, 2], [1, 0]])},
        "no counts": lambda: {"expert_tokens_num_flag": False},
        "cumulated counts": lambda: {"expert_tokens_num_type": 0},
        "static quantization": lambda: {"quant_mode": 0},
        "a range beyond the experts": lambda: {"active_expert_range": [0, 4]},
        "no range": lambda: {"active_expert_range": []},
        "rows dropped": lambda: {"active_num": 4},
        "fp32 rows to quantize": lambda: {"x": floats(3, 32)},
        "no number of experts": lambda: {"expert_num": -1},
    },
    "npu_grouped_matmul": {
        "weights of another K": lambda: {"weight": [half(3, 33, 48)]},
        "weights not transposed": lambda: {"weight": [half(3, 48, 32)]},
        "weights with two axes": lambda: {"weight": [half(32, 48)]},
        "a group list of another length": lambda: {"group_list": ints([3, 3], torch.int64)},
        "an int32 group list": lambda: {"group_list": ints([1, 3, 2])},
        "no group list": lambda: {"group_list": None},
        "sums for sizes": lambda: {"group_list": ints([1, 4, 6], torch.int64)},
        "sizes for sums": lambda: {"group_list_type": 0, "group_list": ints([1, 3, 2], torch.int64)},
        "no group type": lambda: {"group_type": None},
        "groups of columns": lambda: {"group_type": 2},
        "a result for each group": lambda: {"split_item": 0},
        "activations of another dtype": lambda: {"x": [floats(6, 32)]},
        "a result of another dtype": lambda: {"output_dtype": torch.float32},
        "x transposed": lambda: {"x": [half(32, 6).t()]},
        "x that is no list": lambda: {"x": half(6, 32)},
        "an int8 x without scales": lambda: {"x": [int8(6, 32)], "weight": [int8(3, 32, 48)]},
        "an activation": lambda: {"act_type": 5},
    },
    "npu_grouped_matmul int8": {
        "a scale of another shape": lambda: {"scale": [half(48)]},
        "an fp32 scale beside a bf16 result": lambda: {"scale": [floats(3, 48)]},
        "no scale": lambda: {"scale": None},
        "token scales of another length": lambda: {"per_token_scale": [floats(5)]},
        "bf16 token scales": lambda: {"per_token_scale": [half(6)]},
        "no token scales": lambda: {"per_token_scale": None},
        "a float32 result": lambda: {"output_dtype": torch.float32},
        "no result dtype": lambda: {"output_dtype": None},
        "float weights": lambda: {"weight": [half(3, 32, 48)]},
    },
    "npu_grouped_matmul weight only": {
        "no offset": lambda: {"antiquant_offset": None},
        "an fp32 scale": lambda: {"antiquant_scale": [floats(3, 48)]},
        "a scale of another shape": lambda: {"antiquant_scale": [half(48)]},
        "fp32 activations": lambda: {"x": [floats(6, 32)]},
        "the scale of int8 activations": lambda: {"scale": [half(3, 48)]},
    },
    "npu_grouped_matmul_swiglu_quant": {
        "weights that are not NZ": lambda: {"weight": int8(3, 32, 64)},
        "sizes for sums": lambda: {"group_list": ints([1, 4, 3], torch.int64)},
        "an int32 group list": lambda: {"group_list": ints([1, 4, 6])},
        "a scale of another shape": lambda: {"weight_scale": floats(64)},
        "token scales with two axes": lambda: {"x_scale": floats(6, 1)},
        "float activations": lambda: {"x": half(6, 32)},
        "weights of another K": lambda: {"weight": nz(int8(3, 48, 64))},
        "too wide": lambda: {"weight": nz(int8(3, 32, 10242)), "weight_scale": floats(3, 10242)},
    },
    "npu_swiglu": {
        "an odd width": lambda: {"input": half(3, 63)},
        "int8": lambda: {"input": int8(3, 64)},
    },
    "npu_moe_token_unpermute": {
        "int64 indices": lambda: {"sorted_indices": ints([3, 1, 0, 5, 4, 2], torch.int64)},
        "an index given twice": lambda: {"sorted_indices": ints([3, 1, 0, 5, 4, 4])},
        "an index of -1": lambda: {"sorted_indices": ints([3, 1, 0, 5, 4, -1])},
        "too few indices": lambda: {"sorted_indices": ints([3, 1, 0, 4, 2])},
        "shares for other tokens": lambda: {"probs": floats(2, 2)},
        "no shares": lambda: {"probs": None},
        "padding": lambda: {"padded_mode": True},
    },
    "npu_format_cast": {
        "an unknown format": lambda: {"acl_format": 3},
        "a transposed view": lambda: {"input": half(48, 32).t()},
    },
}
CASES = [(call, mistake) for call, changes in MISTAKES.items() for mistake in changes]


def run(call: str, changes: Call) -> Any:
    operator = getattr(torch.ops.npu, call.partition(" ")[0])
    return operator(**{**GOOD[call](), **changes})


@pytest.mark.parametrize("call", GOOD)
def test_right_calls_pass(call: str) -> None:
    run(call, {})


@pytest.mark.parametrize(("call", "mistake"), CASES, ids=[f"{call}: {mistake}" for call, mistake in CASES])
def test_mistake_is_caught(call: str, mistake: str) -> None:
    changes = MISTAKES[call][mistake]()
    with pytest.raises((Mistake, RuntimeError, TypeError)) as caught:
        run(call, changes)
    assert "is not emulated" not in str(caught.value)


def caught_by_torch_npu(call: str, mistake: str) -> bool:
    changes = MISTAKES[call][mistake]()
    arguments = {**GOOD[call](), **changes}
    try:
        meta = tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), arguments
        )
        getattr(torch.ops.npu, call.partition(" ")[0])(**meta)
    except (RuntimeError, TypeError, IndexError):
        return True
    return False


def test_torch_npu_alone_catches_few() -> None:
    """Why the emulator's own rules are needed. It fails if torch_npu's shape functions grow strict: good news."""
    caught = [case for case in CASES if case[0] != "npu_format_cast" and caught_by_torch_npu(*case)]
    assert len(CASES) >= 39
    assert len(caught) < len(CASES) / 3


def test_what_is_not_emulated_is_refused() -> None:
    with pytest.raises(Mistake, match="npu_gelu is not emulated"):
        torch.ops.npu.npu_gelu(half(3, 4))
    with pytest.raises(Mistake, match=r"aten::erf.* is not emulated"):
        torch.erf(half(3, 4))

"""torch's own operations on NPU tensors: which the emulator lets the CPU do, and which torch_npu does itself."""

from __future__ import annotations

# Done by the CPU on the device's memory: names without overload.
HOST = frozenset(
    """add sub mul div neg abs cat stack index index_select index_put _index_put_impl_ index_put_ embedding gather
    copy_ _to_copy clone contiguous fill_ zero_ zeros ones full full_like zeros_like ones_like empty_like arange where
    mm addmm bmm baddbmm matmul linear sum mean max amax min argmax cumsum cumsum_ sort topk softmax _softmax sigmoid
    silu silu_ mul_ add_ div_ eq ne ge gt le lt eq_ bitwise_and logical_and bitwise_or logical_or bitwise_not any all
    nonzero masked_fill masked_fill_ isfinite repeat_interleave bincount triu tril rsqrt square pow floor_divide
    remainder new_empty_strided _log_softmax log_softmax normal_ uniform_ randn rand exponential_ diff repeat
    sub_ clamp masked_select ceil isinf isnan isneginf isposinf round exp floor_divide_ equal""".split()
)

# Done by torch_npu itself: they allocate, change shapes, or bring a number to the host, and compute nothing.
KEPT = frozenset(
    """empty.memory_format empty_strided empty_with_format empty_with_swapped_memory unsafe_empty_with_format
    view as_strided _reshape_alias _unsafe_view unsqueeze unsqueeze_ squeeze squeeze.dim squeeze.dims
    squeeze_ squeeze_.dim
    set_ set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor resize_ _local_scalar_dense is_pinned
    _pin_memory record_stream is_set_to view_as_real view_as_complex get_npu_format get_storage_size
    _npu_storage_resize npu_change_data_ptr""".split()
)

"""Simulated device memory as the host sees it: the same bytes as CPU tensors, and the NZ layout."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

ND, NZ = 2, 29
BLOCK = 16  # rows of a fractal
FRACTAL_BYTES = 32  # of a fractal's row


class Mistake(RuntimeError):  # noqa: N818
    """A call breaks a documented constraint; real hardware would refuse it, or worse, compute something else."""


def need(condition: bool, operation: str, what: str) -> None:
    """Raises Mistake unless `condition` holds; `what` is the constraint in words."""
    if not condition:
        raise Mistake(f"{operation}: {what}")


def is_fake(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"


def format_of(tensor: Tensor) -> int:
    """ND or NZ; ND for fake tensors, which know no layout."""
    if is_fake(tensor) or tensor.device.type != "npu":
        return ND
    import torch_npu

    return NZ if torch_npu.get_npu_format(tensor) == NZ else ND


def host(tensor: Tensor) -> Tensor:
    """A device tensor's bytes as a CPU tensor that shares them; a CPU tensor as it is. Raises Mistake for NZ."""
    if tensor.device.type != "npu":
        return tensor
    need(format_of(tensor) == ND, "memory", "a tensor in NZ layout is read as if it were ND")
    return _bytes(tensor).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def device_like(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's content on the device, with its strides."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    host(out).copy_(tensor)
    return out


def to_host(tree: Any) -> Any:
    """All device tensors in a structure as CPU tensors; those in NZ layout are read as it says."""
    return tree_map_only(Tensor, lambda t: reader(t)(), tree)


def to_device(tree: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda t: device_like(t, device), tree)


def to_nz(matrix: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor [..., R, C] → a device tensor of the same shape whose memory has the NZ layout."""
    import torch_npu

    out: Tensor = torch_npu.empty_with_format(tuple(matrix.shape), dtype=matrix.dtype, device=device, acl_format=NZ)
    rows, columns, width = matrix.shape[-2], matrix.shape[-1], FRACTAL_BYTES // matrix.element_size()
    padded = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % BLOCK))
    fractals = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, BLOCK))  # [..., R/16, 16, C/w, w]
    laid = fractals.movedim(-2, -4).contiguous()  # [..., C/w, R/16, 16, w]
    raw = _bytes(out)
    need(laid.numel() <= raw.numel(), "npu_format_cast", f"{laid.numel()} elements in NZ layout need more memory")
    raw[: laid.numel()].copy_(laid.flatten())
    return out


def from_nz(tensor: Tensor) -> Tensor:
    """A device tensor in NZ layout → its content as a CPU tensor. Raises Mistake for a view that cuts fractals."""
    return reader(tensor)()


def reader(tensor: Tensor) -> Callable[[], Tensor]:
    """What gives a device tensor's content as a CPU tensor, now or later: whatever lies at its address by then."""
    if format_of(tensor) != NZ:
        now = host(tensor)
        return lambda: now
    turned = tensor.dim() > 1 and not tensor.is_contiguous() and tensor.transpose(-1, -2).is_contiguous()
    whole = (tensor.is_contiguous() or turned) and tensor.storage_offset() == 0
    need(whole, "memory", "a view of a tensor in NZ layout is read; only the whole or its transpose can be")
    shape = tensor.transpose(-1, -2).shape if turned else tensor.shape
    rows, columns, width = shape[-2], shape[-1], FRACTAL_BYTES // tensor.element_size()
    blocks = (*shape[:-2], -(-columns // width), -(-rows // BLOCK), BLOCK, width)
    laid = _bytes(tensor)[: torch.Size(blocks).numel()].view(blocks)

    def read() -> Tensor:
        matrix = laid.movedim(-4, -2).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
        return matrix.transpose(-1, -2) if turned else matrix

    return read


def _bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, as a flat CPU tensor of its dtype that shares it."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size() * tensor.element_size()
    if size == 0:
        return torch.empty(0, dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype)


Kernel = Callable[..., Any]

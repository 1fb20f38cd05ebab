"""Captured graphs: operations that are noted instead of done, and done when torch_npu executes the graph.

The real `torch.npu.NPUGraph` runs on the graphs of the simulated device, which keep the order of operations and events.
What an operation is, is kept here by number. As on a device a capture computes nothing: results have shapes, by the
shape functions alone, and memory of the graph's pool. An execution reads and writes the addresses that were captured,
whatever lies there by then.

What a device would not survive is a Mistake: shapes that depend on values, the host's memory in a captured operation,
memory from outside that was given back since, lists of lengths that were not updated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from emulator.host import Mistake, device_like, host, need, reader


@dataclass(frozen=True, slots=True)
class Noted:
    """A captured operation: its name, what does it, and the storages that it reads or writes."""

    name: str
    run: Callable[[], None]
    storages: tuple[StorageWeakRef, ...]


class Graphs:
    """The captured operations of a process, and the simulated runtime's side of them."""

    def __init__(self) -> None:
        self._acl = ctypes.CDLL("libascendcl.so")  # the simulated one, loaded before
        self._acl.sim_note.restype = ctypes.c_long
        self._acl.sim_note.argtypes = (ctypes.c_void_p, ctypes.c_long)
        for query in (self._acl.sim_capturing, self._acl.sim_updating):
            query.argtypes = (ctypes.c_void_p,)
        self._noted: dict[int, Noted] = {}
        self._count = 0
        self._outside: list[tuple[int, int]] | None = None  # addresses in use before the capture began
        self._execute = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)(self._run)
        self._acl.sim_set_execute(self._execute)

    def here(self) -> bool:
        """Whether an operation on the current stream belongs to a graph, instead of being done."""
        if not self._acl.sim_active():
            self._outside = None
            return False
        stream = _stream()
        return bool(self._acl.sim_capturing(stream) or self._acl.sim_updating(stream))

    def note(self, name: str, run: Callable[[], None], tree: Any) -> None:
        """An operation of the graph; `run` does it, on the memory of the tensors in `tree`."""
        updating = bool(self._acl.sim_updating(_stream()))
        outside = [] if updating else self._from_outside(tree)
        self._count += 1
        old = self._acl.sim_note(_stream(), self._count)
        need(old >= 0, name, "an update has more operations than the group of tasks that was captured")
        if updating:
            captured = self._noted.pop(old)
            need(captured.name == name, name, f"a task of {captured.name} is updated by another operation")
            outside = list(captured.storages)
        self._noted[self._count] = Noted(name, run, tuple(outside))

    def abandon(self) -> None:
        """An update that failed half-way is over."""
        self._acl.sim_abandon()

    def _from_outside(self, tree: Any) -> list[StorageWeakRef]:
        """The storages that the graph's pool does not hold; they must outlive the graph."""
        if self._outside is None:
            import torch_npu

            self._outside = [
                (block["address"], block["address"] + block["size"])
                for segment in torch_npu.npu.memory_snapshot()
                for block in segment["blocks"]
                if block["state"] == "active_allocated" and tuple(segment["segment_pool_id"]) == (0, 0)
            ]
        found = []
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.device.type == "npu" and tensor.numel():
                storage = tensor.untyped_storage()
                if any(first <= storage.data_ptr() < end for first, end in self._outside):
                    found.append(StorageWeakRef(storage))
        return found

    def _run(self, number: int) -> int:
        noted = self._noted[number]
        try:
            gone = any(storage.expired() for storage in noted.storages)
            need(not gone, noted.name, "memory that the graph uses was given back after the capture")
            with torch.inference_mode():
                noted.run()
        except Exception as error:  # what a device would report, goes through torch_npu
            self._acl.sim_say(f"{type(error).__name__}: {error}".encode())
            return 1
        return 0


def _stream() -> int:
    import torch_npu

    return int(torch_npu.npu.current_stream().npu_stream)


def readers(tree: Any) -> Callable[[], Any]:
    """Device tensors in a structure → what gives their content later, as CPU tensors on the same memory."""
    leaves = tree_map_only(Tensor, lambda t: _Later(reader(t)), tree)
    return lambda: tree_map_only(_Later, lambda later: later.read(), leaves)


@dataclass(frozen=True, slots=True)
class _Later:
    read: Callable[[], Tensor]


def refuse_host(name: str, tree: Any) -> None:
    """Raises Mistake for tensors of the host; single numbers pass, they become a part of the graph."""
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            need(tensor.dim() == 0, name, "a captured operation reads or writes a tensor of the host")


def shapes(name: str, operator: Any, args: Any, kwargs: Any) -> Any:
    """An operation's results on the "meta" device. Raises Mistake where they depend on values."""
    meta = torch.device("meta")
    args, kwargs = tree_map_only(torch.device, lambda _: meta, tree_map_only(Tensor, as_meta, (args, kwargs)))
    kwargs.pop("pin_memory", None)
    try:
        return operator(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        raise Mistake(f"{name} can't be captured: {str(error).splitlines()[0]}") from error


def as_meta(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":  # a number
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def results_like(meta: Any, device: torch.device) -> tuple[Any, Callable[[Any], None]]:
    """Uncomputed results on the device, and what fills them in later."""
    made = tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device), meta)
    memory = [host(t) for t in tree_leaves(made) if isinstance(t, Tensor)]

    def fill(results: Any) -> None:
        found = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        for target, result in zip(memory, found, strict=True):
            if target.shape != result.shape:
                raise Mistake(f"a result is {list(result.shape)} where {list(target.shape)} was captured")
            target.copy_(result)

    return made, fill


__all__ = ["Graphs", "as_meta", "device_like", "readers", "refuse_host", "results_like", "shapes"]

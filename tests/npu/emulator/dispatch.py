"""Puts the emulator's kernels in the place of torch_npu's on its real operators, for all threads of the process.

Whatever torch_npu registers for NPU tensors and the emulator does not implement raises, so nothing passes in silence.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from emulator import rules
from emulator.aten import HOST, KEPT
from emulator.host import Mistake, device_like, host, need, to_device, to_host
from emulator.kernels import KERNELS

META_MISSING = {"npu_format_cast", "_npu_reshape_and_cache", "_npu_paged_attention"}  # torch_npu has no shape function
CALLS: dict[str, int] = {}  # how often each operation of torch_npu ran: tests ask whether it ran at all


def install() -> list[torch.library.Library]:
    """Registers everything → the libraries, which must stay alive."""
    libraries = {name: torch.library.Library(name, "IMPL") for name in ("aten", "npu", "atb")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for full in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
            space, _, name = full.partition("::")
            if space in libraries and name not in KEPT:
                libraries[space].impl(name, _kernel(space, name), "PrivateUse1", allow_override=True)
        libraries["npu"].impl("npu_format_cast", lambda input, acl_format, **_: torch.empty_like(input), "Meta")
    return list(libraries.values())


def _kernel(space: str, name: str) -> Any:
    packet, _, overload = name.partition(".")
    if space == "aten" and packet in HOST:
        return partial(_on_host, getattr(getattr(torch.ops.aten, packet), overload or "default"))
    if space != "aten" and name in KERNELS:
        return partial(_emulate, getattr(getattr(torch.ops, space), name).default)
    return partial(_refuse, f"{space}::{name}")


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise Mistake(f"{name} is not emulated; write its reference in tests/npu/emulator, or use an operation that is")


def _on_host(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """One of torch's own operations, done by the CPU on the device's memory."""
    device = next(
        (t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "npu"), None
    )
    device = device or torch.device(kwargs.get("device") or "npu:0")
    cpu = torch.device("cpu")
    moved_args, moved = tree_map_only(torch.device, lambda _: cpu, to_host((args, kwargs)))
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else device
    moved.pop("pin_memory", None)
    result = operator(*moved_args, **moved)
    written = _written(operator, args, kwargs)
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    return result if target.type == "cpu" else to_device(result, target)


def _written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    found = []
    for number, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[number] if number < len(args) else kwargs[argument.name])
    return found


def _emulate(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """One of torch_npu's operations: rules, reference, and its own shape function to compare with."""
    name = operator._schema.name.partition("::")[2]
    CALLS[name] = CALLS.get(name, 0) + 1
    bound = rules.bind(operator, args, kwargs)
    rules.check(name, bound)
    device = next(t.device for t in tree_leaves(bound) if isinstance(t, Tensor))
    if name == "npu_format_cast":
        return KERNELS[name](**bound)
    expected = (
        None
        if name in META_MISSING
        else operator(*tree_map_only(Tensor, _meta, args), **tree_map_only(Tensor, _meta, kwargs))
    )
    result = KERNELS[name](**to_host(bound))
    if expected is not None:
        _compare(name, result, expected)
    return tree_map_only(Tensor, lambda t: device_like(t.contiguous(), device), result)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _compare(name: str, result: Any, expected: Any) -> None:
    """Raises Mistake where a result is not of the shape and dtype that torch_npu says it has."""
    (got, _), (want, _) = tree_flatten(result), tree_flatten(expected)
    need(len(got) == len(want), name, f"torch_npu gives {len(want)} results, the reference {len(got)}")
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        need(
            a.shape == b.shape and a.dtype == b.dtype,
            name,
            f"result {number} is {list(b.shape)} {b.dtype} for torch_npu but {list(a.shape)} {a.dtype} here",
        )


__all__ = ["CALLS", "host", "install"]

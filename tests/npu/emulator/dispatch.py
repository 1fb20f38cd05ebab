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
from emulator.graphs import Graphs, readers, refuse_host, results_like, shapes
from emulator.host import Mistake, device_like, host, need, to_device, to_host
from emulator.kernels import FAKES, KERNELS

# torch_npu has no shape function for these, nor for those in FAKES, which graphs need.
META_MISSING = {"npu_format_cast", "_npu_reshape_and_cache", "_npu_paged_attention"}
GRAPHS = Graphs()
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
        libraries["npu"].impl("npu_convert_weight_to_int4pack", FAKES["npu_convert_weight_to_int4pack"], "Meta")
    return list(libraries.values())


def _kernel(space: str, name: str) -> Any:
    packet, _, overload = name.partition(".")
    if space == "aten" and packet in HOST:
        return partial(_on_host, getattr(getattr(torch.ops.aten, packet), overload or "default"))
    if space != "aten" and name in KERNELS:
        return partial(_emulate, name, getattr(getattr(getattr(torch.ops, space), packet), overload or "default"))
    return partial(_refuse, f"{space}::{name}")


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise Mistake(f"{name} is not emulated; write its reference in tests/npu/emulator, or use an operation that is")


def _on_host(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """One of torch's own operations, done by the CPU on the device's memory."""
    device = next(
        (t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "npu"), None
    )
    device = device or torch.device(kwargs.get("device") or "npu:0")
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else device
    written = _written(operator, args, kwargs)
    if GRAPHS.here():
        return _captured(operator, args, kwargs, target, written)
    result = _on_cpu(operator, *to_host((args, kwargs)))
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    return result if target.type == "cpu" else to_device(result, target)


def _on_cpu(operator: Any, args: Any, kwargs: Any) -> Any:
    cpu = torch.device("cpu")
    args, kwargs = tree_map_only(torch.device, lambda _: cpu, (args, kwargs))
    kwargs.pop("pin_memory", None)
    return operator(*args, **kwargs)


def _captured(operator: Any, args: Any, kwargs: Any, target: torch.device, written: list[Any]) -> Any:
    """As `_on_host`, for later."""
    name = str(operator._schema.name)
    refuse_host(name, (args, kwargs))
    need(target.type != "cpu", name, "a captured operation brings its result to the host")
    expected, later = shapes(name, operator, args, kwargs), readers((args, kwargs))
    if written:
        GRAPHS.note(name, lambda: _on_cpu(operator, *later()), (args, kwargs))
        return written[0] if len(written) == 1 else tuple(written)
    made, fill = results_like(expected, target)
    GRAPHS.note(name, lambda: fill(_on_cpu(operator, *later())), (args, kwargs))
    return made


def _written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    found = []
    for number, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[number] if number < len(args) else kwargs[argument.name])
    return found


def _emulate(name: str, operator: Any, *args: Any, **kwargs: Any) -> Any:
    """One of torch_npu's operations: rules, reference, and its own shape function to compare with."""
    CALLS[name] = CALLS.get(name, 0) + 1
    bound = rules.bind(operator, args, kwargs)
    rules.check(name, bound)
    device = next(t.device for t in tree_leaves(bound) if isinstance(t, Tensor))
    if GRAPHS.here():
        refuse_host(name, bound)
        need(name not in META_MISSING, name, "it is not modelled in graphs")
    if name == "npu_format_cast":
        return KERNELS[name](**bound)
    expected = None
    if name in FAKES:
        expected = FAKES[name](**tree_map_only(Tensor, _meta, bound))
    elif name not in META_MISSING:
        expected = operator(*tree_map_only(Tensor, _meta, args), **tree_map_only(Tensor, _meta, kwargs))
    if GRAPHS.here():
        return _emulate_later(name, bound, expected, device)
    result = KERNELS[name](**to_host(bound))
    if expected is not None:
        _compare(name, result, expected)
    if result is not None and "out" in bound:
        return tuple(bound["out"])
    return tree_map_only(Tensor, lambda t: device_like(t.contiguous(), device), result)


def _emulate_later(name: str, bound: dict[str, Any], expected: Any, device: torch.device) -> Any:
    """As `_emulate`, for when the graph is executed."""
    later = readers(bound)
    made, fill = results_like(expected, device)

    def run() -> None:
        result = KERNELS[name](**later())
        if expected is not None:
            _compare(name, result, expected)
        if "out" not in bound:
            fill(result)

    GRAPHS.note(name, run, bound)
    return tuple(bound["out"]) if "out" in bound else made


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

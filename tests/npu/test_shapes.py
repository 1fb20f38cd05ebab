"""A decoder layer at the true sizes of 8x7B and 8x22B, on fake tensors: torch_npu's schemas and shape functions, and
the rules of the emulator, for every scheme and the share of each of 1 to 8 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulator import rules
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from eightfold.ops import Batch, Expert, Pages, Rope
from eightfold.ops.npu import NpuOps, experts
from eightfold.ops.npu.attention import Lengths
from eightfold.ops.npu.weights import Grouped

MODELS = {
    "8x7B": {"hidden": 4096, "width": 14336, "heads": 32, "kv_heads": 8, "vocab": 32000},
    "8x22B": {"hidden": 6144, "width": 16384, "heads": 48, "kv_heads": 8, "vocab": 32768},
}
DIM, EXPERTS, CHOSEN, PAGE = 128, 8, 2, 128
BATCHES = {
    "decode": [(1, 4096)] * 64,
    "mixed": [(1, 32768), (1000, 5000), (1, 1), (1046, 1046)],
    "one token": [(1, 65536)],
}


class Watch(TorchDispatchMode):
    """Checks each call of torch_npu's operations by the emulator's rules."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("npu", "atb"):
            name = func._schema.name.partition("::")[2]
            rules.check(name, rules.bind(func, args, kwargs))
            self.seen.append(name)
        return func(*args, **kwargs)


@contextmanager
def fake() -> Iterator[Watch]:
    with FakeTensorMode(), Watch() as watch:
        yield watch


def weight(rows: int, columns: int, scheme: str, dtype: torch.dtype) -> Any:
    if scheme == "w4a16":
        packed = {"weight_packed": torch.empty(rows, columns // 8, dtype=torch.int32)}
        scales = {"weight_scale": torch.empty(rows, columns // 32, dtype=dtype)}
        return SimpleNamespace(scheme=scheme, shape=(rows, columns), parts=packed | scales)
    parts: dict[str, Tensor] = {"weight": torch.empty(rows, columns, dtype=dtype if scheme == "dense" else torch.int8)}
    if scheme != "dense":
        parts["weight_scale"] = torch.empty(rows, 1)
    return SimpleNamespace(scheme=scheme, shape=(rows, columns), parts=parts)


def batch_of(rows: list[tuple[int, int]]) -> tuple[Batch, Lengths]:
    tokens, widest = sum(n for n, _ in rows), max(-(-length // PAGE) for _, length in rows)

    def on_device(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="npu:0")

    batch = Batch(
        on_device(tokens, dtype=torch.int64),
        on_device(tokens),
        on_device(tokens, dtype=torch.int64),
        on_device(len(rows) + 1),
        on_device(len(rows)),
        on_device(len(rows), widest),
        on_device(len(rows), dtype=torch.int64),
    )
    ends = [sum(n for n, _ in rows[: number + 1]) for number in range(len(rows))]
    return batch, Lengths(batch, ends, [length for _, length in rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("scheme", ["dense", "w8a8", "w8a16", "w4a16"])
@pytest.mark.parametrize("model", MODELS)
def test_layer(model: str, scheme: str, ranks: int, dtype: torch.dtype) -> None:
    size = SimpleNamespace(**MODELS[model])
    heads, kv_heads, width = size.heads // ranks, max(1, size.kv_heads // ranks), size.width // ranks
    ops = NpuOps(dtype)
    with fake() as watch:
        norm, gate = (
            ops.prepare_tensor(torch.empty(*s, dtype=dtype)) for s in ((size.hidden,), (EXPERTS, size.hidden))
        )
        rope = Rope(*(ops.prepare_tensor(torch.empty(65536, DIM // 2)) for _ in "cs"))
        qkv = ops.prepare_linear([weight(n * DIM, size.hidden, scheme, dtype) for n in (heads, kv_heads, kv_heads)])
        o = ops.prepare_linear([weight(size.hidden, heads * DIM, scheme, dtype)])
        head = ops.prepare_linear([weight(size.vocab, size.hidden, "dense", dtype)])
        table = ops.prepare_tensor(torch.empty(size.vocab, size.hidden, dtype=dtype))
        layer = ops.prepare_experts(
            [
                Expert(
                    *(
                        weight(*s, scheme, dtype)
                        for s in ((width, size.hidden), (size.hidden, width), (width, size.hidden))
                    )
                )
                for _ in range(EXPERTS)
            ]
        )
        kinds: list[Pages] = [ops.new_pages(1024, PAGE, kv_heads, DIM, kind) for kind in (dtype, torch.int8)]
        for rows, pages in product(BATCHES.values(), kinds):
            batch, ops._lengths = batch_of(rows)
            tokens = len(batch.ids)
            x, residual = ops.rms_norm(ops.embed(batch.ids, table), norm, 1e-5)
            q = ops.rope_write_kv(ops.linear(x, qkv), rope, batch, pages)
            assert q.shape == (tokens, heads, DIM)
            x = ops.linear(ops.attention(q, batch, pages), o)
            x, residual = ops.rms_norm(x, norm, 1e-5, residual)
            x = ops.moe(x, *ops.route(x, gate, CHOSEN), layer)
            assert x.shape == residual.shape == (tokens, size.hidden)
            assert x.dtype == residual.dtype == dtype
            assert x.device.type == "npu"
            assert ops.linear(x, head).shape == (tokens, size.vocab)
    fused = scheme == "w8a8" and 2 * width <= 10240
    assert ("npu_grouped_matmul_swiglu_quant" in watch.seen) == fused


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["dense", "w8a8", "w8a16", "w4a16"])
def test_experts_of_one_rank(scheme: str, ranks: int) -> None:
    """Expert parallel: some experts, whole; the others' tokens are left out."""
    dtype, count = torch.bfloat16, EXPERTS // ranks
    ops = NpuOps(dtype)
    with fake():
        layer = ops.prepare_experts(
            [
                Expert(*(weight(*s, scheme, dtype) for s in ((14336, 4096), (4096, 14336), (14336, 4096))))
                for _ in range(count)
            ]
        )
        x = torch.empty(100, 4096, dtype=dtype, device="npu:0")
        ids, shares = torch.empty(100, 2, dtype=torch.int32, device="npu:0"), torch.empty(100, 2, device="npu:0")
        assert isinstance(layer.experts, Grouped)
        assert experts.grouped(x, ids, shares, layer.experts, count, EXPERTS).shape == x.shape

"""Weights on the NPU: moved tensor by tensor, laid out once as the fused products want them.

A product's handle has `__call__(x)`, x [T, in] of the compute dtype → [T, out] of the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.ops import Expert, Weight
from eightfold.ops.npu.device import FRACTAL_NZ, Device
from eightfold.parallel import Group, Ranks
from eightfold.parallel.device import DeviceGroup
from eightfold.types import EightfoldError

LARGEST_AXIS = 65535  # of int8 products: rows and columns of a matrix
LARGEST_FUSED_WIDTH = 10240  # 2·I of npu_grouped_matmul_swiglu_quant, from the documentation of CANN's operator
ADDING_FROM = 128  # tokens from which a product that adds up over ranks is taken: documented as not for decoding
ADDING_RANKS = (2, 4, 8)  # documented, on 800I A2 with every device linked to every other
SCHEMES = ("dense", "w8a8", "w8a16", "w4a16")
PACKED = 8  # int4 numbers of an int32
GROUP_UNIT = 32  # inputs that share a scale, or a multiple


class Product(Protocol):
    """A prepared matrix."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Adding(Product, Protocol):
    """One that can add up over the ranks that share its columns, while it multiplies."""

    def added(self, x: Tensor, ranks: str) -> Tensor:
        """The sum over the ranks of a communicator, by its name, in the compute dtype and an order of its choice."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix [N, K] of the compute dtype."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def added(self, x: Tensor, ranks: str) -> Tensor:
        return _mm_all_reduce(x, self.weight.t(), ranks)


@dataclass(frozen=True, slots=True)
class Int8:
    """int8 [K, N] and fp32 scales [N]; activations are quantized token by token."""

    weight: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        q, scale = torch.ops.npu.npu_dynamic_quant(x)  # int8 [T, K], fp32 [T]
        y: Tensor = torch.ops.npu.npu_quant_matmul(
            q, self.weight, self.scale, pertoken_scale=scale, output_dtype=x.dtype
        )
        return y

    def added(self, x: Tensor, ranks: str) -> Tensor:
        q, scale = torch.ops.npu.npu_dynamic_quant(x)
        # Beside bf16 results bf16 scales are documented, and only these tell the results' dtype.
        own = self.scale.to(x.dtype) if x.dtype == torch.bfloat16 else self.scale
        return _mm_all_reduce(q, self.weight, ranks, dequant_scale=own, pertoken_scale=scale)


@dataclass(frozen=True, slots=True)
class WeightOnly:
    """int8 [K, N], a transposed view of the rows as stored, and scales [N] of the compute dtype."""

    weight: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(x, self.weight, self.scale)
        return y

    def added(self, x: Tensor, ranks: str) -> Tensor:
        return _mm_all_reduce(
            x, self.weight, ranks, antiquant_scale=self.scale, antiquant_offset=torch.zeros_like(self.scale)
        )


@dataclass(frozen=True, slots=True)
class Int4:
    """int4 [K, N], packed by torch_npu into [K, N / 8] int32; scales [K / group, N] of the compute dtype, or [1, N]."""

    weight: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        groups = len(self.scale)
        y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            x, self.weight, self.scale, antiquant_group_size=x.shape[1] // groups if groups > 1 else 0
        )
        return y


@dataclass(frozen=True, slots=True)
class Grouped:
    """A layer's experts for the grouped products: w1 and w3 side by side, [E, H, 2·I], and w2 [E, I, H].

    Scales are None for dense weights; for int8 [E, 2·I] and [E, H], of the dtypes that the products ask for. int4 is
    packed, [E, H, 2·I / 8], with scales [E, groups, 2·I], or as int8's where a column is one group.
    """

    scheme: str
    count: int
    w13: Tensor
    w2: Tensor
    scale13: Tensor | None = None
    scale2: Tensor | None = None
    fused: bool = False  # the first product, the activation and its quantization as one operation


@dataclass(frozen=True, slots=True)
class OneByOne:
    """A layer's experts, each with products of its own: w1 over w3, and w2."""

    experts: tuple[tuple[Product, Product], ...]

    @property
    def count(self) -> int:
        return len(self.experts)


class Share(Protocol):
    """Which experts of a layer's `total` a rank has: `first` and following; and for whom."""

    @property
    def first(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def ranks(self) -> Ranks: ...


@dataclass(frozen=True, slots=True)
class SharedExperts:
    """A rank's experts; without a share all of them."""

    experts: Grouped | OneByOne
    share: Share | None


@dataclass(frozen=True, slots=True)
class Summed:
    """A product whose columns the ranks of a group share; with a name for their communicator, long ones add up while
    they multiply."""

    product: Product
    group: Group
    communicator: str | None = None  # given only for a product that can add up

    def __call__(self, x: Tensor) -> Tensor:
        if self.communicator is not None and len(x) >= ADDING_FROM:
            return cast("Adding", self.product).added(x, self.communicator)
        return summed(self.product(x), self.group)


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x, in fp32 and in the order of the ranks."""
    return group.all_reduce_sum(x.float()).to(x.dtype)


def communicator(device: Device, ranks: Ranks, product: Product) -> str | None:
    """What operations of the device call the world of ranks; None where none may add up over it: they do so in 16 bits
    and in any order, so not for ranks that are to be exact; nor on chips, between numbers of ranks or for schemes
    without it."""
    world = ranks.world
    if (
        isinstance(product, Int4)
        or ranks.exact
        or not device.soc.adds
        or world.size not in ADDING_RANKS
        or not isinstance(world, DeviceGroup)
    ):
        return None
    backend: Any = world.process_group._get_backend(torch.device(device.name))
    return str(backend.get_hccl_comm_name(world.rank))


def _mm_all_reduce(x: Tensor, weight: Tensor, ranks: str, **scales: Tensor) -> Tensor:
    """x [T, K], weight [K, N] → [T, N], the sum over the ranks."""
    y: Tensor = torch.ops.npu.npu_mm_all_reduce_base(x, weight, ranks, reduce_op="sum", **scales)
    return y


class Uploader:
    """Moves weights to one device in one compute dtype."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.nz = os.environ.get("ATB_LLM_ENABLE_AUTO_TRANSPOSE", "1") != "0"

    def linear(self, weights: Sequence[Weight]) -> Product:
        """Matrices of one width, side by side."""
        scheme = self._scheme(weights)
        with self._memory():
            if scheme == "w4a16":
                return Int4(self._packed(weights), self._group_scales(weights))
            rows = self._stack([w.parts["weight"] for w in weights], scheme)  # [N, K]
            if scheme == "dense":
                return Dense(rows if self.device.soc.fused else self._as_nz(rows))
            _check_axes(rows)
            scale = torch.cat([self._scale(w) for w in weights])  # [N]
            if scheme == "w8a16" or not self.device.soc.fused:
                return WeightOnly(rows.t(), scale.to(self.dtype))
            return Int8(self._as_nz(rows.t().contiguous()), scale)

    def experts(self, experts: Sequence[Expert]) -> Grouped | OneByOne:
        scheme = self._scheme([w for expert in experts for w in expert])
        if not self.device.soc.fused:
            return OneByOne(tuple((self.linear([e.w1, e.w3]), self.linear([e.w2])) for e in experts))
        if scheme == "w4a16":
            return self._experts_int4(experts)
        with self._memory():
            w13 = self._grouped([(e.w1, e.w3) for e in experts], scheme)  # [E, H, 2·I]
            w2 = self._grouped([(e.w2,) for e in experts], scheme)  # [E, I, H]
            if scheme == "dense":
                return Grouped(scheme, len(experts), w13, w2)
            fused = scheme == "w8a8" and self.nz and w13.shape[2] <= LARGEST_FUSED_WIDTH
            if scheme == "w8a8":
                w13, w2 = self._as_nz(w13), self._as_nz(w2)
            # Beside bf16 results the products document bf16 scales only; the fused one takes fp32.
            narrow = torch.float32 if scheme == "w8a8" and self.dtype == torch.float16 else self.dtype
            scale13, scale2 = (
                torch.stack([torch.cat([self._scale(w) for w in group]) for group in groups])
                for groups in ([(e.w1, e.w3) for e in experts], [(e.w2,) for e in experts])
            )
            return Grouped(
                scheme, len(experts), w13, w2, scale13 if fused else scale13.to(narrow), scale2.to(narrow), fused
            )

    def _experts_int4(self, experts: Sequence[Expert]) -> Grouped:
        with self._memory():
            both: list[list[Sequence[Weight]]] = [[(e.w1, e.w3) for e in experts], [(e.w2,) for e in experts]]
            w13, w2 = (torch.stack([self._packed(group) for group in groups]) for groups in both)
            scales = [torch.stack([self._group_scales(group) for group in groups]) for groups in both]
            scale13, scale2 = (s.squeeze(1) if s.shape[1] == 1 else s for s in scales)  # a column is one group: [E, N]
            return Grouped("w4a16", len(experts), w13, w2, scale13, scale2)

    def _packed(self, weights: Sequence[Weight]) -> Tensor:
        """Matrices [n, K] side by side → [K, N / 8] int32, packed as the products want it, which torch_npu knows."""
        columns, total = weights[0].shape[1], sum(w.shape[0] for w in weights)
        if max(columns, total) > LARGEST_AXIS or total % PACKED:
            raise EightfoldError(
                f"an int4 matrix of {total} by {columns} has no NPU kernel: at most {LARGEST_AXIS} either way, and a "
                f"multiple of {PACKED} rows"
            )
        numbers = torch.empty(columns, total, dtype=torch.int32, device=self.device.name)
        start = 0
        for weight in weights:
            part = _unpacked(weight.parts["weight_packed"])
            numbers[:, start : start + len(part)].copy_(part.t().contiguous().to(self.device.name))
            start += len(part)
        packed: Tensor = torch.ops.npu.npu_convert_weight_to_int4pack(numbers)
        return packed

    def _group_scales(self, weights: Sequence[Weight]) -> Tensor:
        """[n, groups] side by side → [groups, N]."""
        scale = torch.cat([w.parts["weight_scale"].to(self.device.name, self.dtype) for w in weights])  # [N, groups]
        columns, groups = weights[0].shape[1], scale.shape[1]
        if groups > 1 and columns // groups % GROUP_UNIT:
            raise EightfoldError(
                f"w4a16 in groups of {columns // groups} has no NPU kernel: they must be multiples of {GROUP_UNIT}"
            )
        return scale.t().contiguous()

    def tensor(self, tensor: Tensor) -> Tensor:
        """A norm in the compute dtype, since the fused norms want one dtype; anything else as it is."""
        with self._memory():
            norm = tensor.dim() == 1 and tensor.is_floating_point()
            return tensor.to(self.device.name, self.dtype if norm else tensor.dtype)

    def _scheme(self, weights: Sequence[Weight]) -> str:
        schemes = {w.scheme for w in weights}
        if len(schemes) > 1:
            raise EightfoldError(
                f"weights of the schemes {', '.join(sorted(schemes))} stand side by side; one is wanted"
            )
        scheme = schemes.pop()
        if scheme not in SCHEMES:
            raise EightfoldError(f"scheme {scheme} has no NPU kernel; there are {', '.join(SCHEMES)}")
        if scheme == "w4a16" and not self.device.soc.fused:
            raise EightfoldError(f"scheme w4a16 has no kernel on {self.device.chip} ({self.device.soc.products})")
        if scheme != "dense" and self.dtype == torch.float32:
            raise EightfoldError(f"scheme {scheme} has no NPU kernel for float32: use --dtype bfloat16 or float16")
        return scheme

    def _stack(self, parts: Sequence[Tensor], scheme: str) -> Tensor:
        """Matrices [n, K] on the host → one [N, K] on the device, one upload after the other."""
        dtype = self.dtype if scheme == "dense" else torch.int8
        if len(parts) == 1:
            return parts[0].to(self.device.name).to(dtype).contiguous()
        total = torch.empty(sum(len(p) for p in parts), parts[0].shape[1], dtype=dtype, device=self.device.name)
        first = 0
        for part in parts:
            total[first : first + len(part)].copy_(part.to(self.device.name))
            first += len(part)
        return total

    def _grouped(self, groups: Sequence[Sequence[Weight]], scheme: str) -> Tensor:
        """For each expert matrices [n, K] side by side → [E, K, N]; weight-only ones as views of rows [E, N, K]."""
        first = groups[0]
        rows, columns = sum(w.shape[0] for w in first), first[0].shape[1]
        if scheme != "dense" and max(rows, columns) > LARGEST_AXIS:
            raise EightfoldError(
                f"an int8 matrix of {rows} by {columns} is too large: at most {LARGEST_AXIS} either way"
            )
        dtype = self.dtype if scheme == "dense" else torch.int8
        out = torch.empty(len(groups), columns, rows, dtype=dtype, device=self.device.name)
        for number, group in enumerate(groups):
            start = 0
            for weight in group:
                part = weight.parts["weight"]
                out[number, :, start : start + len(part)].copy_(part.to(self.device.name).t())
                start += len(part)
        return out

    def _scale(self, weight: Weight) -> Tensor:
        return weight.parts["weight_scale"].reshape(-1).to(self.device.name, torch.float32)

    def _as_nz(self, matrix: Tensor) -> Tensor:
        if not self.nz:
            return matrix
        cast: Tensor = torch.ops.npu.npu_format_cast(matrix, FRACTAL_NZ)
        return cast

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """An EightfoldError that says how much there is where the device's memory does not suffice."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            free, total = (x / 2**30 for x in (self.device.free_memory(), self.device.total_memory()))
            raise EightfoldError(
                f"{self.device.name} ({self.device.chip}) has {free:.1f} of {total:.1f} GiB of memory left, too little "
                "for the weights: use more devices, or a quantized model"
            ) from error


def _unpacked(packed: Tensor) -> Tensor:
    """[n, K / 8] int32, each of eight numbers + 8, the first in the lowest bits → [n, K] int32 in -8 … 7."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed[..., None] >> shifts & 15) - 8).flatten(-2)


def _check_axes(matrix: Tensor) -> None:
    if max(matrix.shape) > LARGEST_AXIS:
        raise EightfoldError(
            f"an int8 matrix of {matrix.shape[0]} by {matrix.shape[1]} is too large: at most {LARGEST_AXIS} either way"
        )

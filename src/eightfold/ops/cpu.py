"""The CPU backend: the contract over the native kernels of `eightfold._native`.

Activations are fp32 in memory. Where the compute dtype is bfloat16, the input of a matrix product is rounded to it,
queries and probabilities too where keys and values are bf16 (to 16-bit integers where these are int8 and the processor
has VNNI); with float16 nothing is rounded, so nothing overflows.
Weights are used where they lie, at any alignment and row stride.

A token's results are bitwise the same in any batch, in any chunks, at any page size and on any number of threads, for
one instruction set; another instruction set adds in another order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from eightfold import _native
from eightfold.machine import usable_cores
from eightfold.ops import ORDERLESS, Batch, Expert, ExpertShare, Ops, Pages, Rope, Weight, exact_weight, shares_exactly
from eightfold.ops.cpu_shared import ExchangeMemory
from eightfold.parallel import Ranks
from eightfold.types import EightfoldError

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8 = 3
KV_DTYPES = {**FLOATS, torch.int8: INT8}
MOST_COLUMNS = 131071  # more products of int8 could overflow an int32 sum
MOST_MATRICES = 8
POINTWISE = ("rms_norm", "rope_write_kv", "attention", "route")
PRODUCTS = ("linear", "moe")
INT8_SCHEMES = ("w8a8", "w8a16")
SCHEMES = ("dense", *INT8_SCHEMES, "w4a16")

_Groups = tuple[int, int, int, int]
_Matrix = tuple[int, int, int, int, int, int, bool, _Groups]
_NO_GROUPS = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Linear:
    """The handle of `prepare_linear`; `native` is None without a kernel, and `reference` runs; `scales` keeps what the
    kernel reads alive. `exact`: the ranks add up integers."""

    reference: Any
    width: int
    rows: int
    native: _native.Linear | None
    scales: list[Tensor]
    ranks: Ranks | None
    exact: bool


@dataclass(frozen=True, slots=True)
class _Experts:
    reference: Any
    width: int
    native: _native.Experts | None
    scales: list[Tensor]
    ranks: Ranks | None
    exact: bool


class CpuOps(Ops):
    """Native kernels for everything but `embed`.

    `threads` is the size of its thread pool, by default the processors that this process may use; a second pool would
    fight with it, so torch is set to one thread. `isa` names a kernel variant, by default what EIGHTFOLD_CPU_ISA says
    or else the best that the processor can run. What no kernel supports goes to the torch reference, with one warning,
    or is refused with EightfoldError if `strict_kernels`.
    """

    name: ClassVar[str] = "cpu"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        strict_kernels: bool = False,
        isa: str | None = None,
    ) -> None:
        if dtype not in FLOATS:
            raise EightfoldError(f"dtype is {dtype}; it must be float32, bfloat16 or float16")
        if threads is not None and threads < 1:
            raise EightfoldError(f"threads is {threads}; it must be 1 or more")
        super().__init__(dtype, "cpu")
        self.strict_kernels = strict_kernels
        self.engine = _native.Engine(threads or usable_cores(), _chosen_isa(isa))
        self._rounded = dtype == torch.bfloat16
        self._exchange = ExchangeMemory()
        self._said: set[str] = set()
        torch.set_num_threads(1)
        _native.keep_freed_memory()

    @property
    def threads(self) -> int:
        return self.engine.threads

    @property
    def isa(self) -> str:
        return self.engine.isa

    def facts(self) -> dict[str, str]:
        return {"threads": str(self.threads), "instruction set": self.isa}

    def probe(self, threads: int | None = None) -> dict[str, float]:
        """What so many threads, or this backend's, can do now: operations per second by number format, and bytes per
        second of "read"."""
        threads, isa = threads or self.threads, self.isa
        return {
            "int8": _native.probe_int8_peak(threads, 50.0, isa),
            "bf16": _native.probe_bf16_peak(threads, 50.0, isa),
            "fp32": _native.probe_fp32_peak(threads, 50.0, isa),
            "read": _native.probe_read_bandwidth(512 << 20, threads, isa),
        }

    def prepare_linear(self, weights: Sequence[Weight], ranks: Ranks | None = None) -> _Linear:
        """Weights [out, in] of the same width → the handle for `linear`. They stay where they are."""
        scales: list[Tensor] = []
        reason = None if 0 < len(weights) <= MOST_MATRICES else f"{len(weights)} matrices side by side"
        reason = reason or next((r for w in weights if (r := _unsupported(w))), None)
        exact = ranks is not None and all(exact_weight(w, ranks) for w in weights)
        if exact and len(weights) > 1:
            reason = reason or f"integer sums of {len(weights)} matrices that ranks share"
        native = None
        if reason:
            self._fall_back("linear", reason)
        else:
            native = _native.Linear(self.engine, [_matrix(w, scales) for w in weights], self._rounded)
        reference, rows = super().prepare_linear(weights, ranks), sum(w.shape[0] for w in weights)
        return _Linear(reference, weights[0].shape[1], rows, native, scales, ranks, exact)

    def prepare_experts(self, experts: Sequence[Expert], share: ExpertShare | None = None) -> _Experts:
        """A layer's experts → the handle for `moe`. They stay where they are."""
        scales: list[Tensor] = []
        reason = next((r for e in experts for w in e if (r := _unsupported(w))), None)
        native = None
        if reason:
            self._fall_back("moe", reason)
        else:
            first, total = (0, len(experts)) if share is None else share[:2]
            matrices = [[_matrix(w, scales) for w in (e.w1, e.w2, e.w3)] for e in experts]
            native = _native.Experts(self.engine, matrices, self._rounded, first, total)
        reference, ranks = super().prepare_experts(experts, share), share.ranks if share else None
        exact = ranks is not None and shares_exactly(experts, ranks)
        return _Experts(reference, experts[0].w1.shape[1], native, scales, ranks, exact)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if weight.dtype not in FLOATS:
            self._fall_back("rms_norm", f"a norm of {weight.dtype}")
            return super().rms_norm(x, weight, eps, residual)
        x, weight = _rows(x), weight.contiguous()
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = x
        if residual is not None:
            residual = _rows(residual)
            total = torch.empty_like(out)
        self.engine.rms_norm(
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr() if residual is not None else 0,
            residual.stride(0) if residual is not None else 0,
            weight.data_ptr(),
            FLOATS[weight.dtype],
            out.data_ptr(),
            total.data_ptr(),
            x.shape[0],
            x.shape[1],
            eps,
        )
        return out, total

    def linear(self, x: Tensor, linear: _Linear) -> Tensor:
        if linear.native is None:
            return super().linear(x, linear.reference)
        x = _rows(x, linear.width)
        out = torch.empty(x.shape[0], linear.rows)
        where = x.data_ptr(), x.stride(0), x.shape[0], out.data_ptr()
        if linear.ranks is not None and linear.exact:
            linear.native.run_shared(*where, self._exchange.over(linear.ranks.world, len(x), linear.rows))
            return out
        linear.native.run(*where)
        return out if linear.ranks is None else linear.ranks.world.all_reduce_sum(out)

    def rope_write_kv(self, qkv: Tensor, rope: Rope, batch: Batch, pages: Pages) -> Tensor:
        if reason := _unsupported_pages(pages):
            self._fall_back("rope_write_kv", reason)
            return super().rope_write_kv(qkv, rope, batch, pages)
        qkv, cos, sin = _rows(qkv), _rows(rope.cos).contiguous(), _rows(rope.sin).contiguous()
        count, kv_heads, size, dim = pages.k.shape
        heads = qkv.shape[1] // dim - 2 * kv_heads
        positions, slots = batch.positions.int().contiguous(), batch.slots.long().contiguous()
        q = torch.empty(qkv.shape[0], heads, dim)
        self.engine.rope_write(
            qkv.data_ptr(),
            qkv.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0],
            positions.data_ptr(),
            slots.data_ptr(),
            q.data_ptr(),
            pages.k.data_ptr(),
            pages.v.data_ptr(),
            *_scale_addresses(pages),
            KV_DTYPES[pages.k.dtype],
            _page_strides(pages.k),
            _page_strides(pages.v),
            qkv.shape[0],
            heads,
            kv_heads,
            dim,
            count,
            size,
            rope.interleaved,
        )
        return q

    def attention(self, q: Tensor, batch: Batch, pages: Pages, window: int | None = None) -> Tensor:
        if reason := _unsupported_pages(pages):
            self._fall_back("attention", reason)
            return super().attention(q, batch, pages, window)
        q = q.float().contiguous()
        starts, lens = batch.query_starts.int().contiguous(), batch.kv_lens.int().contiguous()
        table = batch.page_table.int().contiguous()
        tokens, heads, dim = q.shape
        out = torch.empty(tokens, heads * dim)
        self.engine.attention(
            q.data_ptr(),
            out.data_ptr(),
            pages.k.data_ptr(),
            pages.v.data_ptr(),
            *_scale_addresses(pages),
            KV_DTYPES[pages.k.dtype],
            _page_strides(pages.k),
            _page_strides(pages.v),
            starts.data_ptr(),
            lens.data_ptr(),
            table.data_ptr(),
            table.shape[1],
            tokens,
            lens.shape[0],
            heads,
            pages.k.shape[1],
            dim,
            pages.k.shape[0],
            pages.page_size,
            window or 0,
            self._rounded,
        )
        return out

    def route(self, x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if gate.dtype not in FLOATS:
            self._fall_back("route", f"a gate of {gate.dtype}")
            return super().route(x, gate, k)
        x, gate = _rows(x, gate.shape[1]), gate.contiguous()
        if not 0 < k <= gate.shape[0]:
            raise EightfoldError(f"{k} experts a token are wanted of {gate.shape[0]}")
        tokens = x.shape[0]
        ids, weights = torch.empty(tokens, k, dtype=torch.int32), torch.empty(tokens, k)
        self.engine.route(
            x.data_ptr(),
            x.stride(0),
            gate.data_ptr(),
            FLOATS[gate.dtype],
            gate.stride(0),
            ids.data_ptr(),
            weights.data_ptr(),
            tokens,
            x.shape[1],
            gate.shape[0],
            k,
        )
        return ids, weights

    def moe(self, x: Tensor, ids: Tensor, weights: Tensor, experts: _Experts) -> Tensor:
        if experts.native is None:
            return super().moe(x, ids, weights, experts.reference)
        x, ids, weights = _rows(x, experts.width), ids.int().contiguous(), weights.float().contiguous()
        out = torch.empty(x.shape[0], experts.width)
        (tokens, chosen), ranks = ids.shape, experts.ranks
        where = x.data_ptr(), x.stride(0), tokens, ids.data_ptr(), weights.data_ptr(), chosen, out.data_ptr()
        if ranks is None or not experts.exact:
            experts.native.run(*where)
            return out if ranks is None else ranks.world.all_reduce_sum(out)
        parts = None
        if chosen > ORDERLESS and ranks.moe_ep.size > 1:
            parts = torch.empty(min(tokens, _native.MOE_TOKENS) * chosen, experts.width)
        exchange = self._exchange.over(ranks.moe_tp, tokens * chosen, experts.width, parts, ranks.moe_ep)
        experts.native.run_shared(*where, exchange)
        return out if parts is not None else ranks.moe_ep.all_reduce_sum(out)

    @property
    def counts_work(self) -> bool:
        """So the native kernels do, and torch does not."""
        return not self._said

    def kernel(self, operation: str, scheme: str) -> str:
        native = operation in POINTWISE or (operation in PRODUCTS and scheme.partition("-")[0] in SCHEMES)
        return f"native {self.isa}" if native else "torch"

    def _fall_back(self, operation: str, reason: str) -> None:
        """Says once that the reference will run, or refuses."""
        if self.strict_kernels:
            raise EightfoldError(
                f"{operation} has no native kernel for {reason}; without strict_kernels torch would run it"
            )
        message = f"{operation} has no native kernel for {reason}: the torch reference runs it, slowly"
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _chosen_isa(isa: str | None) -> str:
    """The variant asked for by argument or environment, checked; "" leaves the choice to the extension."""
    source, name = ("isa", isa) if isa else ("EIGHTFOLD_CPU_ISA", os.environ.get("EIGHTFOLD_CPU_ISA", ""))
    if name and name not in _native.available_isas():
        known = "this processor cannot run it" if name in _native.known_isas() else "it is not known"
        raise EightfoldError(f"{source} is {name!r}, but {known}; it may be {', '.join(_native.available_isas())}")
    return name


def _rows(x: Tensor, width: int | None = None) -> Tensor:
    """x [T, width] as fp32 with adjacent columns, which is what it nearly always is already."""
    if width is not None and x.shape[1] != width:
        raise EightfoldError(f"activations are {x.shape[1]} wide where the weights are {width}")
    x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def _unsupported(w: Weight) -> str | None:
    """Why no kernel can multiply by `w`, or None."""
    if w.scheme not in SCHEMES:
        return f"scheme {w.scheme}"
    weight = w.parts["weight_packed" if w.scheme == "w4a16" else "weight"]
    if weight.device.type != "cpu":
        return f"a weight on {weight.device}"
    if w.scheme == "dense" and weight.dtype not in FLOATS:
        return f"weights of {weight.dtype}"
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return "a weight whose rows are not contiguous"
    if w.scheme == "w8a8" and weight.shape[1] > MOST_COLUMNS:
        return f"w8a8 rows of {weight.shape[1]}, more than {MOST_COLUMNS}"
    if 0 in weight.shape:
        return f"a weight of shape {list(weight.shape)}"
    if w.scheme == "w4a16" and (scale := w.parts["weight_scale"]).stride(1) != 1 and scale.shape[1] > 1:
        return "scales whose rows are not contiguous"
    return None


def _matrix(w: Weight, scales: list[Tensor]) -> _Matrix:
    """What the kernels need to know of `w`; its scales as fp32 are added to `scales`, which must outlive the kernel."""
    if w.scheme == "w4a16":
        return _int4_matrix(w)
    weight, scale = w.parts["weight"], 0
    if w.scheme in INT8_SCHEMES:
        scales.append(w.parts["weight_scale"].reshape(-1).float().contiguous())
        scale = scales[-1].data_ptr()
    code = INT8 if w.scheme in INT8_SCHEMES else FLOATS[weight.dtype]
    where = weight.data_ptr(), scale, weight.shape[0], weight.shape[1], weight.stride(0)
    return *where, code, w.scheme == "w8a16", _NO_GROUPS


def _int4_matrix(w: Weight) -> _Matrix:
    """The same of int4 weights, two in a byte; their scales are used where they lie too."""
    packed, scale = w.parts["weight_packed"], w.parts["weight_scale"]
    rows, columns = w.shape
    groups = scale.data_ptr(), FLOATS[scale.dtype], columns // scale.shape[1], scale.stride(0)
    return packed.data_ptr(), 0, rows, columns, packed.stride(0) * packed.itemsize, INT8, True, groups


def _unsupported_pages(pages: Pages) -> str | None:
    if pages.k.dtype not in KV_DTYPES or pages.v.dtype != pages.k.dtype:
        return f"keys of {pages.k.dtype} and values of {pages.v.dtype}"
    if pages.k.shape[3] > 1 and (pages.k.stride(3) != 1 or pages.v.stride(3) != 1):
        return "pages whose heads are not contiguous"
    if pages.k.dtype == torch.int8:
        for scale in (pages.k_scale, pages.v_scale):
            if scale is None or scale.shape != pages.k.shape[:3] or scale.dtype != torch.float32:
                raise EightfoldError(
                    f"int8 pages need fp32 scales of shape {list(pages.k.shape[:3])} for keys and values"
                )
            if not scale.is_contiguous():
                return "scales of pages that are not contiguous"
    return None


def _scale_addresses(pages: Pages) -> tuple[int, int]:
    if pages.k_scale is None or pages.v_scale is None:
        return 0, 0
    return pages.k_scale.data_ptr(), pages.v_scale.data_ptr()


def _page_strides(pages: Tensor) -> tuple[int, int, int]:
    return pages.stride(0), pages.stride(1), pages.stride(2)

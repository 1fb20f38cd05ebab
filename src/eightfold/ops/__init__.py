"""The operations contract, and its plain torch implementation: specification, oracle and fallback in one.

A backend is a subclass of `Ops` in a file of its own that overrides what it does better; the conformance suite
(`tests/test_ops.py`) holds it to this file. Shapes use T tokens of the batch, R rows (sequences), L logit rows,
H hidden, Hq query heads, Hkv key-value heads, D head size, E experts, K experts a token, I expert width.

Numbers: activations between operations are fp32 on the reference and on CPUs (`Ops.activation_dtype`). A matrix
product takes its input rounded to the compute dtype (`Ops.dtype`) and sums in fp32 at least. Norms, router,
softmax and the weighted sum over experts are fp32 always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.machine import available_memory
from eightfold.parallel import Group, Ranks, alone
from eightfold.types import EightfoldError

ORDERLESS = 2  # a sum of two numbers and of any number of zeros has the same bits in any order


class Weight(Protocol):
    """A matrix [out, in] of some quantization scheme, as `quant` makes them."""

    @property
    def scheme(self) -> str:
        """Name of the scheme, by which a backend picks its kernel: "dense", "w8a8", …"""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """The stored tensors by the last part of their names: "weight" and what belongs to it, as the scheme has it."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, in], in the compute dtype or fp32 → x · weightᵀ [T, out] fp32. The scheme's definition."""


@runtime_checkable
class ExactWeight(Weight, Protocol):
    """A weight of a scheme whose sums are exact, so that ranks can add up theirs without a trace."""

    def matmul_shared(self, x: Tensor, group: Group) -> Tensor:
        """This rank's columns of x and of the matrix → the whole product [T, out] fp32, the same at any group size."""


class Expert(NamedTuple):
    """One SwiGLU expert: w2(silu(w1(x)) * w3(x))."""

    w1: Weight  # [I, H]
    w2: Weight  # [H, I]
    w3: Weight  # [I, H]


class SharedLinear(NamedTuple):
    """Weights [out, in] that are this rank's columns; their product is the sum over all ranks of the world."""

    weights: tuple[Weight, ...]
    ranks: Ranks


class ExpertShare(NamedTuple):
    """Which experts of a layer's `total` a rank computes, for whom: `first` and following."""

    first: int
    total: int
    ranks: Ranks


class SharedExperts(NamedTuple):
    """This rank's experts, or its part of their widths."""

    experts: tuple[Expert, ...]
    share: ExpertShare


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation tables by position. `interleaved` pairs elements (2i, 2i+1), else (i, i + D/2)."""

    cos: Tensor  # [positions, D / 2] fp32
    sin: Tensor  # [positions, D / 2] fp32
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """A Plan as tensors on the device: R rows of n tokens each, T in all.

    Row r holds the tokens query_starts[r] … query_starts[r + 1], the last n of its kv_lens[r] positions. Token t
    writes its key and value to page slots[t] // page_size, at slots[t] % page_size.
    """

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int64
    query_starts: Tensor  # [R + 1] int32
    kv_lens: Tensor  # [R] int32
    page_table: Tensor  # [R, most pages of a row] int32, padded with 0
    logit_rows: Tensor  # [L] int64, tokens whose logits are wanted

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in Batch.__slots__))


@dataclass(frozen=True, slots=True)
class TailedBatch(Batch):
    """A batch with what is left of it once all keys and values are written: of each row the tokens from the first whose
    logits are wanted. It is for backends that compute on the host: `to` gives a plain batch, as devices would have to
    wait for the tail's lengths."""

    tail: Batch
    of_tail: Tensor  # [tail's T] int64, the numbers of its tokens here


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values of one layer: [pages, Hkv, page_size, D] each, of the KV dtype.

    int8 has scales, [pages, Hkv, page_size] fp32 each: a position's key is k · k_scale, its value v · v_scale.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.k.shape[2]


class Ops:
    """The contract and its torch reference, for any device that torch knows.

    `dtype` is the compute dtype: float32, bfloat16 or float16.
    """

    name: ClassVar[str] = "torch"
    activation_dtype: torch.dtype = torch.float32

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return torch.get_num_threads()

    @property
    def counts_work(self) -> bool:
        """Whether whoever watches this process sees it get on while an operation runs; else only between them."""
        return False

    def page_size(self, wish: int) -> int:
        """The tokens in a page, `wish` or the next larger number that `attention` can read."""
        return wish

    def new_pages(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Pages:
        """Memory for one layer's keys and values; not cleared, so on a CPU it costs nothing until it is written."""
        shape = (num_pages, kv_heads, page_size, head_dim)
        k, v = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))
        if dtype != torch.int8:
            return Pages(k, v)
        return Pages(k, v, *(torch.empty(shape[:3], dtype=torch.float32, device=self.device) for _ in range(2)))

    def prepare_tensor(self, tensor: Tensor) -> Tensor:
        """A norm, gate or embedding table as the file has it → where and how the operations below want it."""
        return tensor.to(self.device)

    def prepare_linear(self, weights: Sequence[Weight], ranks: Ranks | None = None) -> Any:
        """Weights that are multiplied side by side → the handle that `linear` takes; moved and laid out once.

        With `ranks`, they are this rank's columns of matrices that the world shares: `linear` gives the sum over it.
        """
        return tuple(weights) if ranks is None else SharedLinear(tuple(weights), ranks)

    def prepare_experts(self, experts: Sequence[Expert], share: ExpertShare | None = None) -> Any:
        """A layer's experts → the handle that `moe` takes; they stay separate tensors, never stacked on the host.

        With a share, they are what `moe_ep` leaves of them to this rank, and of these its part of the width among
        `moe_tp`: `moe` gives the sum over the world.
        """
        return tuple(experts) if share is None else SharedExperts(tuple(experts), share)

    def run(self, launch: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """One step of the model: `launch` on a batch of the host's → what `launch` gives for it, on the device.

        A backend may capture what `launch` does, and replay that for later batches: for one `launch`, all steps are
        alike but for what is in the batch and in the pages.
        """
        return launch(batch.to(self.device))

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """ids [T], table [V, H] → [T, H] activations."""
        return F.embedding(ids, table).to(self.activation_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual [T, H], weight [H] → (norm(x + residual) * weight, x + residual), both [T, H].

        Without a residual the second result is x itself.
        """
        total = x if residual is None else x + residual
        wide = total.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(self.activation_dtype), total

    def linear(self, x: Tensor, linear: Any) -> Tensor:
        """x [T, in], a handle of `prepare_linear` → [T, sum of outs]."""
        rounded = x.to(self.dtype)
        if not isinstance(linear, SharedLinear):
            return torch.cat([w.matmul(rounded) for w in linear], -1).to(self.activation_dtype)
        world = linear.ranks.world
        exact = [exact_weight(w, linear.ranks) for w in linear.weights]
        if all(exact):
            sums = torch.cat([w.matmul_shared(rounded, world) for w in exact if w], -1)
        else:
            sums = world.all_reduce_sum(torch.cat([w.matmul(rounded) for w in linear.weights], -1))
        return sums.to(self.activation_dtype)

    def rope_write_kv(self, qkv: Tensor, rope: Rope, batch: Batch, pages: Pages) -> Tensor:
        """qkv [T, (Hq + 2·Hkv)·D] → rotated q [T, Hq, D]; rotated k, and v, are written into the pages.

        For int8 pages each row [D] of k and v is rounded by `quantize_rows`. Where one of a pair is not finite, both
        scales are NaN, so that whoever attends to it gets NaN.
        """
        tokens, kv_heads, size, dim = len(qkv), pages.k.shape[1], pages.page_size, pages.k.shape[3]
        heads = qkv.view(tokens, -1, dim)  # [T, Hq + 2·Hkv, D]
        q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
        at = batch.positions.long()
        cos, sin = rope.cos[at][:, None], rope.sin[at][:, None]  # [T, 1, D / 2]
        page, slot = batch.slots // size, batch.slots % size
        k = _rotate(k, cos, sin, rope.interleaved)
        if pages.k_scale is not None and pages.v_scale is not None:
            (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
            bad = k_scale.isnan() | v_scale.isnan()  # [T, Hkv]
            pages.k_scale[page, :, slot] = k_scale.masked_fill(bad, math.nan)
            pages.v_scale[page, :, slot] = v_scale.masked_fill(bad, math.nan)
        pages.k[page, :, slot] = k.to(pages.k.dtype)
        pages.v[page, :, slot] = v.to(pages.v.dtype)
        return _rotate(q, cos, sin, rope.interleaved)

    def attention(self, q: Tensor, batch: Batch, pages: Pages, window: int | None = None) -> Tensor:
        """q [T, Hq, D] → [T, Hq·D]: each token attends to its row's positions up to its own, and no further back
        than `window` positions where that is given (its own included)."""
        tokens, heads, dim = q.shape
        out = torch.empty(tokens, heads, dim, dtype=self.activation_dtype, device=q.device)
        starts = batch.query_starts.tolist()
        for row, kv_len in enumerate(batch.kv_lens.tolist()):
            a, b = starts[row], starts[row + 1]
            table = batch.page_table[row, : -(-kv_len // pages.page_size)].long()
            k = _gather(pages.k, pages.k_scale, table, kv_len, heads)  # [Hq, kv_len, D]
            v = _gather(pages.v, pages.v_scale, table, kv_len, heads)
            scores = q[a:b].float().transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(dim)  # [Hq, n, kv_len]
            ahead = (
                torch.arange(kv_len, device=q.device)[None]
                - torch.arange(kv_len - (b - a), kv_len, device=q.device)[:, None]
            )
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)  # [n, kv_len]
            probs = scores.masked_fill(hidden, -math.inf).softmax(-1)
            out[a:b] = (probs @ v).transpose(0, 1)
        return out.view(tokens, heads * dim)

    def route(self, x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x [T, H], gate [E, H] → ids [T, K] int32 and weights [T, K] fp32, best expert first, weights summing to 1.

        The softmax is over all experts; of equal experts the lower id wins.
        """
        probs = (x.float() @ gate.float().T).softmax(-1)  # [T, E]
        best, ids = probs.sort(dim=-1, descending=True, stable=True)
        best = best[:, :k]
        return ids[:, :k].int(), best / best.sum(-1, keepdim=True)

    def moe(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
        """x [T, H], ids and weights [T, K], a handle of `prepare_experts` → [T, H]: each token's weighted sum of its
        experts, in the order of its ids. No token is dropped."""
        if isinstance(experts, SharedExperts):
            shared = experts
        else:
            shared = SharedExperts(tuple(experts), ExpertShare(0, len(experts), alone()))
        ranks = shared.share.ranks
        parts = torch.zeros(*ids.shape, x.shape[1], dtype=torch.float32, device=x.device)  # [T, K, H]
        rounded = x.to(self.dtype)
        for number, expert in enumerate(shared.experts, shared.share.first):
            token, slot = (ids == number).nonzero(as_tuple=True)
            if not len(token):
                continue
            chosen = rounded[token]
            inner = (F.silu(expert.w1.matmul(chosen)) * expert.w3.matmul(chosen)).to(self.dtype)  # [n, I]
            w2 = exact_weight(expert.w2, ranks)
            parts[token, slot] = w2.matmul_shared(inner, ranks.moe_tp) if w2 else expert.w2.matmul(inner)
        exact = shares_exactly(shared.experts, ranks)
        group = ranks.moe_ep if exact else ranks.world  # over which the sum is still to be taken
        if exact and ids.shape[1] > ORDERLESS:
            parts, group = group.all_reduce_sum(parts), alone().world
        return group.all_reduce_sum((parts * weights[..., None]).sum(1)).to(self.activation_dtype)

    def kernel(self, operation: str, scheme: str) -> str:
        """What runs `operation` for weights of `scheme`, as `eightfold info` prints it."""
        return "torch"

    def facts(self) -> dict[str, str]:
        """What a report about this backend should say of the device, by name."""
        return {"threads": str(self.threads)}

    def expect_weights(self, size: int) -> None:
        """Called before weights of `size` bytes are loaded. A device with memory of its own keeps so much of it free,
        or raises EightfoldError if they don't fit; mapped files take none."""

    def available_memory(self) -> int:
        """Bytes that keys and values could take now."""
        return available_memory()


DEVICES = ("cpu", "torch", "npu")


def get_ops(
    device: str,
    dtype: torch.dtype,
    threads: int | None = None,
    strict_kernels: bool = False,
    graphs: bool = False,
) -> Ops:
    """The backend for a device: "cpu" (native kernels), "torch" (this file's reference, on the CPU), "npu" or "npu:1"
    (Ascend).

    `threads` None takes all cores that this process may use; `graphs` captures decoding steps on devices that can, and
    does nothing on a CPU. Raises EightfoldError for another device.
    """
    if device == "cpu":
        cpu = import_module("eightfold.ops.cpu")
        ops: Ops = cpu.CpuOps(dtype, threads=threads, strict_kernels=strict_kernels)
        return ops
    if device == "torch":
        if threads is not None:
            torch.set_num_threads(threads)
        return Ops(dtype)
    if device.partition(":")[0] == "npu":
        npu: Ops = import_module("eightfold.ops.npu").NpuOps(dtype, device, strict_kernels, graphs)
        return npu
    raise EightfoldError(f"device {device!r} is not supported; there are {', '.join(DEVICES)}")


SMALLEST_ABSMAX = 1e-30  # of a row; below it 127 / absmax could overflow, and the row counts as zero


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] fp32 → (int8 [..., D], scales [...] fp32), x ≈ int8 · scale: symmetric, scale = absmax / 127, half to
    even. A row of zeros has scale 0; one with a value that is not finite has zeros, and NaN for its scale."""
    absmax = x.abs().amax(-1, keepdim=True)  # [..., 1]
    finite = absmax.isfinite()  # a NaN or an infinity in a row is its absmax
    empty = ~finite | (absmax < SMALLEST_ABSMAX)
    most = torch.full_like(absmax, 127.0)  # as a tensor: torch divides by or into a number by way of a reciprocal
    inverse = torch.where(empty, 0.0, most / absmax)
    q = torch.where(finite, x, 0.0).mul(inverse).round().to(torch.int8)
    scale = torch.where(empty, 0.0, absmax / most).masked_fill(~finite, math.nan)
    return q, scale.squeeze(-1)


def exact_weight(weight: Weight, ranks: Ranks) -> ExactWeight | None:
    """The weight, if ranks are to add up its products exactly and its scheme can."""
    return weight if ranks.exact and isinstance(weight, ExactWeight) else None


def shares_exactly(experts: Sequence[Expert], ranks: Ranks) -> bool:
    """Whether `moe` gives the bits of one rank: then parts of one expert are summed before they are weighted."""
    return all(exact_weight(expert.w2, ranks) for expert in experts)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, heads, D], cos and sin [T, 1, D / 2] → x with its pairs turned."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _gather(pages: Tensor, scales: Tensor | None, table: Tensor, length: int, heads: int) -> Tensor:
    """pages [pages, Hkv, size, D], scales [pages, Hkv, size] → [Hq, length, D] fp32: a row's first positions, each KV
    head once a query head."""
    flat = pages[table].transpose(0, 1).flatten(1, 2)[:, :length].float()  # [Hkv, length, D]
    if scales is not None:
        flat = flat * scales[table].transpose(0, 1).flatten(1)[:, :length, None]
    return flat.repeat_interleave(heads // len(flat), 0)

"""The Ascend backend: the contract on torch_npu's fused operations.

Activations are of the compute dtype between operations, as the fused ones want them; norms, router, softmax and the
weighted sum over experts are fp32 within. The tables of the rotation are rounded to the compute dtype, as in
`transformers`. float32 runs too, for comparisons: everything but attention is fused then.

Results of a token may depend on its batch in the last bits: CANN chooses its tiling by the shapes. What is checked how,
without a device, is in docs/npu.md.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from eightfold.ops import Batch, Expert, Ops, Pages, Rope, Weight
from eightfold.ops.npu import attention, experts
from eightfold.ops.npu.attention import Lengths, NzPages, Rotation
from eightfold.ops.npu.device import FRACTAL_NZ, SWITCHES, cann_version, open_device
from eightfold.ops.npu.graphs import Graphs, decodes
from eightfold.ops.npu.weights import (
    SCHEMES,
    Grouped,
    Product,
    Share,
    SharedExperts,
    Summed,
    Uploader,
    communicator,
    summed,
)
from eightfold.parallel import Ranks
from eightfold.types import EightfoldError

LARGEST_HEAD = 512
RESERVE = 1 << 30  # bytes for activations and the workspaces of operations


class NpuOps(Ops):
    """The contract on one Ascend device: "npu" is the first visible one, "npu:N" another.

    Raises EightfoldError if torch_npu, CANN or the device is missing, and for a dtype that the chip lacks. What no
    fused operation does goes to the torch reference on the device, with one warning, or is refused if `strict_kernels`.
    With `graphs`, steps of rows of one token each are captured and replayed; EightfoldError where a chip or dtype has
    no fused operation for all of a step, or for several ranks.
    """

    name: ClassVar[str] = "npu"

    def __init__(
        self, dtype: torch.dtype, device: str = "npu", strict_kernels: bool = False, graphs: bool = False
    ) -> None:
        self.npu = open_device(device)
        self.soc = self.npu.soc
        if dtype not in self.soc.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.soc.dtypes)
            raise EightfoldError(
                f"{self.npu.chip} ({self.soc.products}) does not compute in {str(dtype).removeprefix('torch.')}: use "
                f"--dtype {names}"
            )
        super().__init__(dtype, self.npu.name)
        self.activation_dtype = dtype
        self.strict_kernels = strict_kernels
        self._uploader = Uploader(self.npu, dtype)
        self._rotation: Rotation | None = None
        self._lengths: Lengths | None = None
        self._mask: Tensor | None = None
        if graphs and not (self.soc.fused and dtype in attention.FRACTIONS):
            raise EightfoldError(
                f"graphs (--no-enforce-eager) need fused operations that {self.npu.chip} lacks in "
                f"{str(dtype).removeprefix('torch.')}: leave the option out"
            )
        self._graphs = Graphs(self.npu) if graphs else None
        self._spare: tuple[int, int] | None = None  # a page that only rows which pad a graph's batch use, and its size
        self._expected = 0
        self._said: set[str] = set()

    def page_size(self, wish: int) -> int:
        """Rounded up to a multiple of 128. Raises EightfoldError above 512."""
        size = -(-wish // attention.PAGE_SIZE) * attention.PAGE_SIZE
        if size > attention.LARGEST_PAGE:
            raise EightfoldError(f"--block-size is {wish}; on NPUs it can be {attention.LARGEST_PAGE} at most")
        return size

    def new_pages(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Pages:
        """Pages as the fused attention reads them. Raises EightfoldError for a size of page or head that it can't."""
        if page_size != self.page_size(page_size):
            raise EightfoldError(
                f"pages hold {page_size} tokens; on NPUs it must be a multiple of {attention.PAGE_SIZE}"
            )
        if head_dim % attention.NZ_WIDTH or head_dim > LARGEST_HEAD:
            raise EightfoldError(
                f"the head size is {head_dim}; on NPUs it must be a multiple of {attention.NZ_WIDTH}, at most "
                f"{LARGEST_HEAD}"
            )
        if self._graphs is not None:
            if self._spare not in (None, (num_pages, page_size)):
                raise EightfoldError("with graphs (--no-enforce-eager), all pages are of one size and as many")
            self._spare = num_pages, page_size
            num_pages += 1
        int8 = dtype == torch.int8 and self.soc.fused and self.dtype in attention.FRACTIONS
        if not int8 and dtype not in self.soc.dtypes:
            name, own = (str(d).removeprefix("torch.") for d in (dtype, self.dtype))
            raise EightfoldError(f"--kv-cache-dtype is {name}; {self.npu.chip} has no kernel for it beside {own}")
        try:
            if not self.soc.fused:
                shape = (num_pages, kv_heads * head_dim // attention.NZ_WIDTH, page_size, attention.NZ_WIDTH)
                return NzPages(self._as_nz(shape, dtype), self._as_nz(shape, dtype), head_dim=head_dim)
            shape = (num_pages, page_size, kv_heads, head_dim)
            k, v = (torch.empty(shape, dtype=dtype, device=self.device) for _ in "kv")
            scales = [torch.empty(num_pages, kv_heads, page_size, device=self.device) for _ in "kv" if int8]
        except torch.OutOfMemoryError as error:
            need, free = 2 * num_pages * page_size * kv_heads * head_dim * dtype.itemsize, self.npu.free_memory()
            raise EightfoldError(
                f"keys and values of a layer need {need / 2**20:.0f} MiB but {self.npu.name} has "
                f"{free / 2**20:.0f} MiB left: lower --max-model-len or --kv-cache-memory-bytes"
            ) from error
        return Pages(k.transpose(1, 2), v.transpose(1, 2), *scales)

    def prepare_tensor(self, tensor: Tensor) -> Tensor:
        return self._uploader.tensor(tensor)

    def prepare_linear(self, weights: Sequence[Weight], ranks: Ranks | None = None) -> Product:
        """Weights [out, in] of one width → one matrix on the device, in the layout that its product wants.

        With `ranks`, they are this rank's columns: `linear` gives the sum over the world, in fp32, of results of the
        compute dtype. Scales of activations are each rank's own, so int8 products are not those of one rank. Where
        ranks need not be exact, prompts' products are added up by the multiplication itself, in the compute dtype.
        """
        if ranks is not None and self._graphs is not None:
            raise EightfoldError("graphs (--no-enforce-eager) are captured for one rank only: leave the option out")
        product = self._uploader.linear(weights)
        return product if ranks is None else Summed(product, ranks.world, communicator(self.npu, ranks, product))

    def prepare_experts(self, experts: Sequence[Expert], share: Share | None = None) -> SharedExperts:
        """A layer's experts → stacked on the device, one upload after the other; the host never holds them together.

        With a share, they are some of the experts, or a part of their widths: `moe` gives the sum over the world.
        """
        return SharedExperts(self._uploader.experts(experts), share)

    def run(self, launch: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """The inherited contract. Lengths stay on the host, where attention wants them: no operation waits for them."""
        if self._graphs is not None and self._spare is not None and decodes(batch):
            page, page_size = self._spare
            logits = self._graphs.run(launch, batch, page, page_size, self._enter)
            if logits is not None:
                return logits
        own = batch.to(self.device)
        self._enter(Lengths(own, batch.query_starts[1:].tolist(), batch.kv_lens.tolist()))
        return launch(own)

    def _enter(self, lengths: Lengths) -> None:
        """What follows is a step of this batch, whose memory may be another step's before."""
        self._lengths = lengths
        if self._rotation is not None:
            self._rotation.forget()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is not None and self.soc.fused:
            y, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, eps)
            return y, total
        total = x if residual is None else x + residual
        return torch.ops.npu.npu_rms_norm(total, weight, eps)[0], total

    def linear(self, x: Tensor, linear: Product) -> Tensor:
        return linear(x)

    def rope_write_kv(self, qkv: Tensor, rope: Rope, batch: Batch, pages: Pages) -> Tensor:
        """The inherited contract; q is of the compute dtype."""
        nz = isinstance(pages, NzPages)
        dim = pages.head_dim if isinstance(pages, NzPages) else pages.k.shape[3]
        kv_heads = pages.k.shape[1] * attention.NZ_WIDTH // dim if nz else pages.k.shape[1]
        heads = qkv.view(len(qkv), -1, dim)  # [T, Hq + 2·Hkv, D]
        q, k, v = (x.contiguous() for x in torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1))
        if self._rotation is None or self._rotation.rope is not rope:
            self._rotation = Rotation(rope, self.dtype)
        q, k = self._rotation(q, k, batch)
        attention.write(k, v, batch, pages)
        return q

    def attention(self, q: Tensor, batch: Batch, pages: Pages, window: int | None = None) -> Tensor:
        if self._lengths is None or self._lengths.batch is not batch:  # all layers of a step share it
            self._lengths = Lengths.of(batch)
        if self._graphs is not None:
            self._graphs.window = window
        if window is not None and window >= max(self._lengths.keys, default=0):
            window = None
        if reason := _unfused_attention(q, pages, window):
            if isinstance(pages, NzPages):
                raise EightfoldError(f"{self.npu.chip} has no attention for {reason}")
            self._fall_back("attention", reason)
            return super().attention(q, batch, pages, window)
        if isinstance(pages, NzPages):
            return attention.attend_nz(q, self._lengths, pages)
        if self._mask is None:
            self._mask = attention.causal_mask(self.npu.name)
        return attention.attend(q, self._lengths, pages, self._mask)

    def route(self, x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return experts.choose(F.linear(x.float(), gate.float()), k, self.soc.fused)

    def moe(self, x: Tensor, ids: Tensor, weights: Tensor, handle: SharedExperts) -> Tensor:
        own, share = handle.experts, handle.share
        first, total = (0, own.count) if share is None else (share.first, share.total)
        if isinstance(own, Grouped):
            y = experts.grouped(x, ids, weights, own, first, total)
        else:
            y = experts.one_by_one(x, ids, weights, own, first)
        return y if share is None else summed(y, share.ranks.world)

    def kernel(self, operation: str, scheme: str) -> str:
        fused = self.soc.fused
        if operation in ("linear", "moe") and (
            scheme not in SCHEMES
            or (scheme != "dense" and self.dtype == torch.float32)
            or (scheme == "w4a16" and not fused)
        ):
            return "none"
        int8 = {
            "w8a8": "npu_quant_matmul",
            "w8a16": "npu_weight_quant_batchmatmul",
            "w4a16": "npu_weight_quant_batchmatmul",
        }
        if not fused:
            int8["w8a8"] = int8["w8a16"]
        return {
            "linear": int8.get(scheme, "matmul"),
            "moe": "npu_grouped_matmul" if fused else f"{int8.get(scheme, 'matmul')}, expert by expert",
            "rms_norm": "npu_add_rms_norm" if fused else "npu_rms_norm",
            "rope_write_kv": "npu_rotary + npu_scatter_pa_kv_cache" if fused else "npu_rotary + reshape_and_cache",
            "attention": "npu_fused_infer_attention_score" if fused else "paged_attention",
            "route": "npu_moe_gating_top_k_softmax" if fused else "torch",
        }.get(operation, "torch")

    def facts(self) -> dict[str, str]:
        gib = [f"{x / 2**30:.1f} GiB" for x in (self.npu.total_memory(), self.npu.free_memory())]
        settings = {
            name: f"{os.environ[name]} (heeded by {who})" for name, who in SWITCHES.items() if name in os.environ
        }
        return {
            "device": f"{self.npu.name}, {self.npu.chip} ({self.soc.products})",
            "memory": f"{gib[0]}, {gib[1]} free",
            "torch_npu": str(self.npu.torch_npu.__version__),
            "CANN": cann_version(),
            **settings,
        }

    def expect_weights(self, size: int) -> None:
        """Raises EightfoldError if `size` bytes of weights do not fit the device."""
        free = self.npu.free_memory() - RESERVE
        if size > free:
            raise EightfoldError(
                f"the weights take {size / 2**30:.1f} GiB but {self.npu.name} ({self.npu.chip}) has "
                f"{max(0, free) / 2**30:.1f} GiB for them: use more devices, or a quantized model"
            )
        self._expected = size

    def available_memory(self) -> int:
        """Bytes of the device's memory that keys and values could take beside the weights expected, and a reserve."""
        return max(0, self.npu.free_memory() - self._expected - RESERVE)

    def synchronize(self) -> None:
        """Waits until everything that was launched is done."""
        self.npu.synchronize()

    def _as_nz(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        cast: Tensor = torch.ops.npu.npu_format_cast(torch.empty(shape, dtype=dtype, device=self.device), FRACTAL_NZ)
        return cast

    def _fall_back(self, operation: str, reason: str) -> None:
        """Says once that the reference will run, or refuses."""
        message = f"{operation} has no NPU kernel for {reason}"
        if self.strict_kernels:
            raise EightfoldError(f"{message}; without strict_kernels torch would run it")
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"{message}: the torch reference runs it on the device, slowly", RuntimeWarning, stacklevel=3)


def _unfused_attention(q: Tensor, pages: Pages, window: int | None) -> str | None:
    """Why the fused attention can't do it, or None."""
    if window is not None:
        return f"a window of {window} tokens"
    if q.dtype not in attention.FRACTIONS:
        return f"queries of {q.dtype}"
    if pages.k_scale is None and pages.k.dtype != q.dtype:
        return f"keys of {pages.k.dtype} beside queries of {q.dtype}"
    if not isinstance(pages, NzPages) and q.shape[1] > attention.LARGEST_GROUP * pages.k.shape[1]:
        return f"{q.shape[1] // pages.k.shape[1]} query heads for one KV head"
    return None

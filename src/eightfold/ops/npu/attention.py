"""Rotation, pages and attention on the NPU.

Pages lie as the fused attention reads them, a page's tokens one after the other: [pages, page size, Hkv, D]; the
contract's shape [pages, Hkv, page size, D] is a view of it. On 300I DUO they have the NZ layout,
[pages, Hkv·D / 16, page size, 16], which no view turns into the contract's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from eightfold.ops import Batch, Pages, Rope

PAGE_SIZE = 128  # and multiples of it, up to LARGEST_PAGE, for prompts; decoding alone would take any multiple of 16
LARGEST_PAGE = 512
MASK_SIZE = 2048  # of the causal mask that the fused attention wants: int8, 1 above the diagonal
CAUSAL_FROM_THE_END = 3  # sparse mode: the last query sees the last key
SCALES_IN_PAGES = 5  # antiquant mode: int8 with a scale for each token and head, [pages, Hkv, page size]
FUSED_ROTATION = (64, 128)  # head sizes
NZ_WIDTH = 16
LARGEST_GROUP = 64  # query heads for one KV head
FRACTIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class NzPages(Pages):
    """[pages, Hkv·D / 16, page size, 16] each; never int8."""

    head_dim: int = 0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of a batch's R rows where the queries of each end, and how many keys it has: on the host, where attention wants
    them."""

    batch: Batch
    ends: list[int]
    keys: list[int]

    @classmethod
    def of(cls, batch: Batch) -> Lengths:
        return cls(batch, batch.query_starts[1:].tolist(), batch.kv_lens.tolist())


class Rotation:
    """A model's tables [positions, D / 2] as the fused rotations want them: [positions, D] in the compute dtype."""

    def __init__(self, rope: Rope, dtype: torch.dtype) -> None:
        self.rope = rope
        self._cos, self._sin = (_whole(table, rope.interleaved).to(dtype) for table in (rope.cos, rope.sin))
        self._batch: Batch | None = None  # for which the angles are
        self._angles = (self._cos, self._sin)

    def forget(self) -> None:
        """The angles of the last batch. A batch's memory may hold another one's positions by now."""
        self._batch = None

    def __call__(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """q [T, Hq, D], k [T, Hkv, D] → the same, rotated; their memory may be used for that."""
        if self._batch is not batch:  # all layers of a step share it
            index = batch.positions.long()
            self._batch, self._angles = batch, (self._cos[index][:, None], self._sin[index][:, None])  # [T, 1, D]
        cos, sin = self._angles
        if not self.rope.interleaved and q.shape[2] in FUSED_ROTATION:
            q, k = torch.ops.npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout="TND", rotary_mode="half")
            return q, k
        mode = "interleave" if self.rope.interleaved else "half"
        return _turn(q, cos, sin, mode), _turn(k, cos, sin, mode)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """x [T, heads, D], cos and sin [T, 1, D]: one sequence, as the operation sees it."""
    y: Tensor = torch.ops.npu.npu_rotary_mul(x[None], cos[None], sin[None], rotary_mode=mode)[0]
    return y


def stored(pages: Tensor) -> Tensor:
    """The contract's view [pages, Hkv, page size, D] → [pages, page size, Hkv, D], as it lies in memory."""
    return pages.transpose(1, 2)


def write(k: Tensor, v: Tensor, batch: Batch, pages: Pages) -> None:
    """k, v [T, Hkv, D] into the pages, at the batch's slots."""
    if pages.k_scale is not None and pages.v_scale is not None:
        page, slot = batch.slots // pages.page_size, batch.slots % pages.page_size
        (k, k_scale), (v, v_scale) = (torch.ops.npu.npu_dynamic_quant(x) for x in (k, v))  # scales [T, Hkv] fp32
        pages.k_scale[page, :, slot], pages.v_scale[page, :, slot] = k_scale, v_scale
    k, v = (x.to(pages.k.dtype).contiguous() for x in (k, v))
    if isinstance(pages, NzPages):
        torch.ops.atb._npu_reshape_and_cache(k, v, pages.k, pages.v, batch.slots.int())
        return
    torch.ops.npu.npu_scatter_pa_kv_cache(k, v, stored(pages.k), stored(pages.v), batch.slots, cache_mode="Norm")


def attend(q: Tensor, lengths: Lengths, pages: Pages, mask: Tensor) -> Tensor:
    """q [T, Hq, D] → [T, Hq·D] by the fused attention over ragged rows."""
    if pages.k_scale is not None:
        return _attend_int8(q, lengths, pages, mask)
    kv_heads, dim = pages.k.shape[1], pages.k.shape[3]
    k, v = (stored(x).flatten(2) for x in (pages.k, pages.v))  # [pages, page size, Hkv·D]
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        q,
        k,
        v,
        atten_mask=mask,
        actual_seq_lengths=lengths.ends,
        actual_seq_lengths_kv=lengths.keys,
        block_table=lengths.batch.page_table,
        num_heads=q.shape[1],
        num_key_value_heads=kv_heads,
        scale=1 / math.sqrt(dim),
        input_layout="TND",
        block_size=pages.page_size,
        sparse_mode=CAUSAL_FROM_THE_END,
    )
    result: Tensor = out.flatten(1)
    return result


def _attend_int8(q: Tensor, lengths: Lengths, pages: Pages, mask: Tensor) -> Tensor:
    """As `attend`, for int8 pages: the fused attention reads them for rows of one query only. Pages of the other rows
    are multiplied out first, into pages of q's dtype."""
    if lengths.ends[-1] == len(lengths.ends):  # one query each, as in all steps but those with prompts
        return _attend_single(q, lengths, pages).flatten(1)
    starts = [0, *lengths.ends[:-1]]
    ones = [row for row, (a, b) in enumerate(zip(starts, lengths.ends, strict=True)) if b - a == 1]
    more = [row for row, (a, b) in enumerate(zip(starts, lengths.ends, strict=True)) if b - a > 1]
    out = torch.empty_like(q)
    if ones:
        at = torch.tensor([starts[row] for row in ones], device=q.device)
        out[at] = _attend_single(q[at], _rows(lengths, ones), pages)
    if more:
        some = _rows(lengths, more)
        at = torch.cat([torch.arange(starts[row], lengths.ends[row]) for row in more]).to(q.device)
        out[at] = attend(q[at], *_widened(some, pages, q.dtype), mask).view(len(at), *q.shape[1:])
    return out.flatten(1)


def _rows(lengths: Lengths, rows: list[int]) -> Lengths:
    """Some of a batch's rows, with the queries of these one after the other."""
    starts, batch = [0, *lengths.ends], lengths.batch
    ends = list(accumulate(lengths.ends[row] - starts[row] for row in rows))
    table = batch.page_table[torch.tensor(rows, device=batch.page_table.device)]
    return Lengths(replace(batch, page_table=table), ends, [lengths.keys[row] for row in rows])


def _attend_single(q: Tensor, lengths: Lengths, pages: Pages) -> Tensor:
    """q [R, Hq, D], one query a row → [R, Hq, D]; scales stay in pages beside the int8 keys and values."""
    k, v = (stored(x).flatten(2) for x in (pages.k, pages.v))  # [pages, page size, Hkv·D]
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        q[:, :, None],  # [R, Hq, 1, D]
        k,
        v,
        actual_seq_lengths_kv=lengths.keys,
        key_antiquant_scale=pages.k_scale,
        value_antiquant_scale=pages.v_scale,
        key_antiquant_mode=SCALES_IN_PAGES,
        value_antiquant_mode=SCALES_IN_PAGES,
        block_table=lengths.batch.page_table,
        num_heads=q.shape[1],
        num_key_value_heads=pages.k.shape[1],
        scale=1 / math.sqrt(q.shape[2]),
        input_layout="BNSD",
        block_size=pages.page_size,
    )
    result: Tensor = out[:, :, 0]
    return result


def _widened(lengths: Lengths, pages: Pages, dtype: torch.dtype) -> tuple[Lengths, Pages]:
    """The pages of some rows times their scales, and the rows with a table of these."""
    table = lengths.batch.page_table
    chosen = table.flatten().long()

    def times(x: Tensor, scale: Tensor | None) -> Tensor:
        assert scale is not None
        wide = stored(x)[chosen].float() * stored(scale)[chosen][..., None]  # [pages, page size, Hkv, D]
        return wide.to(dtype).transpose(1, 2)

    own = torch.arange(len(chosen), dtype=torch.int32, device=table.device).view(table.shape)
    wide = Pages(times(pages.k, pages.k_scale), times(pages.v, pages.v_scale))
    return replace(lengths, batch=replace(lengths.batch, page_table=own)), wide


def attend_nz(q: Tensor, lengths: Lengths, pages: NzPages) -> Tensor:
    """As `attend`, by the attention of 300I DUO for single queries: each token is a row of its own that sees its row's
    keys up to itself. That is exact for prompts too, but reads a prompt's keys once a token."""
    batch, heads = lengths.batch, pages.k.shape[1] * NZ_WIDTH // pages.head_dim
    counts = batch.query_starts.diff()
    tables = batch.page_table.repeat_interleave(counts, 0)  # [T, pages of a row]
    out = torch.empty_like(q)
    torch.ops.atb._npu_paged_attention(
        q, pages.k, pages.v, heads, q.shape[1], 1 / math.sqrt(q.shape[2]), tables, batch.positions + 1, out
    )
    return out.flatten(1)


def causal_mask(device: str) -> Tensor:
    """int8 [2048, 2048], 1 where a key lies ahead of its query."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu(1).to(device)


def _whole(table: Tensor, interleaved: bool) -> Tensor:
    """[positions, D / 2] → [positions, D], each angle where its two elements are."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)

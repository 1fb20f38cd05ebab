"""One runner per rank: turns Plans into tensors, runs the model on them, owns the memory of keys and values.

Rank 0's runner sends each Plan to the others before it runs it; theirs follow.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from eightfold.model import Mixtral
from eightfold.ops import Batch, TailedBatch
from eightfold.parallel import Alone, Group, Watch, unwatched
from eightfold.plan_bytes import STOP, decode, encode
from eightfold.types import Plan


class Runner:
    """`num_pages` pages of `page_size` tokens in each layer, of `kv_dtype`, for the heads of this rank of `world`.
    While others may wait for it, it is under `watch`."""

    def __init__(
        self,
        model: Mixtral,
        num_pages: int,
        page_size: int,
        kv_dtype: torch.dtype,
        world: Group | None = None,
        watch: Watch = unwatched,
    ) -> None:
        config = model.config
        self._model = model
        self._world = world or Alone()
        self._watch = watch
        self._lead = self._world.rank == 0  # whether the others wait for a message; not so after a step that failed
        self.vocab_size = config.vocab_size
        self.num_pages = num_pages
        self.page_size = page_size
        self._pages = [
            model.ops.new_pages(num_pages, page_size, model.kv_heads, config.head_dim, kv_dtype)
            for _ in range(config.num_layers)
        ]
        self._launch = partial(model.launch, pages=self._pages)

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """One step of the model → logits [L, V] fp32 on the host, a row for each of `plan.logit_rows`.

        Rank 0 alone calls it."""
        if self._world.size == 1:
            return self._step(plan)
        message = encode(plan)
        self._lead = False
        with self._watch(self._model.ops.counts_work):
            self._world.broadcast(message)
            logits = self._step(plan)
        self._lead = True
        return logits

    @torch.inference_mode()
    def follow(self) -> None:
        """Run what rank 0 sends until it stops; for every other rank."""
        message = self._world.broadcast(None)
        while message:
            with self._watch(self._model.ops.counts_work):
                self._step(decode(message))
                message = self._world.broadcast(None)

    def close(self) -> None:
        """Let the other ranks go. After a step that failed they wait in the middle of one, where no message reaches
        them: they end with the connection."""
        if self._world.size > 1 and self._lead:
            self._world.broadcast(STOP)
        self._lead = False

    def _step(self, plan: Plan) -> Tensor:
        batch = with_tail(make_batch(plan, self.page_size, torch.device("cpu")))
        return self._model.gather(self._model.ops.run(self._launch, batch))


def make_batch(plan: Plan, page_size: int, device: torch.device) -> Batch:
    """The Plan as tensors on the device, for pages of `page_size` tokens."""
    starts = np.array(plan.query_starts, np.int32)  # [R + 1]
    kv_lens = np.array(plan.kv_lens, np.int32)  # [R]
    counts = np.diff(starts)
    row = np.repeat(np.arange(len(counts)), counts)  # [T] the row of each token
    positions = np.arange(len(row), dtype=np.int32) + (kv_lens - starts[1:])[row]
    table = np.zeros((len(counts), max(map(len, plan.page_table), default=0)), np.int32)
    for number, pages in enumerate(plan.page_table):
        table[number, : len(pages)] = pages
    page, slot = np.divmod(positions, page_size)
    slots = table[row, page].astype(np.int64) * page_size + slot
    arrays = (
        np.array(plan.ids, np.int64),
        positions,
        slots,
        starts,
        kv_lens,
        table,
        np.array(plan.logit_rows, np.int64),
    )
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays))


def with_tail(batch: Batch) -> Batch:
    """A batch on the host with its tail, unless that would be all of it."""
    starts, wanted = batch.query_starts.numpy(), batch.logit_rows.numpy()  # [R + 1], [L]
    if len(wanted) == len(batch.ids):  # as in every decoding step
        return batch
    row = np.searchsorted(starts, wanted, side="right") - 1  # [L]
    rows, first = np.unique(row, return_index=True)  # with logits, and where theirs begin: they come row by row
    counts = starts[rows + 1] - wanted[first]
    if counts.sum() == len(batch.ids):
        return batch
    ends = np.concatenate(([0], counts.cumsum())).astype(np.int32)
    moved = wanted[first] - ends[:-1]  # [rows] how far a row's tokens move to the front
    tokens = np.arange(ends[-1]) + np.repeat(moved, counts)  # [tail's T]
    of_tail, kept = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(rows)
    tail = Batch(
        batch.ids[of_tail],
        batch.positions[of_tail],
        batch.slots[of_tail],
        torch.from_numpy(ends),
        batch.kv_lens[kept],
        batch.page_table[kept],
        torch.from_numpy(wanted - moved[np.searchsorted(rows, row)]),
    )
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return TailedBatch(**tensors, tail=tail, of_tail=of_tail)

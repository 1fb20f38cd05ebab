"""One runner per rank: turns Plans into tensors, runs the model on them, owns the memory of keys and values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eightfold.model import Mixtral
from eightfold.ops import Batch
from eightfold.types import Plan


class Runner:
    """`num_pages` pages of `page_size` tokens in each layer, of `kv_dtype`."""

    def __init__(self, model: Mixtral, num_pages: int, page_size: int, kv_dtype: torch.dtype) -> None:
        config = model.config
        self._model = model
        self.vocab_size = config.vocab_size
        self._page_size = page_size
        self._pages = [
            model.ops.new_pages(num_pages, page_size, config.num_kv_heads, config.head_dim, kv_dtype)
            for _ in range(config.num_layers)
        ]

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """One step of the model → logits [L, V] fp32, a row for each of `plan.logit_rows`."""
        return self._model.forward(make_batch(plan, self._page_size, self._model.ops.device), self._pages)


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

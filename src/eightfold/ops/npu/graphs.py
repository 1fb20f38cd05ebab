"""Decode steps as graphs: captured once for a number of rows, then replayed, which launches a step as a whole.

A graph reads and writes the memory that it was captured with. So a step's batch is copied into buffers that stay, and
padded with rows of one token to the next size that is captured. What attention wants on the host, lists of lengths,
is updated in the graph before each replay: torch_npu captures attention as a group of tasks that can be
(`auto_dispatch_capture`). A step of a new size runs without a graph, in the same buffers, and is captured after that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eightfold.ops import Batch
from eightfold.ops.npu.attention import Lengths
from eightfold.ops.npu.device import Device, first_line
from eightfold.types import EightfoldError

SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16))  # numbers of rows; more than the last run without a graph
Launch = Callable[[Batch], Tensor]
SMALLEST_TABLE = 8  # pages of a row; tables are of this width times a power of two


def decodes(batch: Batch) -> bool:
    """Whether each row has one token, whose logits are wanted: all steps but those with prompts."""
    rows = len(batch.kv_lens)
    return len(batch.ids) == rows == len(batch.logit_rows) and 0 < rows <= SIZES[-1]


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step: the batch whose tensors are its buffers, and the logits [rows, V] that it writes."""

    batch: Batch
    captured: Any
    logits: Tensor


class Graphs:
    """Graphs on one device, by what they launch, rows, and width of the table of pages; they share memory."""

    def __init__(self, device: Device) -> None:
        self._npu = device.torch_npu.npu
        self._device = device
        self._pool = self._npu.graph_pool_handle()
        self._graphs: dict[tuple[Launch, int, int], Graph] = {}
        self.window: int | None = None  # that attention was last asked for

    def run(
        self, launch: Launch, batch: Batch, spare_page: int, page_size: int, enter: Callable[[Lengths], None]
    ) -> Tensor | None:
        """One step of rows of one token each, a batch on the host → its logits [R, V] on the device; None where a row
        is longer than the window, for which no operation is fused.

        Rows that pad the batch write to the page `spare_page`. `enter` is told of each batch before `launch` is.
        """
        rows, width = batch.page_table.shape
        size = next(number for number in SIZES if number >= rows)
        table = SMALLEST_TABLE << (-(-width // SMALLEST_TABLE) - 1).bit_length()
        lengths = _padded(batch, size, table, spare_page, page_size)
        if self.window is not None and max(lengths.keys) > self.window:
            return None
        graph = self._graphs.get((launch, size, table))
        if graph is None:
            own = lengths.batch.to(self._device.name)
            enter(Lengths(own, lengths.ends, lengths.keys))
            logits = launch(own)
            longest = min(table * page_size, self.window or table * page_size)
            if longest >= max(lengths.keys):
                enter(Lengths(own, lengths.ends, [longest] * size))
                self._graphs[launch, size, table] = Graph(own, *self._capture(launch, own))
            return logits[:rows]
        _fill(graph.batch, lengths.batch)
        graph.captured.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths.keys}])
        graph.captured.replay()
        return graph.logits[:rows]

    def _capture(self, launch: Launch, batch: Batch) -> tuple[Any, Tensor]:
        graph = self._npu.NPUGraph()
        try:
            with self._npu.graph(graph, pool=self._pool, auto_dispatch_capture=True):
                return graph, launch(batch)
        except RuntimeError as error:
            raise EightfoldError(
                f"a step of {len(batch.ids)} rows could not be captured as a graph on {self._device.name}: "
                f"{first_line(error)}; leave out --no-enforce-eager"
            ) from error


def _fill(buffers: Batch, batch: Batch) -> None:
    for name in Batch.__slots__:
        getattr(buffers, name).copy_(getattr(batch, name), non_blocking=True)


def _padded(batch: Batch, rows: int, table: int, spare_page: int, page_size: int) -> Lengths:
    """The batch with as many rows, and a table as wide, on the host. A row that is added writes a key of its own into
    the spare page, and attends to that of the first."""
    more = rows - len(batch.kv_lens)
    first = spare_page * page_size
    pages = torch.zeros(rows, table, dtype=torch.int32)
    pages[: rows - more, : batch.page_table.shape[1]] = batch.page_table
    pages[rows - more :, 0] = spare_page
    ends = list(range(1, rows + 1))
    keys = torch.cat((batch.kv_lens, torch.ones(more, dtype=torch.int32)))
    padded = Batch(
        ids=torch.cat((batch.ids, torch.zeros(more, dtype=torch.int64))),
        positions=torch.cat((batch.positions, torch.zeros(more, dtype=torch.int32))),
        slots=torch.cat((batch.slots, torch.arange(first, first + more))),
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        kv_lens=keys,
        page_table=pages,
        logit_rows=torch.arange(rows),
    )
    return Lengths(padded, ends, keys.tolist())

"""The weights to quantize, read a few rows at a time, in the order of rows and with the factors they are to have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from eightfold.checkpoint import Checkpoint
from eightfold.config import ModelConfig, load_model_config
from eightfold.file_memory import populate
from eightfold.model import axis_sizes, stored_tensors, weight_table
from eightfold.types import EightfoldError

_READ_BYTES = 8 << 20
BLOCK_BYTES = 2 << 20  # of a block of rows in fp32: it stays in a core's cache from one operation to the next


@dataclass(frozen=True, slots=True)
class Factors:
    """What smoothing multiplies weights by, by name without ".weight": each row [out] and each column [in], fp32.

    All are powers of two, so a float weight times its factors is exact. A norm's elements are its rows.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Source:
    """A model folder, checked, and its weights by row. Nothing of it is copied but the rows that are asked for."""

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.stored_config = load_model_config(folder)
        # In the folder that is written heads turn as Hugging Face's do: no other is described by a config.json.
        rope = replace(self.stored_config.rope, interleaved=False)
        self.config: ModelConfig = replace(self.stored_config, rope=rope)
        self.checkpoint = Checkpoint.open(folder, self.stored_config, allow_pickle)
        self.checkpoint.check(stored_tensors(self.stored_config))
        self.table = weight_table(self.config)
        self._sizes = axis_sizes(self.config)
        self.factors = Factors()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, by its name without ".weight"."""
        return tuple(self._sizes[axis] for axis in self.table[name].axes)

    def read_ahead(self, name: str) -> None:
        """Waits until a weight has been read from the disk."""
        tensor = self.checkpoint.tensor(f"{name}.weight")
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for at in range(start, end, _READ_BYTES):
            populate(at, min(_READ_BYTES, end - at))

    def rows_of_block(self, name: str) -> int:
        """How many rows to ask for at a time."""
        shape = self.shape(name)
        return max(1, BLOCK_BYTES // (4 * shape[1])) if len(shape) == 2 else shape[0]

    def rows(self, name: str, start: int, stop: int, part: str = "weight") -> Tensor:
        """Rows of a stored part of a weight, in the order and with the factors of the new folder."""
        full = f"{name}.{part}"
        tensor = self.checkpoint.tensor(full)
        if self._is_interleaved(name):
            tensor = tensor[_half_split_rows(self.config.head_dim, start, stop)]
        else:
            tensor = tensor[start:stop]
        if part != "weight":
            return tensor
        for factors, dim in ((self.factors.rows.get(name), 0), (self.factors.columns.get(name), 1)):
            if factors is not None:
                chosen = factors[start:stop].reshape(-1, *[1] * (tensor.ndim - 1)) if dim == 0 else factors
                tensor = (tensor.float() * chosen).to(tensor.dtype)
        return tensor

    def _is_interleaved(self, name: str) -> bool:
        return self.stored_config.rope.interleaved and name.endswith(("self_attn.q_proj", "self_attn.k_proj"))

    def not_finite(self, name: str) -> EightfoldError:
        """The error that says where a weight is not finite."""
        full = f"{name}.weight"
        stored = self.checkpoint.tensor(full)
        what = "numbers that its smoothing factors make infinite"
        for number, row in enumerate(torch.split(stored, 1)):
            if not bool(row.isfinite().all()):
                where = [number, *(~row.isfinite()).nonzero()[0].tolist()[1:]]
                what = f"{float(stored[tuple(where)])} at {where}"
                break
        return EightfoldError(f"tensor {full!r} in {self.checkpoint.file(full)} holds {what}; weights must be finite")


def _half_split_rows(head_dim: int, start: int, stop: int) -> Tensor:
    """Which rows of interleaved weights (pairs 2i, 2i + 1 of a head) are rows start … stop of pairs (i, i + D/2)."""
    head, row = torch.arange(start, stop).div(head_dim, rounding_mode="floor"), torch.arange(start, stop) % head_dim
    half = head_dim // 2
    return head * head_dim + 2 * (row % half) + row // half

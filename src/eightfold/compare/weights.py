"""How far the weights of two folders are apart, as what they stand for: after dequantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.compare.models import Model
from eightfold.compare.report import KindReport
from eightfold.model import WeightSpec, axis_sizes, weight_table
from eightfold.quant import Weight, get_scheme

BLOCK_BYTES = 16 << 20  # of a matrix as fp32


class Distance(NamedTuple):
    """Σ (b − a)² and Σ a² of a tensor."""

    difference: float
    size: float

    @property
    def relative(self) -> float:
        """|b − a| / |a| in the Frobenius norm; 1 where a is zero and b is not."""
        if self.size == 0:
            return float(self.difference > 0)
        return math.sqrt(self.difference / self.size)


def weight_distances(
    a: Model, b: Model, threads: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Distance]:
    """Each weight that both models have by the same name, in the order of the model.

    A block of rows is dequantized at a time in each of `threads`. Weights that the two store in different orders
    (queries and keys, where one folder is of Mistral's own layout) are left out.
    """
    tables = [weight_table(model.config) for model in (a, b)]
    names = [name for name in tables[0] if name in tables[1] and not (_reordered(a, b) and _is_rotated(name))]
    found: dict[str, Distance] = {}
    with ThreadPoolExecutor(threads) as pool:
        distances = pool.map(lambda name: _distance(a, b, name, tables[0][name]), names)
        for name, distance in zip(names, distances, strict=True):
            found[name] = distance
            if progress:
                progress(len(found), len(names))
    return found


def by_kind(distances: Mapping[str, Distance]) -> tuple[KindReport, ...]:
    """Tensors of one kind (all w1, all norms after attention, …) together, in the order of the model."""
    kinds: dict[str, list[str]] = {}
    for name in distances:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    reports = []
    for kind, names in kinds.items():
        errors = {name: distances[name].relative for name in names}
        worst = max(errors, key=errors.__getitem__)
        reports.append(KindReport(kind, len(names), math.fsum(errors.values()) / len(names), errors[worst], worst))
    return tuple(reports)


def overall(distances: Mapping[str, Distance]) -> float:
    """The relative error of all weights as one long vector."""
    sums = [math.fsum(column) for column in zip(*distances.values(), strict=True)]
    return Distance(*sums).relative


def _reordered(a: Model, b: Model) -> bool:
    return a.config.rope.interleaved != b.config.rope.interleaved


def _is_rotated(name: str) -> bool:
    return name.endswith(("q_proj", "k_proj"))


@torch.inference_mode()
def _distance(a: Model, b: Model, name: str, spec: WeightSpec) -> Distance:
    difference = size = 0.0
    for block_a, block_b in zip(_blocks(a, name, spec), _blocks(b, name, spec), strict=True):
        size += _squares(block_a)
        difference += _squares(block_b - block_a)
    return Distance(difference, size)


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _blocks(model: Model, name: str, spec: WeightSpec) -> Iterator[Tensor]:
    """A weight as fp32, some rows at a time."""
    config, checkpoint = model.config, model.checkpoint
    shape = tuple(axis_sizes(config)[axis] for axis in spec.axes)
    if len(shape) == 1:
        yield checkpoint.tensor(f"{name}.weight").float()
        return
    scheme = get_scheme(config.scheme if spec.quantizable else "dense")
    have = set(checkpoint.names())
    parts = [part for part in scheme.stored((shape[0], shape[1])) if f"{name}.{part}" in have]
    weight: Weight = scheme.wrap({part: checkpoint.tensor(f"{name}.{part}") for part in parts})
    rows = max(1, BLOCK_BYTES // (4 * shape[1]))
    for start in range(0, shape[0], rows):
        yield weight.slice(0, start, min(start + rows, shape[0])).dequantize()

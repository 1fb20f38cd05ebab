"""Which experts a model's tokens chose, noted beside a running engine: what a step must read depends on it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from eightfold.engine import Engine
from eightfold.ops import Ops


class RouteLog:
    """Passes every operation on to the backend `ops`, and notes the choices that `route` makes.

    `kv_dtype` is that of the engine's keys and values.
    """

    def __init__(self, ops: Ops, kv_dtype: torch.dtype) -> None:
        self.ops = ops
        self.kv_dtype = kv_dtype
        self._chosen: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def route(self, x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
        ids, weights = self.ops.route(x, gate, k)
        self._chosen.append(ids.clone())  # a microsecond; counting waits until nothing is timed
        return ids, weights

    def take(self) -> list[int]:
        """How many different experts each call since the last `take` chose: layer after layer, step after step."""
        hits = [different(ids) for ids in self._chosen]
        self._chosen = []
        return hits

    def take_counts(self, experts: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How often each call since the last `take` chose each expert [calls, experts], in the order of `take`."""
        chosen, self._chosen = self._chosen, []
        rows = [np.bincount(ids.numpy(force=True).ravel(), minlength=experts) for ids in chosen]
        return np.array(rows, np.int64).reshape(len(rows), experts)


def different(ids: Tensor) -> int:
    """How many different experts are among the choices."""
    return len(torch.unique(ids))


def watch_routes(engine: Engine) -> RouteLog:
    """Note the routes of an engine from now on."""
    runner = engine._runner  # nothing else outside looks behind the engine, and this only listens
    model = runner._model
    log = RouteLog(model.ops, runner._pages[0].k.dtype)
    model.ops = cast(Ops, log)
    return log

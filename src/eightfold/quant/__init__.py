"""Quantization schemes: each is a kind of weight, in one file of its own.

A scheme says which tensors a weight [out, in] is stored as, checks and wraps them, and makes them from a float
matrix. Nothing outside this package knows how a scheme stores its numbers; a backend that has a kernel for a scheme
reads `Weight.parts`, and every other backend is correct through `Weight.matmul`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eightfold.types import EightfoldError

SCHEMES = ("dense", "w8a8", "w8a16", "w4a16")


class Part(NamedTuple):
    """A stored tensor of a weight: its shapes (the first is what we write) and the dtypes it may have."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


class Weight(Protocol):
    """A matrix [out, in] in some scheme; see `eightfold.ops.Weight` for what a backend sees of it."""

    @property
    def scheme(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def parts(self) -> Mapping[str, Tensor]: ...

    def matmul(self, x: Tensor) -> Tensor: ...

    def dequantize(self) -> Tensor:
        """[out, in] fp32."""

    def slice(self, axis: int, start: int, stop: int) -> Weight:
        """Rows (axis 0) or columns (axis 1) start … stop as a view: no tensor of the matrix's size is copied."""


class Scheme(Protocol):
    """How matrices are stored and multiplied. Parts are named as in files: `<name>.weight`, `<name>.weight_scale`."""

    name: str

    def stored(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The tensors that a weight of `shape` (out, in) is stored as, by the last part of their names."""

    def wrap(self, parts: Mapping[str, Tensor]) -> Weight:
        """A Weight over stored tensors of the right shapes, not copied. Raises EightfoldError on bad values."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """A float matrix [out, in] → the tensors to store, each with a row for a row."""

    def constants(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """What is stored beside them, and depends on the shape alone."""


def get_scheme(name: str) -> Scheme:
    """The scheme called `name` ("w4a16-g64" says its group); raises EightfoldError with those that exist."""
    if name.startswith("w4a16"):
        packed: Scheme = import_module("eightfold.quant.w4a16").scheme(name)
        return packed
    if name not in SCHEMES:
        raise EightfoldError(f"quantization scheme {name!r} is not known; there are {', '.join(SCHEMES)}")
    scheme: Scheme = import_module(f"eightfold.quant.{name}").SCHEME
    return scheme

"""How much memory a model takes: computed from its config alone, without a weight being read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eightfold.config import ModelConfig
from eightfold.loader import kv_bytes_per_token
from eightfold.model import axis_sizes, weight_table
from eightfold.quant import SCHEMES, get_scheme
from eightfold.sharding import world_sizes
from eightfold.types import EightfoldError

RESERVE = 1 << 30  # for the system, the program and the activations of a step


@dataclass(frozen=True, slots=True)
class Format:
    """A way to hold a model: its scheme, the dtype of what the scheme leaves float, and that of keys and values, which
    is the same if None."""

    name: str
    scheme: str
    dtype: torch.dtype
    kv_dtype: torch.dtype | None = None


FORMATS = (
    Format("fp32", "dense", torch.float32),
    Format("bf16", "dense", torch.bfloat16),
    Format("fp16", "dense", torch.float16),
    *(Format(name, name, torch.bfloat16) for name in SCHEMES if name != "dense"),
)


def formats_of(config: ModelConfig) -> list[Format]:
    """Those of FORMATS that can hold the model: groups of int4 weights must divide its sizes."""

    def fits(form: Format) -> bool:
        try:
            return weight_bytes(config, form) > 0
        except EightfoldError:
            return False

    return [form for form in FORMATS if fits(form)]


def parameters(config: ModelConfig) -> tuple[int, int]:
    """→ (all parameters, those that take part in one token)."""
    total = experts = 0
    for name, shape in _shapes(config):
        total += math.prod(shape)
        experts += math.prod(shape) if ".experts." in name else 0
    return total, total - experts // config.num_experts * (config.num_experts - config.experts_per_token)


def weight_bytes(config: ModelConfig, form: Format, ranks: int = 1) -> int:
    """Bytes of weights on each of `ranks` tensor-parallel ranks."""
    table, scheme = weight_table(config), get_scheme(form.scheme)
    total = 0
    for name, shape in _shapes(config):
        count = math.prod(shape) * form.dtype.itemsize
        if table[name].quantizable and form.scheme != "dense":
            parts = scheme.stored((shape[0], shape[1])).values()
            count = sum(math.prod(part.shapes[0]) * part.dtypes[0].itemsize for part in parts if not part.optional)
        total += count // _shards(config, name, table[name].axes, ranks)
    return total


def kv_bytes(config: ModelConfig, form: Format, tokens: int, ranks: int = 1) -> int:
    """Bytes of keys and values of that many tokens on each rank; a KV head lies on one rank at least."""
    return tokens * kv_bytes_per_token(config, form.kv_dtype or form.dtype) // math.gcd(ranks, config.num_kv_heads)


def memory(config: ModelConfig, form: Format, tokens: int, ranks: int = 1) -> int:
    """Bytes that a rank needs to answer with a context of that many tokens."""
    return weight_bytes(config, form, ranks) + kv_bytes(config, form, tokens, ranks) + RESERVE


def ranks_needed(config: ModelConfig, form: Format, tokens: int, available: int) -> int | None:
    """How many ranks with `available` bytes each hold the model; None if no number of ranks does."""
    for ranks in world_sizes(config):
        if memory(config, form, tokens, ranks) <= available:
            return ranks
    return None


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    sizes = axis_sizes(config)
    for name, spec in weight_table(config).items():
        yield name, tuple(sizes[axis] for axis in spec.axes)


def _shards(config: ModelConfig, name: str, axes: tuple[str, ...], ranks: int) -> int:
    """In how many pieces tensor parallelism cuts a weight: by heads, expert width or (lm_head) vocabulary."""
    if "kv_heads" in axes:
        return math.gcd(ranks, config.num_kv_heads)
    return ranks if "heads" in axes or "width" in axes or name == "lm_head" else 1

"""What a computation needs at least: operations by number format, and bytes that must be read or written once.

Plain arithmetic on shapes, no torch: T tokens, H hidden, I expert width, K experts a token, D head size, Hq and Hkv
heads. A product of [T, in] and [out, in] counts 2 · T · in · out operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from eightfold.config import ModelConfig
from eightfold.quant_config import w4a16_group

ACTIVATION_BYTES = 4  # activations between operations are fp32


class Peaks(NamedTuple):
    """What the machine can do: operations a second in each number format, and bytes read a second."""

    operations: Mapping[str, float]  # "int8", "bf16", "fp32"
    read: float


class Format(NamedTuple):
    """How weights are stored and multiplied: bytes an element, bytes a row of scales, format of the products."""

    products: str
    element: float
    row: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """Operations by number format, and bytes."""

    operations: Mapping[str, float] = field(default_factory=dict)  # "int8", "bf16", "fp32"
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        names = [*self.operations, *(name for name in other.operations if name not in self.operations)]
        both = {name: self.operations.get(name, 0.0) + other.operations.get(name, 0.0) for name in names}
        return Work(both, self.bytes + other.bytes)

    def times(self, factor: float) -> Work:
        """This work, `factor` times over."""
        return Work({name: count * factor for name, count in self.operations.items()}, self.bytes * factor)

    @property
    def total_operations(self) -> float:
        return sum(self.operations.values())

    def compute_seconds(self, peaks: Peaks) -> float:
        """The least time that the operations take."""
        return sum(count / peaks.operations[name] for name, count in self.operations.items())

    def read_seconds(self, peaks: Peaks) -> float:
        """The least time that moving the bytes takes."""
        return self.bytes / peaks.read

    def limit_seconds(self, peaks: Peaks) -> float:
        """The least time of both, done side by side."""
        return max(self.compute_seconds(peaks), self.read_seconds(peaks))


_ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}


def weight_format(scheme: str, dtype: str, stored: str | None = None) -> Format:
    """The format of matrices of a scheme under the compute dtype `dtype` ("bfloat16"); `stored` (the same if None) is
    what floats are stored as. Products are bf16 where both are, else fp32; int8 weights fit either."""
    if scheme == "w8a8":
        return Format("int8", 1, 4)
    if scheme == "w8a16":
        return Format("bf16" if dtype == "bfloat16" else "fp32", 1, 4)
    if scheme.startswith("w4a16"):
        group = w4a16_group(scheme)
        return Format("bf16" if dtype == "bfloat16" else "fp32", 0.5 + (2 / group if group else 0), 0 if group else 2)
    stored = stored or dtype
    return Format("bf16" if dtype == stored == "bfloat16" else "fp32", _ELEMENT[stored])


def kv_format(stored: str, dtype: str = "bfloat16") -> Format:
    """The format of keys and values kept as `stored` under the compute dtype: products are bf16 only where both are.

    int8 has an fp32 scale a row. Under bf16 each of its products is two of int8, which take as long as one of bf16.
    """
    if stored == "int8":
        return Format("bf16" if dtype == "bfloat16" else "fp32", 1, 4)
    return weight_format("dense", dtype, stored)


def kv_token_bytes(config: ModelConfig, kv: Format) -> int:
    """Bytes of a token's keys and values in one layer."""
    return int(2 * config.num_kv_heads * (config.head_dim * kv.element + kv.row))


def linear(tokens: int, outs: int, ins: int, weights: Format) -> Work:
    """A matrix [outs, ins] times `tokens` rows: its operations, and the bytes of the matrix."""
    return Work({weights.products: 2.0 * tokens * outs * ins}, outs * (ins * weights.element + weights.row))


def experts(pairs: int, hit: float, hidden: int, width: int, weights: Format) -> Work:
    """`pairs` of token and expert through SwiGLU experts [I, H], of which `hit` different ones are read."""
    one = linear(1, width, hidden, weights).times(2) + linear(1, hidden, width, weights)
    return Work({weights.products: pairs * one.total_operations}, hit * one.bytes)


def attended(new: int, kv_len: int, window: int | None = None) -> int:
    """Pairs of a query and a position that it sees, for the last `new` of `kv_len` tokens."""
    if window is None or kv_len <= window:
        return new * kv_len - new * (new - 1) // 2
    return sum(min(position, window) for position in range(kv_len - new + 1, kv_len + 1))


def attention(pairs: int, heads: int, head_dim: int, products: str, kv_tokens: int, kv_token_bytes: int) -> Work:
    """Scores and their weighted sum for `pairs` of query and position, reading `kv_tokens` of one layer once."""
    return Work({products: 4.0 * pairs * heads * head_dim}, float(kv_tokens * kv_token_bytes))


def activations(tokens: int, *widths: int) -> Work:
    """Rows of fp32 read or written: `tokens` of each width."""
    return Work({}, float(ACTIVATION_BYTES * tokens * sum(widths)))


class Row(NamedTuple):
    """A sequence's part in a step: its last `new` of `kv_len` tokens."""

    new: int
    kv_len: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the model needs, part by part."""

    layers: Work  # the layers' matrices: qkv, o and experts
    attention: Work
    head: Work

    def __add__(self, other: Step) -> Step:
        return Step(self.layers + other.layers, self.attention + other.attention, self.head + other.head)

    @property
    def operations(self) -> float:
        return sum(part.total_operations for part in (self.layers, self.attention, self.head))

    @property
    def bytes(self) -> float:
        """Weights, keys and values that must be read."""
        return self.layers.bytes + self.attention.bytes + self.head.bytes

    def limit_seconds(self, peaks: Peaks) -> float:
        """The parts run one after the other, each at its own limit."""
        return sum(part.limit_seconds(peaks) for part in (self.layers, self.attention, self.head))


class Formats(NamedTuple):
    """How a model's layers, its lm_head, and its keys and values are stored and multiplied."""

    matrices: Format
    head: Format
    kv: Format


def model_step(
    config: ModelConfig,
    formats: Formats,
    rows: Sequence[Row],
    logit_rows: int,
    hits: Iterable[float],
    shared: int = 0,
) -> Step:
    """A step of the model over `rows`.

    `hits` are the different experts that each layer's tokens chose. In the last layer attention and what follows are
    for the `logit_rows` tokens only, the last ones of their rows, as in `Mixtral.forward`. The first `shared` positions
    are the same pages in all rows, and count once.
    """
    tokens, weights = sum(row.new for row in rows), formats.matrices
    hidden, query = config.hidden_size, config.num_heads * config.head_dim
    qkv = query + 2 * config.num_kv_heads * config.head_dim
    layers = Work()
    for number, hit in enumerate(hits):
        left = logit_rows if number == config.num_layers - 1 else tokens
        layers += linear(tokens, qkv, hidden, weights) + linear(left, hidden, query, weights)
        layers += experts(left * config.experts_per_token, hit, hidden, config.intermediate_size, weights)
    seen = _attention(config, formats, rows, shared).times(config.num_layers - 1)
    seen += _attention(config, formats, [row._replace(new=1) for row in rows[:logit_rows]], shared)
    head = linear(logit_rows, config.vocab_size, hidden, formats.head)
    return Step(layers, seen, head)


def _attention(config: ModelConfig, formats: Formats, rows: Sequence[Row], shared: int) -> Work:
    """One layer's attention, of which `shared` positions count once."""
    window = config.sliding_window
    pairs = sum(attended(row.new, row.kv_len, window) for row in rows)
    first_seen = [_first_seen(row, window) for row in rows]
    kv_tokens = sum(row.kv_len - first for row, first in zip(rows, first_seen, strict=True))
    kv_tokens -= sum(max(0, shared - first) for first in first_seen[1:])
    kv_bytes = kv_token_bytes(config, formats.kv)
    return attention(pairs, config.num_heads, config.head_dim, formats.kv.products, kv_tokens, kv_bytes)


def full_layer_operations(config: ModelConfig, tokens: int) -> float:
    """Operations of one whole layer's matrices for `tokens`: what the share of the dropped last layer is taken of."""
    query = config.num_heads * config.head_dim
    attention_matrices = (2 * query + 2 * config.num_kv_heads * config.head_dim) * config.hidden_size
    expert_matrices = 3 * config.experts_per_token * config.hidden_size * config.intermediate_size
    return 2.0 * tokens * (attention_matrices + expert_matrices)


def _first_seen(row: Row, window: int | None) -> int:
    """The first position whose keys and values one of the row's tokens sees."""
    return 0 if window is None else max(0, row.kv_len - row.new + 1 - window)

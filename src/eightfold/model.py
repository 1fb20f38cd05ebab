"""All of Mixtral: the table of its weights, and the forward pass over one ragged batch.

Shapes: T tokens of the batch, L logit rows, H hidden, V vocabulary, Hq and Hkv heads of size D, E experts, I expert
width. With several ranks Hq, Hkv, E and I are this rank's (`sharding`); H and V are never cut. Everything that
depends on a device or a number format is behind `Ops` and `Scheme`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.ops import Batch, Expert, ExpertShare, Ops, Pages, Rope, TailedBatch
from eightfold.parallel import Ranks, alone
from eightfold.quant import Part, Scheme, get_scheme
from eightfold.quant import Weight as StoredWeight
from eightfold.rope import rope_tables
from eightfold.sharding import Shard, shard_of, vocabulary_columns
from eightfold.types import EightfoldError


class WeightSpec(NamedTuple):
    """A weight's axes by name, and whether the checkpoint's scheme applies to it (else it is float)."""

    axes: tuple[str, ...]
    quantizable: bool = False


EMBEDDING = "model.embed_tokens"

# Names as Hugging Face has them, layer by layer; `{e}` counts experts.
TOP: Mapping[str, WeightSpec] = {
    EMBEDDING: WeightSpec(("vocab", "hidden")),
    "model.norm": WeightSpec(("hidden",)),
    "lm_head": WeightSpec(("vocab", "hidden")),
}
LAYER: Mapping[str, WeightSpec] = {
    "input_layernorm": WeightSpec(("hidden",)),
    "self_attn.q_proj": WeightSpec(("heads", "hidden"), True),
    "self_attn.k_proj": WeightSpec(("kv_heads", "hidden"), True),
    "self_attn.v_proj": WeightSpec(("kv_heads", "hidden"), True),
    "self_attn.o_proj": WeightSpec(("hidden", "heads"), True),
    "post_attention_layernorm": WeightSpec(("hidden",)),
    "block_sparse_moe.gate": WeightSpec(("experts", "hidden")),
}
EXPERT: Mapping[str, WeightSpec] = {
    "w1": WeightSpec(("width", "hidden"), True),
    "w2": WeightSpec(("hidden", "width"), True),
    "w3": WeightSpec(("width", "hidden"), True),
}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Elements along each axis that the table names."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "experts": config.num_experts,
        "width": config.intermediate_size,
    }


def weight_table(config: ModelConfig, experts: Sequence[int] | None = None) -> dict[str, WeightSpec]:
    """Every weight of the model by its full name, without the last part (".weight"); of `experts` only, or of all."""
    experts = range(config.num_experts) if experts is None else experts
    table = {name: spec for name, spec in TOP.items() if not (name == "lm_head" and config.tie_word_embeddings)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        table.update({f"{prefix}.{name}": spec for name, spec in LAYER.items()})
        for expert in experts:
            moe = f"{prefix}.block_sparse_moe.experts.{expert}"
            table.update({f"{moe}.{name}": spec for name, spec in EXPERT.items()})
    return table


def stored_tensors(config: ModelConfig, experts: Sequence[int] | None = None) -> dict[str, Part]:
    """Every tensor that a checkpoint of this model holds, by full name, with the shapes and dtypes it may have; of
    `experts` only, or of all."""
    sizes, dense, scheme = axis_sizes(config), get_scheme("dense"), get_scheme(config.scheme)
    tensors: dict[str, Part] = {}
    for name, spec in weight_table(config, experts).items():
        shape = tuple(sizes[axis] for axis in spec.axes)
        parts = (scheme if spec.quantizable else dense).stored(shape)  # type: ignore[arg-type]
        tensors.update({f"{name}.{part}": what for part, what in parts.items()})
    return tensors


class Tensors(Protocol):
    """Where weights come from: a checkpoint, or random numbers."""

    def names(self) -> Sequence[str]: ...

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer; `qkv`, `o` and `experts` are handles of the backend."""

    attention_norm: Tensor  # [H]
    qkv: Any  # [(Hq + 2·Hkv)·D, H]
    o: Any  # [H, Hq·D]
    moe_norm: Tensor  # [H]
    gate: Tensor  # [E, H]
    experts: Any


class LayerOutput(NamedTuple):
    """What one layer made of T tokens; attention + moe are the hidden states that it passes on."""

    attention: Tensor  # [T, H] hidden states after attention
    moe: Tensor  # [T, H] the experts' sum
    experts: Tensor  # [T, K] int32, best first


class Loader:
    """Takes a rank's part of the weights from a source and prepares it for a backend, one after the other."""

    def __init__(self, config: ModelConfig, source: Tensors, ops: Ops, shard: Shard) -> None:
        self.shard = shard
        self._config = config
        self._table = weight_table(config)
        self._num_experts = config.num_experts
        self._sizes = axis_sizes(config)
        self._dense, self._scheme = get_scheme("dense"), get_scheme(config.scheme)
        self._names = frozenset(source.names())
        self._source = source
        self._ops = ops
        self._views: dict[str, StoredWeight] = {}  # what `_stored` has checked already

    def tensor(self, name: str) -> Tensor:
        """A norm, gate or embedding, on the device."""
        return self._ops.prepare_tensor(self._float(self._source.tensor(f"{name}.weight")))

    def linear(self, *names: str) -> Any:
        """A handle for the matrices side by side; where ranks share their columns, for the sum over the ranks."""
        summed = self.shard.summed(self._table[names[0]].axes[1])
        return self._ops.prepare_linear([self._weight(name) for name in names], self.shard.ranks if summed else None)

    def experts(self, prefix: str) -> Any:
        """A handle for a layer's experts."""
        numbers, ranks = self.shard.experts, self.shard.ranks
        experts = [[self._weight(f"{prefix}.{e}.{name}") for name in Expert._fields] for e in numbers]
        share = ExpertShare(numbers.start, self._num_experts, ranks) if ranks.world.size > 1 else None
        return self._ops.prepare_experts([Expert(*weights) for weights in experts], share)

    def held(self) -> Iterator[Tensor]:
        """What this rank will use of the stored tensors, as the source has them: views, nothing converted."""
        for name in weight_table(self._config, self.shard.experts):
            if len(self._table[name].axes) == 1 or name == EMBEDDING:
                yield self._source.tensor(f"{name}.weight")
            else:
                yield from self._stored(name).parts.values()

    def _float(self, tensor: Tensor) -> Tensor:
        """A tensor as the file has it: fp32 arithmetic holds every stored value exactly, so only a narrower compute
        dtype makes a converted copy."""
        if self._ops.dtype in (torch.float32, tensor.dtype):
            return tensor
        return tensor.to(self._ops.dtype)

    def _weight(self, name: str) -> StoredWeight:
        weight = self._stored(name)
        if weight.scheme != self._dense.name:
            return weight
        return self._dense.wrap({"weight": self._float(weight.parts["weight"])})

    def _stored(self, name: str) -> StoredWeight:
        """This rank's part of a matrix, as views."""
        if name not in self._views:
            self._views[name] = self._checked(name)
        return self._views[name]

    def _checked(self, name: str) -> StoredWeight:
        scheme: Scheme = self._scheme if self._table[name].quantizable else self._dense
        shape = tuple(self._sizes[axis] for axis in self._table[name].axes)
        wanted = scheme.stored(shape)  # type: ignore[arg-type]
        present = {part: f"{name}.{part}" for part in wanted if f"{name}.{part}" in self._names}
        try:
            whole = scheme.wrap({part: self._source.tensor(full) for part, full in present.items()})
        except EightfoldError as error:
            raise EightfoldError(f"{name}: {error}") from None
        return self._part(name, whole)

    def _part(self, name: str, whole: StoredWeight) -> StoredWeight:
        """This rank's rows or columns, as views."""
        for axis, axis_name in enumerate(self._table[name].axes):
            start, stop = self.shard.ranges.get(axis_name, (0, whole.shape[axis]))
            if stop - start < whole.shape[axis]:
                whole = whole.slice(axis, start, stop)
        return whole


class Mixtral:
    """The model, ready to run."""

    def __init__(self, config: ModelConfig, ops: Ops, loader: Loader, max_len: int) -> None:
        self.config = config
        self.ops = ops
        self.kv_heads = loader.shard.kv_heads  # whose keys and values this rank holds
        self._world = loader.shard.ranks.world
        self._columns = torch.tensor(vocabulary_columns(config.vocab_size, self._world.size))  # [V]
        cos, sin = rope_tables(config.rope, config.head_dim, max_len)
        self._rope = Rope(ops.prepare_tensor(cos), ops.prepare_tensor(sin), config.rope.interleaved)
        self._embedding = loader.tensor(EMBEDDING)  # [V, H]
        self._layers = [self._layer(loader, f"model.layers.{number}") for number in range(config.num_layers)]
        self._norm = loader.tensor("model.norm")  # [H]
        self._head = loader.linear(EMBEDDING if config.tie_word_embeddings else "lm_head")  # [V, H]

    @classmethod
    def load(cls, config: ModelConfig, source: Tensors, ops: Ops, max_len: int, ranks: Ranks | None = None) -> Mixtral:
        """Weights from a source whose tensors have been checked against `stored_tensors(config)`.

        `max_len` is the longest sequence, in tokens; `ranks` the groups in which this rank takes its part, None where
        it does everything. Raises EightfoldError where a scheme finds bad values, and if ranks can't share the model.
        """
        return cls(config, ops, Loader(config, source, ops, shard_of(config, ranks or alone())), max_len)

    def _layer(self, loader: Loader, prefix: str) -> Layer:
        attention = f"{prefix}.self_attn"
        return Layer(
            attention_norm=loader.tensor(f"{prefix}.input_layernorm"),
            qkv=loader.linear(*(f"{attention}.{name}_proj" for name in "qkv")),
            o=loader.linear(f"{attention}.o_proj"),
            moe_norm=loader.tensor(f"{prefix}.post_attention_layernorm"),
            gate=loader.tensor(f"{prefix}.block_sparse_moe.gate"),
            experts=loader.experts(f"{prefix}.block_sparse_moe.experts"),
        )

    def forward(self, batch: Batch, pages: Sequence[Pages]) -> Tensor:
        """One step: writes the batch's keys and values into each layer's pages → logits [L, V] fp32, on the host."""
        return self.gather(self.launch(batch, pages))

    def launch(self, batch: Batch, pages: Sequence[Pages]) -> Tensor:
        """As `forward`, up to this rank's logits [L, columns] where the device has them: nothing waits for it."""
        steps = self.layers(batch, pages)
        for _ in self._layers[1:]:
            next(steps)  # not `for out in steps`: a layer's output would stay in memory while the next one runs
        out = next(steps)
        return self._head_products(out.moe, out.attention)

    def gather(self, logits: Tensor) -> Tensor:
        """This rank's logits on the device → those of all [L, V] fp32, on the host."""
        logits = logits.float().cpu()
        return self._world.all_gather(logits)[:, self._columns] if self._world.size > 1 else logits

    def layers(self, batch: Batch, pages: Sequence[Pages]) -> Iterator[LayerOutput]:
        """The step layer by layer, for `forward` and for whoever looks at what is between; the last has L tokens."""
        ops, config = self.ops, self.config
        eps, last = config.rms_norm_eps, len(self._layers) - 1
        x, residual = ops.embed(batch.ids, self._embedding), None  # [T, H]
        for number, (layer, kv) in enumerate(zip(self._layers, pages, strict=True)):
            x, residual = ops.rms_norm(x, layer.attention_norm, eps, residual)
            q = ops.rope_write_kv(ops.linear(x, layer.qkv), self._rope, batch, kv)  # [T, Hq, D]
            if number == last:  # nothing after this reads the other tokens: T becomes L
                residual = residual[batch.logit_rows]
                if isinstance(batch, TailedBatch):
                    q, batch = q[batch.of_tail], batch.tail
            x = ops.attention(q, batch, kv, config.sliding_window)  # [T, Hq·D]
            if number == last:
                x = x[batch.logit_rows]
            x = ops.linear(x, layer.o)  # [T, H]
            x, residual = ops.rms_norm(x, layer.moe_norm, eps, residual)
            ids, weights = ops.route(x, layer.gate, config.experts_per_token)  # [T, K]
            x = ops.moe(x, ids, weights, layer.experts)  # [T, H]
            yield LayerOutput(residual, x, ids)

    def logits(self, x: Tensor, residual: Tensor) -> Tensor:
        """x and residual [L, H], of which the sum leaves the last layer → [L, V] fp32, on the host."""
        return self.gather(self._head_products(x, residual))

    def _head_products(self, x: Tensor, residual: Tensor) -> Tensor:
        x, _ = self.ops.rms_norm(x, self._norm, self.config.rms_norm_eps, residual)
        return self.ops.linear(x, self._head)  # this rank's rows of the vocabulary

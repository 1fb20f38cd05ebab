"""Outlier smoothing: large inputs of a matrix are made smaller and its columns larger, before rounding.

A factor f for each input of a matrix divides what makes that input and multiplies the matrix's column, so the
product stays the same and only its rounding differs (SmoothQuant, Xiao et al. 2023: f = max|x|^a / max|w|^(1 - a)).
What makes the inputs is, of the four kinds of place in a layer:

    q, k, v             input_layernorm
    o                   the rows of v, the same for the query heads that share a key-value head
    w1, w3 and router   post_attention_layernorm; the router's columns are multiplied too, so it chooses the same
    w2 of an expert     the rows of its w3

Factors are powers of two, so folding them into float weights rounds nothing, and a float model with them
computes the same. A place keeps them only where the error of its outputs, on the calibration tokens, is lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eightfold.model import Mixtral
from eightfold.ops import Batch, Ops
from eightfold.ops.cpu import CpuOps
from eightfold.quant import Scheme, get_scheme
from eightfold.quantize.source import Factors, Source
from eightfold.types import EightfoldError, Progress

STRENGTHS = (0.25, 0.5, 0.75)  # a in the formula: how much of an input's size goes into the weights
WINDOW = 512  # tokens that see one another
FEWEST_TOKENS = 32  # on which an expert's own inputs are judged
_JUDGED_TOKENS = 512  # of which outputs are compared; largest inputs are taken of all tokens
_GAIN = 0.99  # of the error must be undercut
_MOST_EXPONENT = 6
_BLOCK_ROWS = 1024
_PAGE = 32


class Place(NamedTuple):
    """A place in a layer: the relative error of its outputs without and with factors, and whether it has them."""

    name: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What came of a calibration. `unseen` names experts that saw too few tokens to be judged."""

    factors: Factors
    places: list[Place]
    unseen: list[str]

    def lines(self) -> list[str]:
        """In words: what was kept, and what it gains."""
        kept = [place for place in self.places if place.kept]
        result = [f"smoothing kept in {len(kept)} of {len(self.places)} places"]
        result += [f"  {place.name}: output error {place.before:.3%} → {place.after:.3%}" for place in kept]
        return result + [f"  {name}, left as it is" for name in self.unseen]


@torch.inference_mode()
def calibrate(
    source: Source, scheme: str, ids: Sequence[int], threads: int | None, progress: Progress | None = None
) -> Smoothing:
    """Runs the float model over `ids` layer by layer and finds factors for its places as it passes them.

    Held in memory are the hidden states of the tokens and a block of one matrix. Raises EightfoldError if the source
    is quantized, or computes something that is not finite.
    """
    config = source.stored_config
    if config.scheme != "dense":
        raise EightfoldError(f"{source.folder} is quantized ({config.scheme}); smoothing needs float weights")
    if len(ids) < FEWEST_TOKENS:
        raise EightfoldError(f"the calibration text has {len(ids)} tokens; at least {FEWEST_TOKENS} are needed")
    finder = _Finder(source, get_scheme(scheme), CpuOps(torch.float32, threads))
    ops = _ListeningOps(config.num_layers, finder, threads, progress)
    model = Mixtral.load(config, source.checkpoint, ops, WINDOW)
    batch, pages = _batch(ids, ops)
    kv = ops.new_pages(pages, _PAGE, config.num_kv_heads, config.head_dim, torch.float32)
    model.forward(batch, [kv] * config.num_layers)  # a layer's keys and values are read by nobody after it
    return Smoothing(Factors(finder.rows, finder.columns), finder.places, finder.unseen)


def _batch(ids: Sequence[int], ops: Ops) -> tuple[Batch, int]:
    """`ids` in windows, each a row of one batch with pages of its own → the batch, and how many pages it takes."""
    count = len(ids)
    starts = torch.tensor([*range(0, count, WINDOW), count], dtype=torch.int32)
    lengths = starts.diff()
    each = WINDOW // _PAGE
    positions = torch.arange(count, dtype=torch.int32) % WINDOW
    table = torch.arange(len(lengths) * each, dtype=torch.int32).view(-1, each)
    slots = torch.arange(count)  # windows are whole numbers of pages, so slots follow one another
    rows = torch.arange(count)  # all tokens go through the last layer
    tensors = (torch.tensor(ids), positions, slots, starts, lengths, table, rows)
    return Batch(*(tensor.to(ops.device) for tensor in tensors)), table.numel()


class _ListeningOps(CpuOps):
    """Tells the finder what enters the matrices of each layer, in the order of the model's calls."""

    def __init__(self, layers: int, finder: _Finder, threads: int | None, progress: Progress | None) -> None:
        super().__init__(torch.float32, threads)
        self._layers, self._finder, self._progress = layers, finder, progress
        self._calls = 0

    def linear(self, x: Tensor, linear: Any) -> Tensor:
        layer, is_output = divmod(self._calls, 2)
        self._calls += 1
        if layer == self._layers:
            return x.new_zeros(len(x), 1)  # lm_head: nobody reads these logits
        if not bool(x.isfinite().all()):
            raise EightfoldError(f"the model computes something that is not finite in layer {layer}")
        (self._finder.attention_output if is_output else self._finder.attention_input)(layer, x)
        return super().linear(x, linear)

    def moe(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
        layer = self._calls // 2 - 1
        self._finder.experts(layer, x, ids)
        if self._progress:
            self._progress(layer + 1, self._layers)
        return super().moe(x, ids, weights, experts)


class _Finder:
    """Finds factors for one place after the other."""

    def __init__(self, source: Source, scheme: Scheme, ops: CpuOps) -> None:
        self._source, self._scheme, self._ops = source, scheme, ops
        self._config = source.stored_config
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.places: list[Place] = []
        self.unseen: list[str] = []

    def attention_input(self, layer: int, x: Tensor) -> None:
        """x [T, H]: what q, k and v multiply."""
        prefix = f"model.layers.{layer}"
        names = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        factors = self._judge(f"layer {layer}, q k v", [(name, x) for name in names], x.abs().amax(0))
        if factors is not None:
            self._divide(f"{prefix}.input_layernorm", factors)
            self._multiply(names, factors)

    def attention_output(self, layer: int, x: Tensor) -> None:
        """x [T, Hq·D]: what o multiplies."""
        config, prefix = self._config, f"model.layers.{layer}.self_attn"
        shared = (config.num_kv_heads, -1, config.head_dim)  # query heads of a key-value head lie together

        def alike(values: Tensor) -> Tensor:
            """The largest of the query heads that share a row of v, for each of them."""
            heads = values.view(shared)
            return heads.amax(1, keepdim=True).expand_as(heads).flatten()

        factors = self._judge(f"layer {layer}, o", [(f"{prefix}.o_proj", x)], x.abs().amax(0), alike)
        if factors is not None:
            self._divide(f"{prefix}.v_proj", factors.view(shared)[:, 0].flatten())
            self._multiply([f"{prefix}.o_proj"], factors)

    def experts(self, layer: int, x: Tensor, ids: Tensor) -> None:
        """x [T, H]: what the router and the experts multiply; ids [T, K]: the experts of each token."""
        prefix = f"model.layers.{layer}"
        experts = [f"{prefix}.block_sparse_moe.experts.{number}" for number in range(self._config.num_experts)]
        chosen = [x[(ids == number).any(1)] for number in range(len(experts))]
        pairs = [(f"{name}.{w}", own) for name, own in zip(experts, chosen, strict=True) for w in ("w1", "w3")]
        factors = self._judge(f"layer {layer}, w1 w3", pairs, x.abs().amax(0))
        if factors is not None:
            self._divide(f"{prefix}.post_attention_layernorm", factors)
            self._multiply([f"{prefix}.block_sparse_moe.gate", *(name for name, _ in pairs)], factors)
        for number, (name, own) in enumerate(zip(experts, chosen, strict=True)):
            if len(own) < FEWEST_TOKENS:
                self.unseen.append(f"layer {layer}, expert {number} saw {len(own)} of {len(x)} tokens")
                continue
            inner = torch.nn.functional.silu(self._product(f"{name}.w1", own)) * self._product(f"{name}.w3", own)
            factors = self._judge(f"layer {layer}, w2 of expert {number}", [(f"{name}.w2", inner)], inner.abs().amax(0))
            if factors is not None:
                self._divide(f"{name}.w3", factors)
                self._multiply([f"{name}.w2"], factors)

    def _divide(self, name: str, factors: Tensor) -> None:
        self.rows[name] = 1 / factors

    def _multiply(self, names: Iterable[str], factors: Tensor) -> None:
        self.columns.update(dict.fromkeys(names, factors))

    def _weight(self, name: str) -> Tensor:
        return self._source.checkpoint.tensor(f"{name}.weight")

    def _product(self, name: str, x: Tensor) -> Tensor:
        """x [T, in] → [T, out]"""
        dense = get_scheme("dense").wrap({"weight": self._weight(name)})
        return self._ops.linear(x, self._ops.prepare_linear([dense]))

    def _judge(
        self,
        place: str,
        matrices: Sequence[tuple[str, Tensor]],
        largest: Tensor,
        tie: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """Factors [in] for matrices (name, inputs [T, in]) that share them, if some are worth it; `largest` [in] is of
        all inputs, and `tie` makes the values of inputs equal that must share a factor."""
        tie = tie or (lambda values: values)
        columns = torch.stack([self._largest_columns(name) for name, _ in matrices]).amax(0)
        candidates = [_factors(tie(largest), tie(columns), strength) for strength in STRENGTHS]
        found = [self._errors(name, x, candidates) for name, x in matrices if len(x)]
        relative = torch.cat(found, 1).mean(1)  # tokens count alike, however large their outputs are
        best = int(relative[1:].argmin())
        before, after = float(relative[0]), float(relative[1 + best])
        kept = after < _GAIN * before
        self.places.append(Place(place, before, after, kept))
        return candidates[best] if kept else None

    def _largest_columns(self, name: str) -> Tensor:
        """The largest absolute weight of each column [in]."""
        blocks = torch.split(self._weight(name), _BLOCK_ROWS)
        return torch.stack([block.float().abs().amax(0) for block in blocks]).amax(0)

    def _errors(self, name: str, inputs: Tensor, candidates: Sequence[Tensor]) -> Tensor:
        """The relative error of the outputs x · wᵀ of some tokens, [1 + candidates, tokens]: first without factors."""
        x = inputs[:: -(-len(inputs) // _JUDGED_TOKENS)]
        ones = torch.ones(x.shape[1])
        lost, total = torch.zeros(1 + len(candidates), len(x), dtype=torch.float64), torch.zeros(len(x))
        for block in torch.split(self._weight(name), _BLOCK_ROWS):
            wide = block.float()
            want = self._ops.linear(x, self._ops.prepare_linear([get_scheme("dense").wrap({"weight": wide})]))
            total += want.square().sum(1)
            for number, factors in enumerate((ones, *candidates)):
                made = self._scheme.wrap(self._scheme.quantize(wide * factors))
                got = self._ops.linear(x / factors, self._ops.prepare_linear([made]))
                lost[number] += (got - want).double().square().sum(1)
        return (lost / total.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()


def _factors(inputs: Tensor, columns: Tensor, strength: float) -> Tensor:
    """The nearest powers of two to inputs^a / columns^(1 - a), centred on 1; inputs that are never used keep 1."""
    exponents = strength * inputs.log2() - (1 - strength) * columns.log2()
    used = exponents.isfinite()
    if not bool(used.any()):
        return torch.ones_like(inputs)
    centred = (exponents - exponents[used].median()).round().clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    return torch.where(used, centred, 0.0).exp2()

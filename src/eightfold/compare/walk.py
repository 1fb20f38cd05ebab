"""Two models over the same tokens, side by side and layer by layer.

Each carries its own hidden states along, as when it runs alone. All tokens pass a layer before any enters the next, so
each weight is read once, and keys and values are kept of one layer and one step at a time: memory is that of the
hidden states, whatever the size of the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.compare.measures import Outcomes, outcomes, routing, similarity
from eightfold.compare.report import LayerReport
from eightfold.model import LayerOutput, Mixtral
from eightfold.ops import Batch
from eightfold.runner import make_batch
from eightfold.types import EightfoldError, Plan

PAGE = 32  # tokens, or the next larger number that the device can read
STEP_TOKENS = 1024  # that pass a layer at once, unless a single window is longer
LOGIT_BYTES = 64 << 20  # of logits in fp64, of each model at a time

Window = Sequence[int]


class Side(NamedTuple):
    """One of the two models, loaded, with the dtype of its keys and values."""

    name: str
    model: Mixtral
    kv_dtype: torch.dtype


def steps(windows: Sequence[Window], page_size: int) -> list[Plan]:
    """Windows, in their order, as steps of about STEP_TOKENS: each is a row with pages of its own."""
    groups: list[list[Window]] = [[]]
    for window in windows:
        if groups[-1] and sum(map(len, groups[-1])) + len(window) > STEP_TOKENS:
            groups.append([])
        groups[-1].append(window)
    return [_plan(group, page_size) for group in groups]


def walk(
    a: Side, b: Side, windows: Sequence[Window], progress: Callable[[int, int], None] | None = None
) -> tuple[list[LayerReport], Outcomes]:
    """What each layer does to both, and what both say at each position of all windows, in their order; both are on one
    device.

    Raises EightfoldError when a model computes something that is not a finite number, naming model and layer.
    """
    page_size = a.model.ops.page_size(PAGE)
    plans, layers = steps(windows, page_size), a.model.config.num_layers
    done, total = 0, (layers + 1) * len(plans)
    runs_a, runs_b = _runs(a, plans, page_size), _runs(b, plans, page_size)
    reports: list[LayerReport] = []
    last: list[tuple[LayerOutput, LayerOutput]] = []
    for layer in range(layers):
        tally = _Tally()
        for run_a, run_b in zip(runs_a, runs_b, strict=True):
            out_a, out_b = next(run_a), next(run_b)
            told_a, told_b = _on_host(out_a), _on_host(out_b)
            _check(a, told_a, layer)
            _check(b, told_b, layer)
            tally.add(told_a, told_b)
            if layer == layers - 1:
                last.append((out_a, out_b))
            done += 1
            if progress:
                progress(done, total)
        reports.append(tally.report(layer))
    found: list[Outcomes] = []
    for plan, pair in zip(plans, last, strict=True):
        found += _heads(a, b, pair, _following(plan))
        done += 1
        if progress:
            progress(done, total)
    return reports, Outcomes(*(torch.cat(column) for column in zip(*found, strict=True)))


def _plan(windows: Sequence[Window], page_size: int) -> Plan:
    starts, pages, first = [0], [], 0
    for window in windows:
        count = -(-len(window) // page_size)
        starts.append(starts[-1] + len(window))
        pages.append(list(range(first, first + count)))
        first += count
    ids = [token for window in windows for token in window]
    return Plan(ids, starts, [len(window) for window in windows], pages, list(range(len(ids))))


def _runs(side: Side, plans: Sequence[Plan], page_size: int) -> list[Iterator[LayerOutput]]:
    """The model's layers over each step. One layer's pages serve all layers and steps: when a step's layer has run,
    nobody reads its keys and values again."""
    model, config = side.model, side.model.config
    most = max(sum(map(len, plan.page_table)) for plan in plans)
    pages = model.ops.new_pages(most, page_size, config.num_kv_heads, config.head_dim, side.kv_dtype)
    batches: list[Batch] = [make_batch(plan, page_size, model.ops.device) for plan in plans]
    return [model.layers(batch, [pages] * config.num_layers) for batch in batches]


def _on_host(out: LayerOutput) -> LayerOutput:
    """Where measures are taken in fp64, which not every device has."""
    return LayerOutput(*(part.cpu() for part in out))


def _check(side: Side, out: LayerOutput, layer: int) -> None:
    for part, values in (("attention", out.attention), ("experts", out.moe)):
        if not bool(values.isfinite().all()):
            raise EightfoldError(
                f"{side.name} computes something that is not a finite number in the {part} of layer {layer}; "
                "its weights are damaged, or a 16-bit dtype overflows (try --dtype float32)"
            )


class _Tally:
    """Collects a layer's tokens, step by step."""

    def __init__(self) -> None:
        self._columns: list[tuple[Tensor, ...]] = []  # of each step, [T] each

    def add(self, a: LayerOutput, b: LayerOutput) -> None:
        after_attention = similarity(a.attention, b.attention)
        after_moe = similarity(a.attention + a.moe, b.attention + b.moe)
        same = routing(a.experts, b.experts)
        self._columns.append((*after_attention, *after_moe, *same))

    def report(self, layer: int) -> LayerReport:
        attention, attention_cosine, moe, moe_cosine, same_set, same_first = (
            torch.cat(column).tolist() for column in zip(*self._columns, strict=True)
        )
        return LayerReport(
            layer=layer,
            attention_error=mean(attention),
            attention_worst=max(attention),
            attention_cosine=mean(attention_cosine),
            moe_error=mean(moe),
            moe_worst=max(moe),
            moe_cosine=mean(moe_cosine),
            same_experts=mean(same_set),
            same_first=mean(same_first),
        )


def mean(values: Sequence[float]) -> float:
    """Summed exactly: the mean of ones is 1."""
    return math.fsum(values) / len(values)


def _following(plan: Plan) -> Tensor:
    """The token after each of the step's, −1 at the end of a window."""
    following = torch.tensor([*plan.ids[1:], -1])
    following[torch.tensor(plan.query_starts[1:]) - 1] = -1
    return following


def _heads(a: Side, b: Side, pair: tuple[LayerOutput, LayerOutput], following: Tensor) -> Iterator[Outcomes]:
    """Outcomes of some positions at a time: logits of all would take V times as much as one number a token."""
    rows = max(1, LOGIT_BYTES // (8 * a.model.config.vocab_size))
    for start in range(0, len(following), rows):
        part = slice(start, start + rows)
        logits = []
        for side, out in zip((a, b), pair, strict=True):
            logits.append(side.model.logits(out.moe[part], out.attention[part]).cpu())
            if not bool(logits[-1].isfinite().all()):
                raise EightfoldError(f"{side.name} computes logits that are not finite numbers")
        yield outcomes(logits[0], logits[1], following[part])

"""From two folders to a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from eightfold.compare.measures import Outcomes
from eightfold.compare.models import Model, check_alike, open_model, shared_tokenizer
from eightfold.compare.report import Bucket, ModelReport, Report, TokenReport
from eightfold.compare.texts import Windows, cut, default_documents, given_text, random_windows
from eightfold.compare.walk import Side, mean, walk
from eightfold.compare.weights import by_kind, overall, weight_distances
from eightfold.loader import kv_cache_dtype, named_dtype
from eightfold.model import Mixtral
from eightfold.ops import get_ops
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is, how much there is

WINDOW = 2048  # tokens, where both models' contexts allow it
FURTHEST = 12  # positions that are shown
BEFORE = 24  # tokens of text before such a position
TINIEST_KL = 1e-9  # of the histogram; what is below falls into one bucket from 0


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Two models and how to run both. Every field has the meaning of the command-line option of its name.

    `text` None is a text of our own, and `kv_cache_dtype_b` None is A's.
    """

    a: str
    b: str
    text: str | None = None
    tokens: int = 4096
    window: int | None = None
    weights: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    kv_cache_dtype: str = "auto"
    kv_cache_dtype_b: str | None = None
    threads: int | None = None
    allow_pickle: bool = False


def summary(
    a: str,
    b: str,
    *,
    tokens: int = 1024,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A comparison that is short enough to follow the making of `b` from `a`; print it with `short_lines`.

    All weights are compared, and the models on `tokens` tokens of the text that `eightfold compare` takes by default.
    """
    return compare(CompareOptions(a, b, tokens=tokens, threads=threads, allow_pickle=allow_pickle), progress)


@torch.inference_mode()
def compare(options: CompareOptions, progress: Progress | None = None) -> Report:
    """Raises EightfoldError, before anything is computed, if an option, a folder or the text won't do."""
    for name in ("tokens", "window", "threads"):
        least, value = (1 if name == "threads" else 2), getattr(options, name)
        if value is not None and value < least:
            raise EightfoldError(f"--{name} is {value}; it must be at least {least}")
    dtype = named_dtype("dtype", options.dtype, torch.float32)
    kv_a = kv_cache_dtype(options.kv_cache_dtype, dtype)
    kv_b = kv_a
    if options.kv_cache_dtype_b is not None:
        kv_b = kv_cache_dtype(options.kv_cache_dtype_b, dtype, "kv-cache-dtype-b")
    text = None if options.text is None else given_text(options.text)
    a, b = open_model(options.a, options.allow_pickle), open_model(options.b, options.allow_pickle)
    check_alike(a, b)
    tokenizer = shared_tokenizer(a, b)
    windows = _windows(options, text, a, b, tokenizer)
    ops = get_ops(options.device, dtype, options.threads)
    longest = max(map(len, windows.ids))
    side_a, side_b = (
        Side(model.name, Mixtral.load(model.config, model.checkpoint, ops, longest), kv)
        for model, kv in ((a, kv_a), (b, kv_b))
    )
    layers, said = walk(side_a, side_b, windows.ids, _part(progress, "Layers"))
    distances = weight_distances(a, b, ops.threads, _part(progress, "Weights")) if options.weights else {}
    kl = said.kl
    return Report(
        a=_model_report(a, kv_a, said.loss_a),
        b=_model_report(b, kv_b, said.loss_b),
        text=windows.source,
        tokens=windows.tokens,
        windows=len(windows.ids),
        longest_window=longest,
        dtype=_name(dtype),
        device=options.device,
        layers=tuple(layers),
        kl_mean=mean(kl.tolist()),
        kl_median=float(kl.quantile(0.5)),
        kl_99=float(kl.quantile(0.99)),
        kl_worst=float(kl.max()),
        top1_agreement=mean((said.best_a == said.best_b).tolist()),
        same_experts=mean([layer.same_experts for layer in layers]),
        same_first=mean([layer.same_first for layer in layers]),
        kl_histogram=_histogram(kl),
        kl_by_position=_by_position(kl, windows.ids),
        furthest=_furthest(said, windows, tokenizer),
        weight_error=overall(distances) if distances else None,
        weights=by_kind(distances),
        notes=_notes(a, b),
    )


def _windows(options: CompareOptions, text: str | None, a: Model, b: Model, tokenizer: Tokenizer | None) -> Windows:
    context = min(model.config.max_position_embeddings for model in (a, b))
    if options.window is not None and options.window > context:
        raise EightfoldError(f"--window is {options.window}; these models were made for at most {context} tokens")
    window = options.window or min(WINDOW, context)
    if tokenizer is None:
        if text is not None:
            raise EightfoldError(
                f"neither {a.name} nor {b.name} has a tokenizer, so --text can't be read; leave it out"
            )
        return random_windows(a.config.vocab_size, window, options.tokens)
    source, documents = default_documents(a.folder) if text is None else (str(options.text), [text])
    return cut(source, documents, tokenizer, window, options.tokens)


def _part(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _model_report(model: Model, kv_dtype: torch.dtype, losses: Tensor) -> ModelReport:
    known = losses[losses.isfinite()].tolist()  # NaN where nothing follows
    perplexity = math.exp(min(mean(known), 700.0))  # more would not be a number that JSON has
    return ModelReport(model.name, model.config.scheme, model.checkpoint.total_bytes, _name(kv_dtype), perplexity)


def _notes(a: Model, b: Model) -> tuple[str, ...]:
    notes = []
    if a.config.rope.interleaved != b.config.rope.interleaved:
        notes.append("q_proj and k_proj are stored in different orders of rows, so they are not among the weights")
    norms = [f"model.layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    if any(not torch.equal(a.checkpoint.tensor(name).float(), b.checkpoint.tensor(name).float()) for name in norms):
        notes.append("the norms differ; if outliers were smoothed into them, the weights' errors count that as well")
    return tuple(notes)


def _bucket(low: float, high: float, values: Tensor) -> Bucket:
    return Bucket(low, high, len(values), mean(values.tolist()) if len(values) else 0.0)


def _histogram(kl: Tensor) -> tuple[Bucket, ...]:
    """Buckets of half a decade, from the lowest that has a position to the highest; first, all that is next to 0."""
    first, last = (math.floor(2 * math.log10(max(float(end), TINIEST_KL))) for end in (kl.min(), kl.max()))
    edges = [0.0] * (float(kl.min()) < TINIEST_KL) + [10 ** (number / 2) for number in range(first, last + 2)]
    return tuple(_bucket(low, high, kl[(kl >= low) & (kl < high)]) for low, high in pairwise(edges))


def _by_position(kl: Tensor, windows: Sequence[Sequence[int]]) -> tuple[Bucket, ...]:
    """Buckets of places in a window that double in width: 0, 1, 2–3, 4–7, …"""
    places = torch.cat([torch.arange(len(window)) for window in windows])
    buckets, low, high = [], 0, 1
    while low <= int(places.max()):
        buckets.append(_bucket(low, high, kl[(places >= low) & (places < high)]))
        low, high = high, 2 * high
    return tuple(buckets)


def _furthest(said: Outcomes, windows: Windows, tokenizer: Tokenizer | None) -> tuple[TokenReport, ...]:
    """The positions with the largest KL, the largest first; none where there is no difference."""
    places = [(window, place) for window in windows.ids for place in range(len(window))]

    def text(token: int) -> str:
        return f"[{token}]" if tokenizer is None else tokenizer.token_text(token)

    reports: list[TokenReport] = []
    seen: set[tuple[int, ...]] = set()
    for index in said.kl.argsort(descending=True, stable=True).tolist():
        if said.kl[index] == 0 or len(reports) == FURTHEST:
            break
        window, place = places[index]
        if window[: place + 1] in seen:  # the same beginning of another window
            continue
        seen.add(window[: place + 1])
        ids = window[max(0, place + 1 - BEFORE) : place + 1]
        before = "".join(map(text, ids)) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
        following = text(window[place + 1]) if place + 1 < len(window) else None
        a, b = (text(int(best[index])) for best in (said.best_a, said.best_b))
        values = [float(column[index]) for column in (said.prob_a, said.prob_b, said.kl)]
        reports.append(TokenReport(before, following, a, values[0], b, values[1], values[2]))
    return tuple(reports)

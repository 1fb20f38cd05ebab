"""What a comparison found, as plain data: what `--json` writes, and what terminal and page show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One of the two models: as the user called it, how it is stored, its bytes, and its perplexity on the text."""

    name: str
    scheme: str
    weight_bytes: int
    kv_cache_dtype: str
    perplexity: float


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Hidden states of B against A's after a layer's attention and after its experts, and its router's choices.

    Errors |b − a| / |a| and cosines are means over tokens; `worst` is the token with the largest error. `same_experts`
    and `same_first` are shares of tokens: all chosen experts are the same, the one with the largest weight is.
    """

    layer: int
    attention_error: float
    attention_worst: float
    attention_cosine: float
    moe_error: float
    moe_worst: float
    moe_cosine: float
    same_experts: float
    same_first: float


@dataclass(frozen=True, slots=True)
class KindReport:
    """Relative Frobenius errors |b − a| / |a| of all tensors of a kind: their mean, the worst, and whose that is."""

    kind: str
    tensors: int
    mean_error: float
    worst_error: float
    worst_tensor: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """Positions whose value lies from `low` up to and without `high`: how many there are, and their mean KL."""

    low: float
    high: float
    count: int
    mean_kl: float


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A position where the two differ most: the text before it, what comes next, and what each thinks will."""

    before: str
    next: str | None
    a_token: str
    a_probability: float
    b_token: str
    b_probability: float
    kl: float


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. KL is KL(A ‖ B) of the next token's distribution in nats, over all `tokens` positions.

    `weight_error` takes all weights as one long vector; it is None, and `weights` empty, where weights were not
    compared. `kl_histogram` has buckets of KL, `kl_by_position` buckets of places in a window, from 0.
    """

    a: ModelReport
    b: ModelReport
    text: str
    tokens: int
    windows: int
    longest_window: int
    dtype: str
    device: str
    layers: tuple[LayerReport, ...]
    kl_mean: float
    kl_median: float
    kl_99: float
    kl_worst: float
    top1_agreement: float
    same_experts: float
    same_first: float
    kl_histogram: tuple[Bucket, ...]
    kl_by_position: tuple[Bucket, ...]
    furthest: tuple[TokenReport, ...]
    weight_error: float | None
    weights: tuple[KindReport, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"eightfold_compare": 1, **asdict(self)}


def percent(value: float) -> str:
    """An error, as in "0.62 %"; three digits, however small."""
    return f"{100 * value:.3g} %"


def agreement(value: float) -> str:
    """A share, as in "99.21 %"; it says 100 % only when nothing is missing."""
    return "100 %" if value == 1 else f"{min(100 * value, 99.99):.2f} %"


def size(count: int) -> str:
    """Bytes, as in "4.99 MB" or "93.4 GB"."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{count / unit:.3g} {name}"


def windows(report: Report) -> str:
    """As in "53 windows of up to 175 tokens"."""
    number = "1 window" if report.windows == 1 else f"{report.windows} windows"
    return f"{number} of up to {report.longest_window} tokens"


def change(a: float, b: float) -> str:
    """By how much b is above a, as in "+0.16 %"."""
    return f"{100 * (b - a) / a:+.2f} %" if b != a else "the same"


def short_lines(report: Report) -> list[str]:
    """The comparison in a few lines, for a terminal."""
    a, b = report.a.perplexity, report.b.perplexity
    lines = []
    if report.weight_error is not None:
        worst = max(report.weights, key=lambda kind: kind.worst_error)
        where = f", worst {percent(worst.worst_error)} in {worst.worst_tensor}" if worst.worst_error else ""
        lines.append(f"weights     off by {percent(report.weight_error)}{where}")
    return [
        *lines,
        f"perplexity  {a:.4g} → {b:.4g} ({change(a, b)})",
        f"KL(A‖B)     {report.kl_mean:.3g} nats in the mean, {report.kl_99:.3g} at the 99th percentile",
        f"top token   the same at {agreement(report.top1_agreement)} of positions",
        f"router      the same experts for {agreement(report.same_experts)} of tokens, "
        f"the same first for {agreement(report.same_first)}",
        f"measured on {report.tokens} tokens of {report.text}, in {windows(report)}, computed in {report.dtype}",
    ]

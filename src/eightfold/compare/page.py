"""The comparison as one HTML page: pictures and tables, complete in itself, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from eightfold import __version__
from eightfold.compare.report import Bucket, Report, TokenReport, agreement, change, percent, size, windows
from eightfold.html import card, document, last_part, table, tiles
from eightfold.html.charts import Bar, Series, bars, columns, lines


def page(report: Report) -> str:
    """The whole page."""
    names = f"{last_part(report.a.name)} and {last_part(report.b.name)}"
    cards = [
        card(
            "How far apart the hidden states are, layer by layer",
            "Length of the difference over the length of A's state, in the mean over tokens. 0 is equal.",
            _errors(report),
        ),
        card(
            "Do the routers choose the same experts?",
            "Share of tokens in each layer. The axis does not begin at 0.",
            _routers(report),
        ),
        card(
            "How differently they predict the next token",
            "KL divergence of B's prediction from A's at each position, in nats; further right is worse.",
            _histogram(report.kl_histogram),
        ),
        card(
            "Does it grow with the text before it?",
            "Mean KL divergence by the place in a window.",
            _by_position(report.kl_by_position),
        ),
        card("How surprised each is by the text", "Perplexity: lower is better.", _perplexities(report)),
    ]
    if report.weights:
        cards.append(
            card(
                "How far apart the weights are",
                "Relative error of the worst tensor of each kind, as what its stored numbers stand for.",
                _weights(report),
            )
        )
    body = (
        f"{_head(report)}\n{_tiles(report)}\n"
        f'<div class="cards">{"".join(cards)}{_furthest(report.furthest)}{_tables(report)}</div>\n'
        f"<footer>{_footer(report)}</footer>"
    )
    return document(f"{names} compared", body)


def _head(report: Report) -> str:
    sides = [
        f'<span class="{letter.lower()}">{letter}</span> is <code>{escape(one.name)}</code>, {escape(one.scheme)} '
        f"weights of {size(one.weight_bytes)}, keys and values {escape(one.kv_cache_dtype)}"
        for letter, one in (("A", report.a), ("B", report.b))
    ]
    notes = "".join(f'<p class="soft">Note: {escape(note)}.</p>' for note in report.notes)
    return (
        "<h1>How much does B behave like A?</h1>"
        f"<p>{sides[0]}.<br>{sides[1]}.</p>"
        f'<p class="soft">Both ran over the same {report.tokens} tokens of {escape(report.text)}, in '
        f"{windows(report)}, each with its own hidden states, computed in {escape(report.dtype)}.</p>{notes}"
    )


def _tiles(report: Report) -> str:
    shift = change(report.a.perplexity, report.b.perplexity)
    shown = [
        (agreement(report.top1_agreement), "of positions have the same likeliest next token"),
        (
            f"{report.kl_mean:.3g}",
            f"nats of KL divergence in the mean; 99 of 100 positions are below {report.kl_99:.3g}",
        ),
        (shift, f"perplexity, from {report.a.perplexity:.4g} (A) to {report.b.perplexity:.4g} (B)"),
        (agreement(report.same_experts), "of router choices are the same experts"),
    ]
    if report.weight_error is not None:
        shown.append((percent(report.weight_error), "relative error of all weights together"))
    return tiles(shown)


def _errors(report: Report) -> str:
    series = [
        Series("after attention", "c", [layer.attention_error for layer in report.layers]),
        Series("after experts", "d", [layer.moe_error for layer in report.layers]),
    ]
    return lines(series, [str(layer.layer) for layer in report.layers], "layer", percent)


def _routers(report: Report) -> str:
    series = [
        Series("all chosen experts the same", "c", [layer.same_experts for layer in report.layers]),
        Series("the first the same", "d", [layer.same_first for layer in report.layers]),
    ]
    labels = [str(layer.layer) for layer in report.layers]
    return lines(series, labels, "layer", lambda share: f"{100 * share:.4g} %", from_zero=False)


def _histogram(buckets: Sequence[Bucket]) -> str:
    total = sum(bucket.count for bucket in buckets)
    return columns(
        [bucket.count / total for bucket in buckets],
        [_power(bucket.low) for bucket in buckets],
        [f"{bucket.count} positions from {bucket.low:.2g} to {bucket.high:.2g}" for bucket in buckets],
        "KL divergence in nats: each column from the number under it to the next",
        lambda share: f"{100 * share:.3g} %",
    )


def _power(value: float) -> str:
    """The low end of a bucket: 0, a power of ten, or nothing for the half decades between."""
    exponent = math.log10(value) if value else 0.0
    if not value:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if abs(exponent - round(exponent)) < 0.1 else ""


def _by_position(buckets: Sequence[Bucket]) -> str:
    labels = [f"{int(bucket.low)}" for bucket in buckets]
    hovers = [
        f"places {int(bucket.low)} to {int(bucket.high) - 1}: {bucket.mean_kl:.3g} nats, {bucket.count} positions"
        for bucket in buckets
    ]
    under = "tokens before it: each column from the number under it to the next"
    return columns([bucket.mean_kl for bucket in buckets], labels, hovers, under, lambda kl: f"{kl:.3g}")


def _perplexities(report: Report) -> str:
    a, b = report.a.perplexity, report.b.perplexity
    rows = [
        ["KL divergence: median position", f"{report.kl_median:.3g}"],
        ["mean", f"{report.kl_mean:.3g}"],
        ["99th percentile", f"{report.kl_99:.3g}"],
        ["worst", f"{report.kl_worst:.3g}"],
        ["same likeliest token", agreement(report.top1_agreement)],
        ["same experts, all layers", agreement(report.same_experts)],
        ["same first expert, all layers", agreement(report.same_first)],
    ]
    both = [Bar("A", a, f"{a:.5g}", "a"), Bar("B", b, f"{b:.5g}  ({change(a, b)})", "b")]
    return bars(both) + table(["and in numbers", ""], rows)


def _weights(report: Report) -> str:
    differ = [kind for kind in report.weights if kind.worst_error > 0]
    equal = ", ".join(kind.kind for kind in report.weights if kind.worst_error == 0)
    chart = (
        bars([Bar(kind.kind, kind.worst_error, percent(kind.worst_error), "c") for kind in differ]) if differ else ""
    )
    return chart + (f"<p>Equal in both: {escape(equal)}.</p>" if equal else "")


def _furthest(tokens: Sequence[TokenReport]) -> str:
    if not tokens:
        return card("Where they differ most", "Nowhere: both say the same at every position.", "", wide=True)
    rows = [
        f"<tr><td><code>…{_shown(token.before)}</code></td>"
        f"<td class='w'><code>{'(end)' if token.next is None else _shown(token.next)}</code></td>"
        f"<td class='w'><code>{_shown(token.a_token)}</code> {100 * token.a_probability:.0f} %</td>"
        f"<td class='w'><code>{_shown(token.b_token)}</code> {100 * token.b_probability:.0f} %</td>"
        f'<td class="n">{token.kl:.3g}</td></tr>'
        for token in tokens
    ]
    head = (
        "<tr><th>after this text</th><th>comes</th><th class='a'>A expects</th><th class='b'>B expects</th>"
        "<th class='n'>KL</th></tr>"
    )
    reading = "The positions with the largest KL divergence, and what each model takes for the likeliest next token."
    return card("Where they differ most", reading, f"<table>{head}{''.join(rows)}</table>", wide=True)


def _shown(text: str) -> str:
    """A piece of text with its spaces and line breaks to be seen."""
    return escape(text.replace("\n", "⏎").replace(" ", "␣") if not text.strip() else text.replace("\n", "⏎"))


def _tables(report: Report) -> str:
    layers = table(
        ["layer", "attention: error", "worst token", "cosine", "experts: error", "worst token", "cosine",
         "same experts", "same first"],
        [
            [str(layer.layer), percent(layer.attention_error), percent(layer.attention_worst),
             f"{layer.attention_cosine:.6f}", percent(layer.moe_error), percent(layer.moe_worst),
             f"{layer.moe_cosine:.6f}", agreement(layer.same_experts), agreement(layer.same_first)]
            for layer in report.layers
        ],
    )  # fmt: skip
    weights = table(
        ["weights", "tensors", "mean error", "worst error", "worst tensor"],
        [
            [kind.kind, str(kind.tensors), percent(kind.mean_error), percent(kind.worst_error), kind.worst_tensor]
            for kind in report.weights
        ],
    )
    both = f"{layers}<br>{weights}" if report.weights else layers
    details = f"<details><summary>All numbers by layer and kind</summary>{both}</details>"
    return f'<section class="card wide">{details}</section>'


def _footer(report: Report) -> str:
    return (
        f"Made by eightfold compare, version {escape(__version__)}, on device {escape(report.device)}. "
        "KL divergence is Σ p(A) · log(p(A) / p(B)) over the vocabulary; perplexity is exp of the mean −log p of each "
        "next token; an error is |B − A| / |A|."
    )

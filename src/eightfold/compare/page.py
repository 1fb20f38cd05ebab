"""The comparison as one HTML page: pictures and tables, complete in itself, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from eightfold import __version__
from eightfold.compare.charts import Bar, Series, bars, columns, lines
from eightfold.compare.report import Bucket, Report, TokenReport, agreement, change, percent, size, windows

STYLE = """
:root {
  --a: #0072b2; --b: #d55e00; --c: #7a56c2; --d: #00856f;
  --ink: #1c2430; --soft: #5d6877; --line: #e1e5ea; --paper: #f5f6f8; --card: #fff
}
@media (prefers-color-scheme: dark) {
  :root {
    --a: #56a9e0; --b: #ee8440; --c: #a98be6; --d: #3fbfa5;
    --ink: #e7eaee; --soft: #9aa5b3; --line: #343c47; --paper: #14181d; --card: #1d2229
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px }
h1 { font-size: 25px; margin: 0 0 8px }
h2 { font-size: 16px; margin: 0 0 2px }
p { margin: 0 0 10px }
.soft, .card > p { color: var(--soft) }
.a { color: var(--a); font-weight: 600 }
.b { color: var(--b); font-weight: 600 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 18px 0 14px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 14px }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px }
.card { min-width: 0 }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-weight: 650 }
.tile span { color: var(--soft); font-size: 13px }
.wide { grid-column: 1 / -1; overflow-x: auto }
svg { width: 100%; height: auto; display: block }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) }
svg text.soft { fill: var(--soft) }
.legend { font-size: 13px; margin: 4px 0 0 }
.legend span { margin-right: 18px }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px }
table { border-collapse: collapse; font-size: 13.5px; width: 100% }
th { text-align: left; color: var(--soft); font-weight: 500 }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.w { white-space: nowrap }
code { font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--soft) }
footer { color: var(--soft); font-size: 13px; margin-top: 18px }
"""


def page(report: Report) -> str:
    """The whole page."""
    names = f"{_plain(report.a.name)} and {_plain(report.b.name)}"
    cards = [
        _card(
            "How far apart the hidden states are, layer by layer",
            "Length of the difference over the length of A's state, in the mean over tokens. 0 is equal.",
            _errors(report),
        ),
        _card(
            "Do the routers choose the same experts?",
            "Share of tokens in each layer. The axis does not begin at 0.",
            _routers(report),
        ),
        _card(
            "How differently they predict the next token",
            "KL divergence of B's prediction from A's at each position, in nats; further right is worse.",
            _histogram(report.kl_histogram),
        ),
        _card(
            "Does it grow with the text before it?",
            "Mean KL divergence by the place in a window.",
            _by_position(report.kl_by_position),
        ),
        _card("How surprised each is by the text", "Perplexity: lower is better.", _perplexities(report)),
    ]
    if report.weights:
        cards.append(
            _card(
                "How far apart the weights are",
                "Relative error of the worst tensor of each kind, as what its stored numbers stand for.",
                _weights(report),
            )
        )
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(names)} compared</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>\n"
        f"{_head(report)}\n{_tiles(report)}\n"
        f'<div class="cards">{"".join(cards)}{_furthest(report.furthest)}{_tables(report)}</div>\n'
        f"<footer>{_footer(report)}</footer></main></body></html>\n"
    )


def _plain(name: str) -> str:
    """A folder by its last part."""
    return name.rstrip("/").rpartition("/")[2] or name


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
    tiles = [
        (agreement(report.top1_agreement), "of positions have the same likeliest next token"),
        (
            f"{report.kl_mean:.3g}",
            f"nats of KL divergence in the mean; 99 of 100 positions are below {report.kl_99:.3g}",
        ),
        (shift, f"perplexity, from {report.a.perplexity:.4g} (A) to {report.b.perplexity:.4g} (B)"),
        (agreement(report.same_experts), "of router choices are the same experts"),
    ]
    if report.weight_error is not None:
        tiles.append((percent(report.weight_error), "relative error of all weights together"))
    boxes = [f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles]
    return f'<div class="tiles">{"".join(boxes)}</div>'


def _card(title: str, reading: str, content: str, wide: bool = False) -> str:
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{escape(title)}</h2><p>{escape(reading)}</p>{content}</section>\n'


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
    return bars(both) + _table(["and in numbers", ""], rows)


def _weights(report: Report) -> str:
    differ = [kind for kind in report.weights if kind.worst_error > 0]
    equal = ", ".join(kind.kind for kind in report.weights if kind.worst_error == 0)
    chart = (
        bars([Bar(kind.kind, kind.worst_error, percent(kind.worst_error), "c") for kind in differ]) if differ else ""
    )
    return chart + (f"<p>Equal in both: {escape(equal)}.</p>" if equal else "")


def _furthest(tokens: Sequence[TokenReport]) -> str:
    if not tokens:
        return _card("Where they differ most", "Nowhere: both say the same at every position.", "", wide=True)
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
    return _card("Where they differ most", reading, f"<table>{head}{''.join(rows)}</table>", wide=True)


def _shown(text: str) -> str:
    """A piece of text with its spaces and line breaks to be seen."""
    return escape(text.replace("\n", "⏎").replace(" ", "␣") if not text.strip() else text.replace("\n", "⏎"))


def _tables(report: Report) -> str:
    layers = _table(
        ["layer", "attention: error", "worst token", "cosine", "experts: error", "worst token", "cosine",
         "same experts", "same first"],
        [
            [str(layer.layer), percent(layer.attention_error), percent(layer.attention_worst),
             f"{layer.attention_cosine:.6f}", percent(layer.moe_error), percent(layer.moe_worst),
             f"{layer.moe_cosine:.6f}", agreement(layer.same_experts), agreement(layer.same_first)]
            for layer in report.layers
        ],
    )  # fmt: skip
    weights = _table(
        ["weights", "tensors", "mean error", "worst error", "worst tensor"],
        [
            [kind.kind, str(kind.tensors), percent(kind.mean_error), percent(kind.worst_error), kind.worst_tensor]
            for kind in report.weights
        ],
    )
    both = f"{layers}<br>{weights}" if report.weights else layers
    details = f"<details><summary>All numbers by layer and kind</summary>{both}</details>"
    return f'<section class="card wide">{details}</section>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        first, *others = (escape(cell) for cell in cells)
        return f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="n">{cell}</{tag}>' for cell in others) + "</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _footer(report: Report) -> str:
    return (
        f"Made by eightfold compare, version {escape(__version__)}, on device {escape(report.device)}. "
        "KL divergence is Σ p(A) · log(p(A) / p(B)) over the vocabulary; perplexity is exp of the mean −log p of each "
        "next token; an error is |B − A| / |A|."
    )

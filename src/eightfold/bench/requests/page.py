"""The results as one HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from eightfold.bench.accounting import Peaks
from eightfold.bench.probes import median
from eightfold.bench.report import Spread
from eightfold.bench.requests.results import COLUMNS, notes
from eightfold.html import card, document, last_part, tiles
from eightfold.html.charts import Bar, Curve, Series, bars, lines
from eightfold.html.plots import COLOURS, Range, Roof, Spot, Stack, curves, heat_map, ranges, roofline, stacks

Report = Mapping[str, Any]


def page(report: Report) -> str:
    """The whole page."""
    cards = [
        *(_search_card(one) for one in report["searches"]),
        card(
            "How many tokens a second?",
            "Tokens of all answers together, prompts included in the time. More requests at once share each reading of "
            "the weights.",
            _throughput(report["results"]),
        ),
        card(
            "How long until the first token?",
            "From a request's arrival. Thick: half of the requests; thin: 90, then 99 of 100.",
            _first_token(report["results"]),
        ),
        _gaps_card(report["results"]),
        card(
            "Where does the time go?",
            "Steps of the engine that compute prompts (requests that are being answered get a token there too), steps "
            "that only decode, and what this program does in between.",
            _phases(report["results"]),
        ),
        card(
            "How close to what this machine can do?",
            "Each test's prompts and decoding against the limits probed in the same run. On the slope reading weights "
            "is the limit, under the flat part computing is; the closer to the line, the less is left to gain. Above "
            "it, the machine was faster than when it was probed.",
            _roofline(report),
        ),
        card(
            "Which experts did the work?",
            f"Share of a layer's choices that fell on each expert, all tests together. If all were chosen alike, each "
            f"would have {100 / report['model']['experts']:.3g} %.",
            _experts(report["expert_counts"]),
        ),
    ]
    name = last_part(report["model"]["name"])
    body = (
        f"{_head(report, name)}\n{_tiles(report['results'])}\n"
        f'<div class="cards">{"".join(cards)}{_answers(report["answers"])}{_table(report["results"])}</div>\n'
        f"<footer>{_footer(report)}</footer>"
    )
    return document(f"{name}: requests measured", body)


def _head(report: Report, name: str) -> str:
    model, machine, backend = report["model"], report["machine"], report["backend"]
    threads = f"{_count(backend['threads'], 'thread')}, " if backend["threads"] else ""
    lines_ = "".join(f'<p class="soft">Note: {escape(note)}.</p>' for note in notes(report))
    return (
        f"<h1>How fast does {escape(name)} answer?</h1>"
        f"<p><code>{escape(model['name'])}</code>, {model['layers']} layers, {model['experts']} experts of which "
        f"{model['experts_per_token']} work on a token, {escape(model['scheme'])} weights, computed in "
        f"{escape(model['dtype'])}.</p>"
        f'<p class="soft">{escape(machine["processor"])}, {_count(machine["cores"], "core")}; {threads}'
        f"{escape(str(backend['isa'] or backend['name']))}; {escape(report['time'])}. Figures are medians of "
        f"{_samples(report)}; {escape(_example(report['results'][-1]))}.</p>{lines_}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _samples(report: Report) -> str:
    count = max(len(one["samples"]) for one in report["results"])
    turns = "" if report["searches"] else ", taken in turns"
    return "one sample" if count == 1 else f"{count} samples each{turns}"


def _example(one: Report) -> str:
    """What the name of a test means."""
    said = f"“{one['test']}” is {_count(one['batch'], 'request')} at once"
    if one["kind"] == "dataset":
        return f"{said}, of {one['requests']} out of the data set"
    ins, outs = (f"{one[key].median:g}" for key in ("input_tokens", "output_tokens"))
    return f"{said}, with a prompt of {ins} tokens and an answer of {outs}"


def _middle(one: Report, key: str) -> float | None:
    return one["spreads"][key].median if key in one["spreads"] else None


def _tiles(results: Sequence[Report]) -> str:
    def best(key: str, least: bool = False) -> tuple[float, str] | None:
        known = [(value, str(one["test"])) for one in results if (value := _middle(one, key)) is not None]
        return (min(known) if least else max(known)) if known else None

    shown = []
    for key, text, what, least, scale in (
        ("output_tokens_per_second", "{:,.0f}", "tokens of answers a second, at best", False, 1.0),
        ("ttft_ms_p50", "{:.3g} ms", "to the first token, at best", True, 1.0),
        ("itl_ms_p50", "{:.3g} ms", "between tokens, at best", True, 1.0),
        ("prefill_share_of_limit", "{:.0f} %", "of the machine's limit, computing prompts", False, 100.0),
        ("decode_share_of_limit", "{:.0f} %", "of the machine's limit, decoding", False, 100.0),
        ("anonymous_bytes", "{:,.0f} MB", "of memory beside the mapped weights, at most", False, 1e-6),
    ):
        found = best(key, least)
        if found is not None:
            shown.append((text.format(found[0] * scale).replace(",", " "), f"{what} ({found[1]})"))
    return tiles(shown)


def _throughput(results: Sequence[Report]) -> str:
    """Lines over the batch where one of the groups has several; else bars."""
    batches = sorted({one["batch"] for one in results})
    groups: dict[str, dict[int, float]] = {}
    for one in results:
        group = one["test"].rpartition(" batch ")[0]
        groups.setdefault(group, {})[one["batch"]] = one["spreads"]["output_tokens_per_second"].median
    if len(batches) == 1:
        return bars(
            [Bar(name, values[batches[0]], f"{values[batches[0]]:.4g}", "c") for name, values in groups.items()]
        )
    series = [
        Series(name, COLOURS[number % len(COLOURS)], [values.get(batch) for batch in batches])
        for number, (name, values) in enumerate(groups.items())
    ]
    return lines(series, [str(batch) for batch in batches], "requests at once", lambda value: f"{value:g}")


def _first_token(results: Sequence[Report]) -> str:
    items = [Range(one["test"], tuple(one["spreads"][f"ttft_ms_p{p}"].median for p in (50, 90, 99))) for one in results]
    return ranges(items, ("median", "90 %", "99 %"), "milliseconds", lambda value: f"{value:.4g}")


def _gaps_card(results: Sequence[Report]) -> str:
    shown = [one for one in results if one["inter_token_seconds"]]
    if not shown:
        return card("How long between tokens?", "No answer had more than one token.", "")
    chosen = shown[: len(COLOURS)]
    reading = (
        "Share of tokens that came within that time of the one before. The further left and the steeper, the better; a "
        "long way to the right at the top are pauses."
    )
    if len(shown) > len(chosen):
        reading += f" The first {len(chosen)} of {len(shown)} tests."
    items = [
        Curve(
            one["test"],
            COLOURS[number],
            [(max(1e3 * value, 1e-6), place / 100) for place, value in enumerate(one["inter_token_seconds"])],
        )
        for number, one in enumerate(chosen)
    ]
    picture = curves(items, "milliseconds (logarithmic)", lambda ms: f"{ms:g}", lambda share: f"{100 * share:g} %")
    return card("How long between tokens?", reading, picture)


def _roofline(report: Report) -> str:
    readings = [
        Peaks(
            {key.removesuffix("_gops"): value * 1e9 for key, value in one.items() if key.endswith("_gops")},
            one["read_gbs"] * 1e9,
        )
        for one in report["probes"]
    ]
    peaks = median(readings)
    spots = [
        Spot(
            f"{name} ({report['model']['products']} products)",
            part["operations"] / part["bytes"],
            part["operations"] / part["seconds"],
            f"{one['test']}, {name}: {part['operations'] / part['seconds'] / 1e9:.4g} GOP/s, "
            f"{part['bytes'] / part['seconds'] / 1e9:.3g} GB/s",
        )
        for one in report["results"]
        for name, part in one["first_sample"].items()
        if part is not None
    ]
    product = report["model"]["products"]
    peak = peaks.operations[product]
    roofs = [Roof(f"computing: {peak / 1e9:.0f} GOP/s of {product} products", peak)]
    return roofline(
        spots, roofs, peaks.read, f"reading: {peaks.read / 1e9:.3g} GB/s", lambda speed: f"{speed / 1e9:g} G"
    )


def _phases(results: Sequence[Report]) -> str:
    """Shares of the time of a run (all samples together) in steps with prompts, in steps without, and between steps."""
    items = []
    for one in results:
        steps = [step for sample in one["samples"] for step in sample["steps"]]
        total = sum(sample["seconds"] for sample in one["samples"])
        prompts = sum(seconds for _, seconds, tokens, _ in steps if tokens) / total
        decoding = sum(seconds for _, seconds, tokens, _ in steps if not tokens) / total
        parts = (prompts, decoding, max(0.0, 1 - prompts - decoding))
        said = "prompts {:.1f} %, decoding {:.1f} %, the rest {:.1f} %"
        items.append(Stack(one["test"], parts, said.format(*(100 * part for part in parts))))
    return stacks(items, ("computing prompts", "decoding only", "between steps"))


def _experts(counts: Sequence[Sequence[int]]) -> str:
    shares = [[count / sum(layer) for count in layer] for layer in counts]
    return heat_map(shares, "layer", "expert", lambda share: f"{100 * share:.1f} %")


def _search_card(search: Report) -> str:
    ins, outs = search["case"]
    tried = sorted(search["tried"], key=lambda one: int(one["batch"]))
    series = [
        Series("milliseconds a token", "c", [one["decode_ms"] for one in tried]),
        Series("the limit", "b", [search["limit_ms"]] * len(tried)),
    ]
    picture = lines(series, [str(one["batch"]) for one in tried], "requests at once", lambda ms: f"{ms:.4g}")
    return card(
        f"Up to {search['batch']} requests at once stay within {search['limit_ms']:g} ms a token",
        f"Prompts of {ins} tokens, answers of {outs}; the batches that were tried.",
        picture,
    )


def _answers(found: Sequence[Report]) -> str:
    if not found:
        return ""
    rows = [
        f"<tr><td class='w'>{escape(one['test'])}</td><td>{escape(one['text'])}</td>"
        f"<td class='n'>{one['tokens']}</td></tr>"
        for one in found
    ]
    head = "<tr><th>test</th><th>answer</th><th class='n'>tokens</th></tr>"
    return card("What it said", "In the first sample.", f"<table>{head}{''.join(rows)}</table>", wide=True)


def _table(results: Sequence[Report]) -> str:
    """Every column of the CSV as a row, so that it stays readable with many tests."""
    names = "".join(f'<th class="n">{escape(one["test"])}</th>' for one in results)
    rows = [
        f'<tr><td class="w">{escape(column.title)}</td>'
        + "".join(_cell(one["spreads"].get(column.key), column.scale) for one in results)
        + "</tr>"
        for column in COLUMNS
    ]
    content = f"<table><tr><th></th>{names}</tr>{''.join(rows)}</table>"
    return card("All numbers", "Medians, and under them the lowest and highest sample.", content, wide=True)


def _cell(spread: Spread | None, scale: float) -> str:
    """ "12.3 (11.9–12.8)" as two lines."""
    if spread is None:
        return '<td class="n">–</td>'
    middle, _, rest = spread.rounded(scale).partition(" ")
    spread_out = f"<small>{rest.strip('()')}</small>" if rest else ""
    return f'<td class="n">{middle}{spread_out}</td>'


def _footer(report: Report) -> str:
    command = " ".join(map(str, report["command"]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"Made by <code>{escape(command)}</code> with {escape(versions)}. Time per output token (tpot) is that of a "
        "request after its first token, over its further tokens; inter-token latency (itl) each of its steps; decode "
        "throughput counts the steps in which nothing but decoding ran."
    )

"""`eightfold compare`: how similar two models are, as tables, as JSON, and as a page to look at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

from eightfold.bench.report import check_outputs, table, write_json
from eightfold.commands import console
from eightfold.compare import CompareOptions, Report, compare, short_lines
from eightfold.compare.page import page
from eightfold.compare.report import agreement, percent, size
from eightfold.data_files import write_text


def main(args: argparse.Namespace) -> int:
    check_outputs(args.json, args.html)
    options = CompareOptions(**{field.name: getattr(args, field.name) for field in fields(CompareOptions)})
    with bars() as progress:
        report = compare(options, progress)
    if args.json:
        write_json(args.json, report.as_json())
    if args.html:
        write_text(Path(args.html), page(report))
    print(render(report))
    return 0


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is done, by its name; as `compare` and `summary` want it."""
    with ExitStack() as open_bars:
        updates: dict[str, Callable[[int, int], None]] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in updates:
                open_bars.close()  # the one before has come to its end
                updates[what] = open_bars.enter_context(console.progress(what, "part"))
            updates[what](done, total)

        yield progress


def render(report: Report) -> str:
    """All that is printed."""
    header = [
        "layer",
        "attention: error",
        "cosine",
        "experts: error",
        "cosine",
        "router: same experts",
        "same first",
    ]
    rows = [
        [
            str(layer.layer),
            percent(layer.attention_error),
            f"{layer.attention_cosine:.6f}",
            percent(layer.moe_error),
            f"{layer.moe_cosine:.6f}",
            agreement(layer.same_experts),
            agreement(layer.same_first),
        ]
        for layer in report.layers
    ]
    parts = [
        "\n".join(
            f"{letter}: {one.name} ({one.scheme}, {size(one.weight_bytes)}, keys and values {one.kv_cache_dtype})"
            for letter, one in (("A", report.a), ("B", report.b))
        ),
        "Hidden states after each layer's attention and experts, mean over tokens, B against A\n" + table(header, rows),
    ]
    if report.weights:
        header = ["weights", "tensors", "error: mean", "worst", "of"]
        rows = [
            [kind.kind, str(kind.tensors), percent(kind.mean_error), percent(kind.worst_error), kind.worst_tensor]
            for kind in report.weights
            if kind.worst_error > 0
        ]
        equal = [kind.kind for kind in report.weights if kind.worst_error == 0]
        parts += [table(header, rows)] if rows else []
        parts += [f"equal in both: {', '.join(equal)}"] if equal else []
    return "\n\n".join([*parts, "\n".join([*short_lines(report), *(f"note: {note}" for note in report.notes)])])

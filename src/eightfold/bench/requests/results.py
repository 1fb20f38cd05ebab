"""What was measured, as JSON, CSV and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eightfold.bench.probes import Prober
from eightfold.bench.report import Spread, probe_line, table
from eightfold.bench.requests.plan import Test
from eightfold.bench.requests.timing import Run
from eightfold.data_files import csv_text, write_text

if TYPE_CHECKING:
    from eightfold.bench.requests.run import Taken

PERCENTILES = (50, 90, 99)


class Column(NamedTuple):
    """A column of the CSV: its name there and on the page, the key of a sample, and the factor between the two."""

    name: str
    title: str
    key: str
    scale: float = 1.0


_WAITS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "whole request",
}
COLUMNS = (
    Column("total_time_s", "whole run, s", "seconds"),
    Column("output_throughput_tokens_per_s", "output tokens/s", "output_tokens_per_second"),
    Column("total_throughput_tokens_per_s", "prompt and output tokens/s", "total_tokens_per_second"),
    Column("prefill_throughput_tokens_per_s", "prefill tokens/s", "prefill_tokens_per_second"),
    Column("decode_throughput_tokens_per_s", "decode tokens/s", "decode_tokens_per_second"),
    Column("decode_step_ms", "step that only decodes, ms", "decode_step_ms"),
    *(
        Column(f"{name}_p{p}_ms", f"{title} p{p}, ms", f"{name}_ms_p{p}")
        for name, title in _WAITS.items()
        for p in PERCENTILES
    ),
    Column("prefill_share_of_peak_percent", "prefill, % of computing peak", "prefill_share_of_peak", 100),
    Column("prefill_share_of_limit_percent", "prefill, % of the limit", "prefill_share_of_limit", 100),
    Column("decode_share_of_bandwidth_percent", "decode, % of read rate", "decode_share_of_bandwidth", 100),
    Column("decode_share_of_limit_percent", "decode, % of the limit", "decode_share_of_limit", 100),
    Column("kv_cache_mb", "keys and values, MB", "kv_bytes", 1e-6),
    Column("anonymous_memory_mb", "anonymous memory, MB", "anonymous_bytes", 1e-6),
)


def result(test: Test, runs: Sequence[Run], readings: Sequence[int], prober: Prober) -> dict[str, Any]:
    """A test with all its samples; `readings` are the numbers of the probes before them."""
    samples = [_sample(run, reading, prober) for run, reading in zip(runs, readings, strict=True)]
    works = {
        name: None if work is None else {"operations": work.operations, "bytes": work.bytes, "seconds": sum(times)}
        for name, work, times in (
            ("prefill", runs[0].prefill_work, runs[0].prefill_times),
            ("decode", runs[0].decode_work, runs[0].decode_times),
        )
    }
    return {
        "test": test.name,
        "kind": test.kind,
        "batch": test.batch,
        "requests": len(runs[0].requests),
        "input_tokens": Spread.of([one.input_tokens for one in runs[0].requests]),
        "output_tokens": Spread.of([one.output_tokens for one in runs[0].requests]),
        "first_sample": works,
        "samples": samples,
        "spreads": {
            column.key: Spread.of([sample[column.key] for sample in samples])
            for column in COLUMNS
            if all(sample[column.key] is not None for sample in samples)
        },
        "inter_token_seconds": _quantiles([gap for run in runs for gap in run.gaps]),
    }


def _sample(run: Run, reading: int, prober: Prober) -> dict[str, Any]:
    """Times in seconds but for those named ms; shares are of the mean of the probes before and after."""
    decode = run.decode_seconds_per_token
    tpot = [time for one in run.requests if (time := one.seconds_per_token) is not None]
    times = {
        "ttft": [one.first_token_seconds for one in run.requests],
        "tpot": tpot,
        "itl": run.gaps,
        "e2e": [one.seconds for one in run.requests],
    }
    return {
        "seconds": run.seconds,
        "output_tokens_per_second": run.output_per_second,
        "total_tokens_per_second": run.total_per_second,
        "prefill_tokens_per_second": run.prefill_per_second,
        "decode_tokens_per_second": run.decode_per_second,
        "decode_step_ms": None if decode is None else 1e3 * decode,
        **{key: value for name, each in times.items() for key, value in _percentiles(name, each).items()},
        **_shares(run, reading, prober),
        "experts_hit": run.experts_hit,
        "kv_bytes": run.kv_bytes,
        "anonymous_bytes": run.anonymous_bytes,
        "major_faults": run.major_faults,
        "preemptions": run.preemptions,
        "requests": [
            {
                "input_tokens": one.input_tokens,
                "output_tokens": one.output_tokens,
                "arrival": one.arrival,
                "first_token": one.first_token_seconds,
                "seconds": one.seconds,
                "finish_reason": one.finish_reason,
            }
            for one in run.requests
        ],
        # Each step as [start, seconds, prompt tokens, sequences that decoded].
        "steps": [[step.start, step.seconds, step.prompt_tokens, step.decoded] for step in run.steps],
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds; None of nothing."""
    values = np.percentile(seconds, PERCENTILES).tolist() if seconds else [None] * len(PERCENTILES)
    return {f"{name}_ms_p{p}": None if v is None else 1e3 * v for p, v in zip(PERCENTILES, values, strict=True)}


def _quantiles(seconds: Sequence[float]) -> list[float]:
    """From the shortest to the longest in hundredths; nothing of nothing."""
    return [float(value) for value in np.percentile(seconds, range(101))] if seconds else []


def _shares(run: Run, reading: int, prober: Prober) -> dict[str, Any]:
    peaks = prober.around(reading)
    shares: dict[str, Any] = {}
    for name, work, times in (
        ("prefill", run.prefill_work, run.prefill_times),
        ("decode", run.decode_work, run.decode_times),
    ):
        least: Sequence[float | None] = (None, None, None)
        if work is not None:
            least = (work.layers.compute_seconds(peaks), work.bytes / peaks.read, work.limit_seconds(peaks))
        for what, seconds in zip(("peak", "bandwidth", "limit"), least, strict=True):
            shares[f"{name}_share_of_{what}"] = None if seconds is None else seconds / sum(times)
    return {**shares, "probe_before": reading, "probe_moved": prober.moved(reading)}


def answers(taken: Mapping[Test, Sequence[Taken]]) -> list[dict[str, Any]]:
    """What the model said to single prompts, in the first sample."""
    return [
        {"test": test.name, "tokens": one.output_tokens, "finish_reason": one.finish_reason, "text": one.text}
        for test, samples in taken.items()
        if test.kind == "prompt"
        for one in samples[0].run.requests[:1]
    ]


def write_csv(path: str, report: Mapping[str, Any]) -> None:
    """A row for each test: medians of its samples. Raises EightfoldError if the file can't be written."""
    model = report["model"]
    first = ["model", "scheme", "dtype", "test", "batch_size", "requests", "input_tokens", "output_tokens", "samples"]
    rows = []
    for one in report["results"]:
        lengths = (_plain(one["input_tokens"].median), _plain(one["output_tokens"].median))
        about = [model["name"], model["scheme"], model["dtype"], one["test"], one["batch"], one["requests"]]
        spreads = one["spreads"]
        values = [_plain(spreads[c.key].median * c.scale) if c.key in spreads else "" for c in COLUMNS]
        rows.append([*about, *lengths, len(one["samples"]), *values])
    write_text(Path(path), csv_text([*first, *(column.name for column in COLUMNS)], rows))


def _plain(value: float) -> str:
    return f"{value:.6g}"


def show(report: Mapping[str, Any]) -> str:
    """Tables and notes, as they are printed."""
    model, results = report["model"], report["results"]
    rates = ("output_tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second")
    shares = ("prefill_share_of_peak", "decode_share_of_bandwidth")
    waits = [f"{name}_ms_p{p}" for name, ps in (("ttft", (50, 99)), ("tpot", (50,)), ("itl", PERCENTILES)) for p in ps]
    parts = [
        f"{model['name']}: {model['layers']} layers, {model['scheme']}, {model['dtype']}",
        "Tokens a second\n"
        + table(
            ["test", "output", "prefill", "decode", "prefill of peak", "decode of bandwidth"],
            [
                [
                    one["test"],
                    *(_cell(one, key) for key in rates),
                    *(_percent(one, key) for key in shares),
                ]
                for one in results
            ],
        ),
        "Waiting, in ms: to the first token, per output token, between tokens\n"
        + table(
            ["test", "first p50", "p99", "per token p50", "between p50", "p90", "p99"],
            [[one["test"], *(_cell(one, key) for key in waits)] for one in results],
        ),
        "Memory and time\n"
        + table(
            ["test", "whole run, s", "keys and values, MB", "anonymous memory, MB", "experts hit"],
            [
                [
                    one["test"],
                    _cell(one, "seconds"),
                    _cell(one, "kv_bytes", 1e-6),
                    _cell(one, "anonymous_bytes", 1e-6),
                    Spread.of([sample["experts_hit"] for sample in one["samples"]]).text(),
                ]
                for one in results
            ],
        ),
    ]
    parts += ["\n".join(_search_lines(one)) for one in report["searches"]]
    for one in report["answers"]:
        parts.append(f"{one['test']} ({one['tokens']} tokens, {one['finish_reason']}): {one['text']}")
    return "\n\n".join([*parts, "\n".join(_last_lines(report))])


def _cell(one: Mapping[str, Any], key: str, scale: float = 1.0) -> str:
    return one["spreads"][key].rounded(scale) if key in one["spreads"] else "–"


def _percent(one: Mapping[str, Any], key: str) -> str:
    return one["spreads"][key].percent() if key in one["spreads"] else "–"


def _search_lines(search: Mapping[str, Any]) -> list[str]:
    ins, outs = search["case"]
    tried = ", ".join(f"{one['batch']}: {one['decode_ms']:.3g}" for one in search["tried"])
    return [
        f"in {ins} out {outs}: batch {search['batch']} is the largest within {search['limit_ms']:g} ms a token",
        f"  tried, batch: ms a token: {tried}",
    ]


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the results must know."""
    found = [str(note) for note in report["notes"]]
    for one in report["results"]:
        lost = sum(sample["preemptions"] for sample in one["samples"])
        if lost:
            found.append(
                f"{one['test']}: keys and values did not fit; {lost} times a sequence lost its pages and was computed "
                "again. Raise --kv-cache-memory-bytes"
            )
    return found


def _last_lines(report: Mapping[str, Any]) -> list[str]:
    samples = [sample for one in report["results"] for sample in one["samples"]]
    moved = sum(sample["probe_moved"] for sample in samples)
    return [
        probe_line(report["probes"]),
        f"{moved} of {len(samples)} samples lie between probes that differ by more than 15 %; median (lowest–highest)",
        *(f"note: {note}" for note in notes(report)),
    ]

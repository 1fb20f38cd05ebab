"""`eightfold bench offline`: the engine from end to end, prefill and decode, against the machine's limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from eightfold.bench.accounting import Peaks, full_layer_operations
from eightfold.bench.first_token import first_token
from eightfold.bench.folders import model_folder, random_config
from eightfold.bench.measure import Sample, Session
from eightfold.bench.picture import Point, draw
from eightfold.bench.plan import STARTUP_PROMPT, WARM_UP, OfflineOptions, Test, check, engine_fields, planned
from eightfold.bench.probes import Prober, as_json, facts, median, memory
from eightfold.bench.report import Spread, probe_line, table, write_json
from eightfold.config import ModelConfig, load_model_config

_SPREADS = ("tokens_per_second", "seconds", "share_of_peak", "share_of_bandwidth", "share_of_limit")


class Taken(NamedTuple):
    """A sample, and the number of the probe before it."""

    sample: Sample
    reading: int


def run_offline(options: OfflineOptions) -> dict[str, Any]:
    """Measure, print the table, write JSON and picture → the JSON's content. Raises EightfoldError on bad options."""
    check(options)
    tests = planned(options)
    if options.model is None:  # a mistake is to be found before gigabytes are written
        engine_fields(options, "", random_config(options), tests)
    with model_folder(options) as folder:
        model = load_model_config(folder)
        startup = _startup(options, str(folder), model) if options.startup else []
        about: dict[str, Any] = {}
        results: list[dict[str, Any]] = []
        readings: list[Peaks] = []
        for chunk in dict.fromkeys(test.chunk for test in tests):
            chosen = [test for test in tests if test.chunk == chunk]
            about = _session(engine_fields(options, str(folder), model, chosen), chosen, options, results, readings)
    report = {
        "kind": "offline",
        **about,
        "model": _described(options, model),
        "probes": as_json(readings),
        "startup": startup,
        "memory_at_end": memory(),
        "results": results,
    }
    _show(report)
    if options.json:
        write_json(options.json, report)
    if options.png:
        title = "The engine against the machine's limits: " + report["model"]["name"]
        draw(options.png, title, [_point(result) for result in results], median(readings), ("prefill", "decode"))
    return report


def _startup(options: OfflineOptions, folder: str, model: ModelConfig) -> list[dict[str, Any]]:
    """Processes started one after the other: time to first token, and memory."""
    prompt = min(STARTUP_PROMPT, model.max_position_embeddings - options.output_len - 1)
    fields = engine_fields(options, folder, model, [Test("prefill", tokens=prompt + options.output_len)])
    rounds = _progress(range(options.repeat), "Starts")
    return [first_token(fields, prompt, options.output_len) for _ in rounds]


def _session(
    fields: dict[str, Any],
    tests: Sequence[Test],
    options: OfflineOptions,
    results: list[dict[str, Any]],
    readings: list[Peaks],
) -> dict[str, Any]:
    """An engine of its own for these tests, gone afterwards: it may fill the memory. Every test once a round, a probe
    before and after each sample. Appends results and probes → facts about the backend."""
    session = Session.open(fields)
    prober = Prober(session.ops)
    taken: dict[Test, list[Taken]] = {test: [] for test in tests}
    session.generate(session.random_prompt(WARM_UP[0]), WARM_UP[1])
    for test in tests:
        if test.kind == "decode":  # untimed: fills the prefix cache, and each batch's memory
            session.decode(test.batch, test.depth, 1, options.distinct_prompts)
    prober.take()
    for _ in _progress(range(options.repeat), "Rounds"):
        for test in tests:
            reading = len(prober.readings) - 1
            taken[test].append(Taken(_sample(session, test, options), reading))
            prober.take()
    results += [_result(test, samples, session, prober, options) for test, samples in taken.items()]
    readings += prober.readings
    return facts(session.ops)


def _sample(session: Session, test: Test, options: OfflineOptions) -> Sample:
    if test.kind == "prefill":
        return session.prefill(test.tokens)
    return session.decode(test.batch, test.depth, options.output_len, options.distinct_prompts)


def _result(
    test: Test, taken: Sequence[Taken], session: Session, prober: Prober, options: OfflineOptions
) -> dict[str, Any]:
    first = taken[0].sample
    samples = [_sample_json(one, prober) for one in taken]
    return {
        "test": test.name,
        "kind": test.kind,
        "tokens": test.tokens,
        "chunk": test.chunk,
        "batch": test.batch,
        "depth": test.depth,
        "kv_shared": test.batch > 1 and test.depth > 0 and not options.distinct_prompts,
        "products": session.formats().matrices.products,
        "layer_operations": first.work.layers.total_operations,
        # Prefill leaves most of the last layer out; by this number times per layer compare with other engines'.
        "whole_layers": first.work.layers.total_operations / full_layer_operations(session.model, first.tokens),
        "operations": first.work.operations,
        "bytes": first.work.bytes,
        "samples": samples,
        **{f"{key}_spread": Spread.of([sample[key] for sample in samples]) for key in _SPREADS},
    }


def _sample_json(taken: Taken, prober: Prober) -> dict[str, Any]:
    """Shares are of the mean of the probes before and after."""
    sample, peaks = taken.sample, prober.around(taken.reading)
    return {
        "tokens_per_second": sample.tokens / sample.seconds,
        "seconds": sample.seconds,
        "major_faults": sample.faults,
        "experts_hit": sample.experts_hit,
        "share_of_peak": sample.work.layers.compute_seconds(peaks) / sample.seconds,
        "share_of_bandwidth": sample.work.bytes / peaks.read / sample.seconds,
        "share_of_limit": sample.work.limit_seconds(peaks) / sample.seconds,
        "probe_before": taken.reading,
        "probe_moved": prober.moved(taken.reading),
    }


def _described(options: OfflineOptions, model: ModelConfig) -> dict[str, Any]:
    name = options.model or (options.shape if isinstance(options.shape, str) else "random weights")
    return {
        "name": f"{name}, {model.num_layers} layers, {model.scheme}, {model.torch_dtype}",
        "layers": model.num_layers,
        "scheme": model.scheme,
        "dtype": model.torch_dtype,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "experts": model.num_experts,
        "load_mode": options.load_mode,
    }


def _show(report: dict[str, Any]) -> None:
    print(report["model"]["name"])
    header = ["test", "tokens/s", "of peak", "of bandwidth", "of the limit", "experts hit", "major faults"]
    rows = []
    for result in report["results"]:
        shares = [result[f"share_of_{name}_spread"].percent() for name in ("peak", "bandwidth", "limit")]
        hit = Spread.of([sample["experts_hit"] for sample in result["samples"]]).text()
        faults = Spread.of([sample["major_faults"] for sample in result["samples"]]).text(0)
        rows.append([result["test"], result["tokens_per_second_spread"].text(), *shares, hit, faults])
    print(table(header, rows))
    print(probe_line(report["probes"]))
    samples = [sample for result in report["results"] for sample in result["samples"]]
    moved = sum(sample["probe_moved"] for sample in samples)
    print(f"{moved} of {len(samples)} samples lie between probes that differ by more than 15 %")
    if report["startup"]:
        _show_startup(report["startup"])


def _show_startup(startup: Sequence[dict[str, Any]]) -> None:
    def spread(key: str, digits: int, scale: float = 1.0) -> str:
        return Spread.of([one[key] for one in startup]).text(digits, scale)

    print(
        f"process start to first token: {spread('seconds', 2)} s ({spread('major_faults', 0)} major faults in all)\n"
        f"memory of that process: {spread('anonymous_beyond_kv_bytes', 0, 1e-6)} MB anonymous beyond KV pages "
        f"({spread('anonymous_before_loading_bytes', 0, 1e-6)} MB of them Python and torch before loading), "
        f"{spread('peak_bytes', 2, 1e-9)} GB at its peak with the mapped files"
    )


def _point(result: dict[str, Any]) -> Point:
    if result["kind"] == "decode":
        group, at = f"decode depth {result['depth']}", f"batch {result['batch']}"
    else:
        group = f"prefill in {result['chunk']}s" if result["chunk"] else "prefill"
        at = f"{result['tokens']} tokens"
    seconds, share = result["seconds_spread"].median, result["share_of_limit_spread"].median
    return Point(group, at, result["products"], result["operations"], result["bytes"], seconds, share)


def _progress(over: range, title: str) -> Any:
    return tqdm(over, desc=title, disable=not sys.stderr.isatty(), leave=False)

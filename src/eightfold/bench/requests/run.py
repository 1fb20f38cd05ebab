"""`eightfold bench requests`: every test once a round, probes in between; or a search for the largest batch."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from eightfold.bench.probes import Prober, as_json, facts, memory
from eightfold.bench.report import write_json
from eightfold.bench.requests.lengths import Case
from eightfold.bench.requests.page import page
from eightfold.bench.requests.plan import Plan, RequestOptions, Test, check, make_plan
from eightfold.bench.requests.results import answers, result, show, write_csv
from eightfold.bench.requests.timing import Ask, Bench, Run
from eightfold.data_files import write_text
from eightfold.llm import LLM
from eightfold.types import EightfoldError

WARM_UP = (64, 4)  # at most: tokens of a prompt that reaches all experts, and of its answer


class Taken(NamedTuple):
    """A run, and the number of the probe before it."""

    run: Run
    reading: int


@dataclass(frozen=True, slots=True)
class Search:
    """The largest batch whose decode latency stays within a limit; latencies in seconds a token, medians."""

    limit: float
    batch: int
    tried: dict[int, float]  # batch → latency, in the order in which they were tried


def run_requests(options: RequestOptions) -> dict[str, Any]:
    """Measure, print the tables, write JSON, CSV and page → the JSON's content.

    Raises EightfoldError on bad options, before anything is measured, and where even the smallest batch misses the
    latency limit.
    """
    check(options)
    plan = make_plan(options)
    bench = Bench(LLM(**plan.engine), plan.engine["model"], plan.engine["block_size"], options.seed)
    prober = bench.prober()
    if bench.llm.nodes > 1:
        plan.notes.append("shares of limits are not given: the limits of the other machines are not probed")
    taken = _searches(bench, prober, plan, options) if plan.searches else (_rounds(bench, prober, plan, options), [])
    report = _report(bench, prober, plan, options, *taken)
    print(show(report))
    if options.json:
        write_json(options.json, report)
    if options.csv:
        write_csv(options.csv, report)
    if options.html:
        write_text(Path(options.html), page(report))
    return report


def largest_batch(latency: Callable[[int], float], low: int, high: int, limit: float) -> Search:
    """The largest batch from `low` to `high` whose `latency` (seconds) is within `limit`, by halving the range.

    Latency is taken to grow with the batch. Raises EightfoldError, with what was measured, if `low` misses already.
    """
    tried = {low: latency(low)}
    if tried[low] > limit:
        raise EightfoldError(
            f"even batch {low} takes {1e3 * tried[low]:.3g} ms a token, above the latency limit of {1e3 * limit:g} ms: "
            "raise --latency-limit, or lower the smallest batch of --max-batch"
        )
    good, bad = low, high + 1
    probe = high  # first, as it ends the search if it is within
    while bad - good > 1:
        tried[probe] = latency(probe)
        good, bad = (probe, bad) if tried[probe] <= limit else (good, probe)
        probe = (good + bad) // 2
    return Search(limit, good, tried)


def _rounds(bench: Bench, prober: Prober, plan: Plan, options: RequestOptions) -> dict[Test, list[Taken]]:
    """Every test once a round, a probe before and after each sample: what is slow for a while is slow for all."""
    for test in plan.tests:
        _warm_up(bench, test)
    taken: dict[Test, list[Taken]] = {test: [] for test in plan.tests}
    prober.take()
    for _ in tqdm(range(options.repeat), desc="Rounds", disable=not sys.stderr.isatty(), leave=False):
        for test in plan.tests:
            taken[test].append(_sample(bench, prober, test))
    return taken


def _searches(
    bench: Bench, prober: Prober, plan: Plan, options: RequestOptions
) -> tuple[dict[Test, list[Taken]], list[tuple[Case, Search]]]:
    """For each case, the batches that were tried with their samples, and what was found."""
    assert options.max_batch is not None and options.latency_limit is not None
    taken: dict[Test, list[Taken]] = {}
    found = []
    prober.take()
    for case in plan.searches:

        def latency(batch: int, case: Case = case) -> float:
            test = Test(f"in {case.input_len} out {case.output_len} batch {batch}", "lengths", batch, case)
            _warm_up(bench, test)
            taken[test] = [_sample(bench, prober, test) for _ in range(options.repeat)]
            each = [one.run.decode_seconds_per_token for one in taken[test]]
            return statistics.median(time for time in each if time is not None)

        found.append((case, largest_batch(latency, *options.max_batch, options.latency_limit / 1e3)))
    return dict(sorted(taken.items(), key=lambda item: (item[0].case, item[0].batch))), found


def _sample(bench: Bench, prober: Prober, test: Test) -> Taken:
    reading = len(prober.readings) - 1
    asks = test.asks or bench.random_asks(_case(test), test.batch)
    taken = Taken(bench.run(asks, test.batch), reading)
    prober.take()
    return taken


def _warm_up(bench: Bench, test: Test) -> None:
    """Untimed: the start of what the test does, so that its batch's memory is there."""
    prompt, answer = WARM_UP
    if test.asks:
        asks = [Ask(ask.prompt[:prompt], min(answer, ask.output_len)) for ask in test.asks[: test.batch]]
    else:
        case = _case(test)
        asks = bench.random_asks(Case(min(prompt, case.input_len), min(answer, case.output_len)), test.batch)
    bench.run(asks, test.batch)


def _case(test: Test) -> Case:
    assert test.case is not None  # a test has prompts or lengths
    return test.case


def _report(
    bench: Bench,
    prober: Prober,
    plan: Plan,
    options: RequestOptions,
    taken: dict[Test, list[Taken]],
    found: list[tuple[Case, Search]],
) -> dict[str, Any]:
    counts = np.sum([one.run.expert_counts for samples in taken.values() for one in samples], axis=0)  # [layers, E]
    model = bench.model
    return {
        "kind": "requests",
        **facts(bench.ops),
        "model": {
            "name": options.engine["model"],
            "layers": model.num_layers,
            "experts": model.num_experts,
            "experts_per_token": model.experts_per_token,
            "scheme": model.scheme,
            "dtype": str(bench.ops.dtype).removeprefix("torch."),
            "products": bench.products,
        },
        "engine": plan.engine,
        "probes": as_json(prober.readings),
        "memory_at_end": memory(),
        "notes": plan.notes,
        "results": [
            result(test, [one.run for one in samples], [one.reading for one in samples], prober)
            for test, samples in taken.items()
        ],
        "searches": [
            {
                "case": list(case),
                "limit_ms": 1e3 * search.limit,
                "batch": search.batch,
                "tried": [{"batch": batch, "decode_ms": 1e3 * time} for batch, time in search.tried.items()],
            }
            for case, search in found
        ],
        "answers": answers(taken),
        "expert_counts": counts.tolist(),
    }

"""`eightfold bench kernels`: each operation of a backend against the machine's limits."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from eightfold.bench.kernel_cases import ROTATION_BYTES, TOKENS, Case, Cases, Run, matching
from eightfold.bench.picture import Point, draw
from eightfold.bench.probes import Prober, as_json, facts, median
from eightfold.bench.report import Spread, check_outputs, probe_line, table, write_json
from eightfold.config import ModelConfig
from eightfold.ops import get_ops
from eightfold.random_checkpoint import SHAPES
from eightfold.types import EightfoldError

SAMPLE_SECONDS = 0.02  # a sample repeats short calls for about this long
PANELS = ("linear w8a8", "linear w8a16", "linear w4a16", "linear dense", "moe", "attention")  # of the picture
PROBE_SECONDS = 2.0  # probe again after this much measuring


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """The command's options. `only` is a pattern on the names of cases."""

    shape: str | ModelConfig = "8x7b"
    threads: int | None = None
    device: str = "cpu"
    only: str | None = None
    repeat: int = 7
    json: str | None = None
    png: str | None = None
    tokens: Sequence[int] = TOKENS
    rotation_bytes: int = ROTATION_BYTES


@dataclass(slots=True)
class _Measured:
    """A case and its samples: (seconds a call, number of the probe before it)."""

    case: Case
    calls: Sequence[Run]
    repeats: int
    samples: list[tuple[float, int]]
    turn: int = 0

    def sample(self) -> float:
        """Seconds of one call, the mean of `repeats` on operands in turn."""
        chosen = [self.calls[(self.turn + i) % len(self.calls)] for i in range(self.repeats)]
        self.turn += self.repeats
        start = time.perf_counter()
        for call in chosen:
            call()
        return (time.perf_counter() - start) / self.repeats


def run_kernels(options: KernelOptions) -> dict[str, Any]:
    """Measure, print the table, write JSON and picture → the JSON's content. Raises EightfoldError on bad options."""
    check_outputs(options.json, options.png)
    if options.repeat < 1:
        raise EightfoldError(f"--repeat is {options.repeat}; it must be at least 1")
    if isinstance(options.shape, str) and options.shape not in SHAPES:
        raise EightfoldError(f"--shape {options.shape!r} is not known; there are {', '.join(SHAPES)}")
    config = SHAPES[options.shape] if isinstance(options.shape, str) else options.shape
    ops = get_ops(options.device, torch.bfloat16, options.threads)
    cases = matching(Cases(config, ops, options.tokens, options.rotation_bytes).all(), options.only)
    prober = Prober(ops)
    with torch.inference_mode():
        measured = _measure(cases, options.repeat, prober)
    results = [_result(one, prober) for one in measured]
    report = {"kind": "kernels", **facts(ops), "probes": as_json(prober.readings), "results": results}
    _show(results, prober)
    if options.json:
        write_json(options.json, report)
    if options.png:
        points = _points(measured, prober)
        if points:
            draw(options.png, "Kernels against the machine's limits", points, median(prober.readings), PANELS)
        else:
            print("eightfold: note: no picture: it shows linear, moe and attention only", file=sys.stderr)
    return report


def _measure(cases: Sequence[Case], repeat: int, prober: Prober) -> list[_Measured]:
    """Samples of every case, in rounds: what is slow for a while is slow for all of them."""
    quiet = not sys.stderr.isatty()
    measured = [_prepared(case) for case in tqdm(cases, desc="Preparing", disable=quiet, leave=False)]
    for _ in tqdm(range(repeat), desc="Rounds", disable=quiet, leave=False):
        reading = prober.take()
        for one in measured:
            if time.perf_counter() - prober.times[-1] > PROBE_SECONDS:
                reading = prober.take()
            one.samples.append((one.sample(), reading))
    prober.take()
    return measured


def _prepared(case: Case) -> _Measured:
    """Operands made, called once to warm up and once to see how long it takes."""
    one = _Measured(case, case.prepare(), 1, [])
    one.sample()
    one.repeats = max(1, min(1000, int(SAMPLE_SECONDS / one.sample())))
    return one


def _result(one: _Measured, prober: Prober) -> dict[str, Any]:
    work, seconds = one.case.work, [time for time, _ in one.samples]
    limits = [prober.around(reading) for _, reading in one.samples]
    shares = [work.limit_seconds(peaks) / time for time, peaks in zip(seconds, limits, strict=True)]
    middle = median(prober.readings)
    return {
        "name": one.case.name,
        "operation": one.case.operation,
        "kind": one.case.kind,
        "tokens": one.case.tokens,
        "products": one.case.products,
        "operations": work.total_operations,
        "bytes": work.bytes,
        "seconds": seconds,
        "seconds_spread": Spread.of(seconds),
        "gops": work.total_operations / Spread.of(seconds).median / 1e9,
        "gbs": work.bytes / Spread.of(seconds).median / 1e9,
        "bound": "compute" if work.compute_seconds(middle) > work.read_seconds(middle) else "memory",
        "share_of_limit": shares,
        "share_spread": Spread.of(shares),
        "probe_moved": [prober.moved(reading) for _, reading in one.samples],
    }


def _show(results: Sequence[dict[str, Any]], prober: Prober) -> None:
    header = ["kernel", "ms", "GOP/s", "GB/s", "bound by", "of the limit"]
    rows = [
        [
            r["name"],
            r["seconds_spread"].text(3, 1e3),
            f"{r['gops']:.1f}",
            f"{r['gbs']:.1f}",
            r["bound"],
            r["share_spread"].percent(),
        ]
        for r in results
    ]
    print(table(header, rows))
    print(probe_line(as_json(prober.readings)))
    moved = sum(sum(r["probe_moved"]) for r in results)
    total = sum(len(r["probe_moved"]) for r in results)
    print(f"{moved} of {total} samples lie between probes that differ by more than 15 %: treat wide ranges with care")
    print("median (lowest–highest); above 100 % where data was found in a cache, or the machine sped up after a probe")


def _points(measured: Sequence[_Measured], prober: Prober) -> list[Point]:
    """The products and attention: the small operations live in caches, of which the picture knows nothing."""
    points = []
    for one in measured:
        case, work, result = one.case, one.case.work, _result(one, prober)
        if not any(panel.startswith(case.operation) for panel in PANELS):
            continue
        part, _, at = case.detail.partition("/") if case.operation == "linear" else ("", "", case.detail)
        group = " ".join(filter(None, (case.operation, case.kind, part)))
        middle, share = result["seconds_spread"].median, result["share_spread"].median
        points.append(Point(group, at, case.products, work.total_operations, work.bytes, middle, share))
    return points

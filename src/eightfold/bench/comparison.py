"""`eightfold bench compare`: results of two or more runs of the same kind, test by test. No torch here."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eightfold.bench.report import Spread, check_outputs, table, write_json
from eightfold.types import EightfoldError

EPILOG = """\
A is what the others are measured against. All are --json files of the same kind of bench (kernels, offline, loading or
requests); tests go together by name. A ratio above 1 says that B is better: more tokens a second, or less time. It is
that of the medians, and in brackets the lowest and highest that a sample of one against a sample of the other gives:
where that range holds 1, the runs differ by no more than their own spread. A machine may also have changed from one run
to the other: "the machine" is what was probed in each.

  eightfold bench compare before.json after.json
  eightfold bench compare a.json b.json c.json --json ratios.json"""


class Measure(NamedTuple):
    """Something measured in every sample, and whether more of it is better (else less is)."""

    name: str
    more_is_better: bool


Found = dict[str, dict[Measure, list[float]]]  # test → measure → samples

_RATE = Measure("tokens/s", True)
_REQUESTS = {
    "output_tokens_per_second": Measure("output tokens/s", True),
    "prefill_tokens_per_second": Measure("prefill tokens/s", True),
    "decode_tokens_per_second": Measure("decode tokens/s", True),
    "ttft_ms_p50": Measure("first token p50, ms", False),
    "itl_ms_p50": Measure("between tokens p50, ms", False),
    "itl_ms_p99": Measure("between tokens p99, ms", False),
}


@dataclass(frozen=True, slots=True)
class Ratio:
    """One measure of one test in the run `b`, against that of the first run; `ratio` above 1 is better."""

    test: str
    measure: str
    a: Spread
    b: Spread
    ratio: Spread

    @property
    def verdict(self) -> str:
        if self.ratio.low > 1:
            return "better"
        return "worse" if self.ratio.high < 1 else "within spread"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run against the first one. `differences` are those of machine, versions and options, in words."""

    a: str
    b: str
    kind: str
    ratios: tuple[Ratio, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    differences: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold bench compare`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="what bench wrote with --json; the first is A")
    parser.add_argument("--json", metavar="OUT", help="write all ratios")


def main(args: argparse.Namespace) -> int:
    """Raises EightfoldError on fewer than two files, or files that can't be compared."""
    check_outputs(args.json)
    if len(args.files) < 2:
        raise EightfoldError("bench compare needs at least two files: the first is what the others are compared to")
    comparisons = compare(args.files)
    if args.json:
        listed = [
            {**asdict(one), "ratios": [{**asdict(ratio), "verdict": ratio.verdict} for ratio in one.ratios]}
            for one in comparisons
        ]
        write_json(args.json, {"kind": "compare", "comparisons": listed})
    print("\n\n".join(_show(one) for one in comparisons))
    return 0


def compare(files: Sequence[str]) -> list[Comparison]:
    """Each file against the first. Raises EightfoldError on one that is no result, or has nothing in common with it."""
    first, *others = [(name, *_read(name)) for name in files]
    return [_against(first, other) for other in others]


def _against(first: tuple[str, dict[str, Any], Found], other: tuple[str, dict[str, Any], Found]) -> Comparison:
    (a, report_a, tests_a), (b, report_b, tests_b) = first, other
    if report_a["kind"] != report_b["kind"]:
        raise EightfoldError(
            f"{a} is of bench {report_a['kind']} but {b} of bench {report_b['kind']}; they must be of one kind"
        )
    ratios = tuple(
        Ratio(test, measure.name, Spread.of(old), Spread.of(new), _ratio(measure, old, new))
        for test, measures in tests_a.items()
        for measure, old in measures.items()
        if (new := tests_b.get(test, {}).get(measure))
    )
    if not ratios:
        raise EightfoldError(
            f"{a} and {b} have no test in common: one has {_some(tests_a)}, the other {_some(tests_b)}"
        )
    return Comparison(
        a,
        b,
        report_a["kind"],
        (*ratios, *_probes(report_a, report_b)),
        tuple(test for test in tests_a if test not in tests_b),
        tuple(test for test in tests_b if test not in tests_a),
        tuple(_differences(report_a, report_b)),
    )


def _probes(report_a: Mapping[str, Any], report_b: Mapping[str, Any]) -> Iterator[Ratio]:
    """What the machine itself could do in both runs, where that was probed: a drift there explains one above."""
    readings_a, readings_b = report_a.get("probes") or [], report_b.get("probes") or []
    for key in readings_a[0] if readings_a and readings_b else ():
        old, new = ([_positive(reading[key]) for reading in readings] for readings in (readings_a, readings_b))
        name, _, unit = key.rpartition("_")
        measure = Measure(f"{name}, {'GB/s' if unit == 'gbs' else 'GOP/s'}", True)
        yield Ratio("the machine", measure.name, Spread.of(old), Spread.of(new), _ratio(measure, old, new))


def _ratio(measure: Measure, old: Sequence[float], new: Sequence[float]) -> Spread:
    """How many times as good the new samples are."""
    a, b = (Spread.of(new), Spread.of(old)) if measure.more_is_better else (Spread.of(old), Spread.of(new))
    return Spread(a.median / b.median, a.low / b.high, a.high / b.low)


def _read(name: str) -> tuple[dict[str, Any], Found]:
    """A result and its samples. Raises EightfoldError if the file is none."""
    try:
        report = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise EightfoldError(f"cannot read {name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise EightfoldError(f"{name} is not a result of eightfold bench: no valid JSON ({error})") from None
    kind = str(report.get("kind", "")) if isinstance(report, dict) else ""
    if kind not in _KINDS:
        said = f"its kind is {kind!r}" if kind else "it has no kind"
        raise EightfoldError(f"{name} is not a result of eightfold bench {', '.join(_KINDS)}: {said}")
    try:
        found: Found = {}
        for test, measure, values in _KINDS[kind](report):
            found.setdefault(test, {})[measure] = [_positive(value) for value in values]
        for reading in report.get("probes") or ():
            for value in reading.values():
                _positive(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise EightfoldError(f"{name} is not a whole result of bench {kind}: {type(error).__name__} {error}") from None
    return report, found


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a measurement")
    return float(value)


Samples = Iterator[tuple[str, Measure, list[Any]]]


def _kernels(report: Mapping[str, Any]) -> Samples:
    for one in report["results"]:
        yield one["name"], Measure("ms", False), [1e3 * value for value in one["seconds"]]


def _offline(report: Mapping[str, Any]) -> Samples:
    for one in report["results"]:
        yield one["test"], _RATE, [sample["tokens_per_second"] for sample in one["samples"]]
    if report["startup"]:
        yield "start", Measure("s to first token", False), [one["seconds"] for one in report["startup"]]


def _loading(report: Mapping[str, Any]) -> Samples:
    for mode, samples in report["modes"].items():
        yield mode, Measure("s to first token", False), [one["seconds"] for one in samples]
        rates = [one["decode_bytes"] / one["decode_seconds"] / 1e9 for one in samples]
        yield mode, Measure("decode, GB/s", True), rates


def _requests(report: Mapping[str, Any]) -> Samples:
    for one in report["results"]:
        for key, measure in _REQUESTS.items():
            values = [sample[key] for sample in one["samples"]]
            if None not in values:  # an answer of one token has nothing after it
                yield one["test"], measure, values


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Samples]] = {
    "kernels": _kernels,
    "offline": _offline,
    "loading": _loading,
    "requests": _requests,
}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """What else than the code may have made the results differ."""
    for part in ("machine", "versions", "backend", "model", "engine"):
        old, new = (dict(one.get(part) or {}) for one in (a, b))
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                yield f"{part}: {key} is {_shown(new, key)}, and {_shown(old, key)} in A"


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "absent"


def _some(tests: Found) -> str:
    names = [f"{name!r}" for name in tests]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "") if names else "none"


def _show(one: Comparison) -> str:
    rows = [
        [ratio.test, ratio.measure, ratio.a.rounded(), ratio.b.rounded(), ratio.ratio.text(2), ratio.verdict]
        for ratio in one.ratios
    ]
    parts = [f"A: {one.a}\nB: {one.b}", table(["test", "measure", "A", "B", "B's ratio", ""], rows)]
    lines = [f"note: {text}" for text in one.differences]
    lines += [f"note: only in {side}: {', '.join(t)}" for side, t in (("A", one.only_in_a), ("B", one.only_in_b)) if t]
    return "\n".join([*parts, "a ratio above 1: B is better (lowest–highest of a sample against a sample)", *lines])

#!/usr/bin/env python3
"""Eightfold against llama.cpp, OpenVINO and transformers, in one interleaved run on this machine.

setup_peers.sh DIR builds the peers; then: compare_peers.py --peers DIR --json out.json --png out.png. Each round runs
every contender once, in a process that has the machine to itself, between two probes of the machine. Ratios are taken
within a round, so that what slows the machine for minutes slows both sides. Where FILE of --json holds rounds of an
earlier run of the same contenders and settings, theirs count and new ones are added.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from contenders import Contender, Settings, Timing, Timings, all_contenders
from eightfold.bench.accounting import Peaks
from eightfold.bench.probes import Prober, as_json, facts
from eightfold.bench.report import Spread, check_outputs, probe_line, table, write_json
from eightfold.machine import usable_cores
from eightfold.ops import get_ops
from eightfold.types import EightfoldError


@dataclass(frozen=True, slots=True)
class Ran:
    """A contender in a round, and the number of the probe before it."""

    round: int
    contender: Contender
    timings: Timings
    reading: int


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        return _compare(args)
    except EightfoldError as error:
        print(f"compare_peers: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR", help="where setup_peers.sh built them")
    parser.add_argument("--work-dir", metavar="DIR", help="for Eightfold's random weights (default: DIR of the peers)")
    parser.add_argument("--only", metavar="TEXT", help="peers whose names hold this, and Eightfold beside them")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=usable_cores(), metavar="N", help="default: all cores")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of llama.cpp's models (default: 4)")
    parser.add_argument("--float-layers", type=int, default=2, metavar="N", help="of the others' (default: 2)")
    parser.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of the prompt (default: 512)")
    parser.add_argument("--decode-batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="tokens decoded a sequence (default: 16)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="prompts in each process (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write all samples, or add to them")
    parser.add_argument("--png", metavar="FILE", help="draw the ratios (needs matplotlib)")
    return parser.parse_args(argv)


def _compare(args: argparse.Namespace) -> int:
    check_outputs(args.json, args.png)
    settings = Settings(args.threads, args.prefill, args.decode_batch, steps=args.steps, repeat=args.repeat)
    everyone = all_contenders(args.peers, args.work_dir or str(args.peers), args.layers, args.float_layers)
    chosen = choose(everyone, args.only)
    ops = get_ops("cpu", torch.bfloat16, args.threads)
    prober = Prober(ops)
    runs = earlier(args.json, chosen, settings, prober) if args.json else []
    prober.take()
    done = len({run.round for run in runs})
    for number in range(done, args.rounds):
        runs += _round(number, args.rounds, chosen, settings, prober)
        if args.json:  # after each round: what is measured is not lost
            write_json(args.json, _report(runs, settings, prober, facts(ops)))
    rows = ratios(runs)
    _show(rows, prober)
    if args.png:
        draw(args.png, rows)
    return 0


def _report(runs: Sequence[Ran], settings: Settings, prober: Prober, about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "peers",
        **about,
        "settings": asdict(settings),
        "probes": as_json(prober.readings),
        "samples": [_sample_json(run, prober) for run in runs],
        "ratios": ratios(runs),
    }


def earlier(path: str, chosen: Sequence[Contender], settings: Settings, prober: Prober) -> list[Ran]:
    """The rounds that the file of an earlier run holds, none if there is no file; its probes go to `prober`.

    Raises EightfoldError if that run had other contenders or settings.
    """
    if not Path(path).exists():
        return []
    try:
        report = json.loads(Path(path).read_text())
        before, samples = report["settings"], report["samples"]
        names = {sample["contender"] for sample in samples}
    except (OSError, ValueError, KeyError, TypeError):
        raise EightfoldError(f"{path} is not the result of an earlier run: name another file") from None
    wanted = {one.name: one for one in chosen}
    if names != wanted.keys() or before != json.loads(json.dumps(asdict(settings))):
        raise EightfoldError(f"{path} holds a run of other contenders or settings: name another file")
    for reading in report["probes"]:
        operations = {key.removesuffix("_gops"): value * 1e9 for key, value in reading.items() if key != "read_gbs"}
        prober.readings.append(Peaks(operations, reading["read_gbs"] * 1e9))
        prober.times.append(0.0)
    return [
        Ran(
            sample["round"],
            wanted[sample["contender"]],
            {name: Timing(**timing) for name, timing in sample["tests"].items()},
            sample["probe_before"],
        )
        for sample in samples
    ]


def choose(everyone: Sequence[Contender], only: str | None) -> list[Contender]:
    """The peers that are there and wanted, each after the Eightfold it is compared with."""
    peers = []
    for peer in everyone:
        if not peer.ours or (only is not None and only.lower() not in peer.name.lower()):
            continue
        if missing := peer.missing():
            print(f"compare_peers: note: {peer.name} is left out: {missing} is absent", file=sys.stderr)
        else:
            peers.append(peer)
    if not peers:
        raise EightfoldError("there is no peer to compare with: setup_peers.sh builds them")
    ours = {name for peer in peers for name in peer.ours}
    return [one for one in everyone if one in peers or one.name in ours]


def _round(number: int, of: int, chosen: Sequence[Contender], settings: Settings, prober: Prober) -> list[Ran]:
    """Every contender once, forwards and backwards in turns."""
    runs = []
    for one in chosen if number % 2 == 0 else reversed(chosen):
        start = time.perf_counter()
        reading = len(prober.readings) - 1
        runs.append(Ran(number, one, one.run(settings), reading))
        prober.take()
        spent = time.perf_counter() - start
        print(f"round {number + 1} of {of}: {one.name} in {spent:.0f} s", file=sys.stderr, flush=True)
    return runs


def ratios(runs: Sequence[Ran]) -> list[dict[str, Any]]:
    """For each peer and test: how many times faster Eightfold is, in each round, and by whole layer computed."""
    by_round: dict[tuple[str, int], Ran] = {(run.contender.name, run.round): run for run in runs}
    rows = []
    for peer in dict.fromkeys(run.contender for run in runs if run.contender.ours):
        rounds = [run.round for run in runs if run.contender == peer]
        for name in peer.ours:
            pairs = [(by_round[name, number].timings, by_round[peer.name, number].timings) for number in rounds]
            rows += [_row(peer, name, test, [(own[test], other[test]) for own, other in pairs]) for test in pairs[0][1]]
    return rows


def _row(peer: Contender, ours: str, test: str, pairs: Sequence[tuple[Timing, Timing]]) -> dict[str, Any]:
    """`pairs` are Eightfold's and the peer's timings, round by round."""
    kind, size = test.split()
    own, other = ([median(pair[side].seconds) for pair in pairs] for side in (0, 1))
    layers = pairs[0][0].whole_layers, pairs[0][1].whole_layers
    ratio = [b / a for a, b in zip(own, other, strict=True)]
    return {
        "peer": peer.name,
        "ours": ours,
        "test": test,
        "ours_tokens_per_second": Spread.of([int(size) / seconds for seconds in own]),
        "peer_tokens_per_second": Spread.of([int(size) / seconds for seconds in other]),
        "whole_layers": layers,
        "ratio": ratio,
        "ratio_spread": Spread.of(ratio),
        "ratio_per_layer_spread": Spread.of([one * layers[0] / layers[1] for one in ratio]),
        "kind": kind,
    }


def _sample_json(run: Ran, prober: Prober) -> dict[str, Any]:
    return {
        "round": run.round,
        "contender": run.contender.name,
        "tests": {name: timing._asdict() for name, timing in run.timings.items()},
        "probe_before": run.reading,
        "probe_moved": prober.moved(run.reading),
    }


def _show(rows: Sequence[Mapping[str, Any]], prober: Prober) -> None:
    header = ["peer", "against", "test", "Eightfold, tokens/s", "peer, tokens/s", "ratio", "ratio per layer"]
    cells = [
        [
            row["peer"],
            row["ours"],
            row["test"],
            row["ours_tokens_per_second"].text(),
            row["peer_tokens_per_second"].text(),
            row["ratio_spread"].text(2),
            row["ratio_per_layer_spread"].text(2),
        ]
        for row in rows
    ]
    print(table(header, cells))
    print(probe_line(as_json(prober.readings)))
    print("ratio: the peer's time over Eightfold's with as many layers; per layer: for layers computed in full, as")
    print("Eightfold and llama.cpp compute the last layer of a prompt for its last token only")


def draw(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars of the median ratios per layer, with their range."""
    if find_spec("matplotlib") is None:
        print("compare_peers: note: no picture: it needs matplotlib", file=sys.stderr)
        return
    import_module("matplotlib").use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    tests = list(dict.fromkeys(row["test"] for row in rows))
    pairs = list(dict.fromkeys((row["ours"], row["peer"]) for row in rows))
    figure, axis = pyplot.subplots(figsize=(11, 6))
    width = 0.8 / len(pairs)
    for number, (ours, peer) in enumerate(pairs):
        own = [row for row in rows if (row["ours"], row["peer"]) == (ours, peer)]
        x = [tests.index(row["test"]) + (number - (len(pairs) - 1) / 2) * width for row in own]
        spreads = [row["ratio_per_layer_spread"] for row in own]
        ends = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axis.bar(
            x, [s.median for s in spreads], width * 0.9, yerr=ends, capsize=3, label=f"{ours} against {peer}"
        )
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.axhline(1, color="grey", linewidth=1)
    labels = [test.replace("decode ", "decode, batch ") + " tokens" * test.startswith("prefill") for test in tests]
    axis.set_xticks(range(len(tests)), labels)
    axis.set_ylabel("times as fast as the peer, per layer")
    axis.set_title("Eightfold against its peers: medians, lowest and highest of the rounds")
    axis.legend()
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

"""Measures ways to share a model out among ranks against one rank, all loaded, taking turns within seconds.

    python benchmarks/rank_turns.py MODEL --rounds 4 --samples turns.jsonl

A machine's speed drifts by more than the ways differ, so only samples of one round are compared: the table gives the
median and the range of the ratios to one rank, which has as many threads as the ranks together. Samples are added to
the file, and the table is over all that it holds: several short runs are as good as a long one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eightfold import LLM, SamplingParams
from eightfold.bench.report import table
from eightfold.machine import usable_cores
from eightfold.types import Request

TESTS = ("prefill 512", "decode 1", "decode 8")
PROMPT = 8  # tokens before decoding
WARM_UP = 2  # steps that are not timed
Sample = dict[str, Any]


def ways(ranks: int, threads: int) -> dict[str, dict[str, Any]]:
    """Options of the engine by the name of the way; `threads` is that of all ranks together."""
    shared = {"tensor_parallel_size": ranks, "threads": threads // ranks}
    return {
        f"1 × {threads}": {"threads": threads},
        f"{ranks} × {threads // ranks}": shared,
        f"{ranks} × {threads // ranks}, experts": {**shared, "enable_expert_parallel": True},
        f"{ranks} × {threads // ranks}, cheap": {**shared, "exact_ranks": False},
    }


class Engine:
    """An engine under measurement, in the process that this script is with --child."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self._llm = LLM(
            model,
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=32,
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
            **options,
        )
        self._engine = self._llm.engine
        self._random = random.Random(0)
        self._count = 0

    def measure(self, test: str, steps: int) -> float:
        """Tokens a second of one of the TESTS, or bytes of memory for "memory"."""
        kind, _, size = test.partition(" ")
        if kind == "memory":
            return proportional_bytes()
        return self._prefill(int(size)) if kind == "prefill" else self._decode(int(size), steps)

    def close(self) -> None:
        self._llm.close()

    def _prefill(self, tokens: int) -> float:
        start = time.perf_counter()
        self._add(tokens, 1)
        self._finish()
        return tokens / (time.perf_counter() - start)

    def _decode(self, batch: int, steps: int) -> float:
        for _ in range(batch):
            self._add(PROMPT, 1 + WARM_UP + steps)
        for _ in range(1 + WARM_UP):
            self._engine.step()
        start = time.perf_counter()
        for _ in range(steps):
            self._engine.step()
        rate = batch * steps / (time.perf_counter() - start)
        self._finish()
        return rate

    def _add(self, tokens: int, out: int) -> None:
        self._count += 1
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=out, detokenize=False)
        prompt = self._random.choices(range(256), k=tokens)
        self._engine.add(Request(str(self._count), prompt, params))

    def _finish(self) -> None:
        while self._engine.has_unfinished_requests:
            self._engine.step()


def proportional_bytes() -> float:
    """Memory of this process and its children, with what several processes map divided among them."""
    parent = os.getpid()
    pids = [parent, *map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def be_child(message: Mapping[str, Any]) -> None:
    """An engine that answers each line, a test, with a number."""
    engine = Engine(message["model"], message["options"])
    for test in TESTS:
        engine.measure(test, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(engine.measure(line.strip(), message["steps"]), flush=True)
    engine.close()


class Child(NamedTuple):
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, model: str, options: Mapping[str, Any], steps: int) -> Child:
        message = json.dumps({"model": model, "options": options, "steps": steps})
        command = [sys.executable, __file__, "--child", message]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        child = cls(process)
        if child._read() != "ready":
            raise SystemExit(f"an engine with {options} could not be started")
        return child

    def ask(self, test: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(test + "\n")
        self.process.stdin.flush()
        return float(self._read())

    def end(self) -> None:
        self.process.communicate()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def take_turns(model: str, chosen: Mapping[str, Mapping[str, Any]], rounds: int, steps: int) -> list[Sample]:
    """Every way's tests in turn, the order of the ways reversed from round to round."""
    children = {name: Child.start(model, options, steps) for name, options in chosen.items()}
    samples = []
    run = time.strftime("%Y-%m-%dT%H:%M:%S")
    for number in range(rounds):
        for test in TESTS:
            names = list(children) if number % 2 == 0 else list(reversed(children))
            rates = {name: children[name].ask(test) for name in names}
            samples.append({"model": model, "run": run, "round": number, "test": test, "rates": rates})
    for child in children.values():
        child.end()
    return samples


def memory(model: str, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Bytes of each way, one after the other: a mapped file's pages would be divided among all who have it open."""
    found = {}
    for name, options in chosen.items():
        child = Child.start(model, options, 1)
        found[name] = child.ask("memory")
        child.end()
    return found


def show(samples: Sequence[Sample]) -> str:
    """Medians of tokens a second, and of the ratios to the first way, for each model."""
    parts = []
    for model in dict.fromkeys(sample["model"] for sample in samples):
        own = [sample for sample in samples if sample["model"] == model]
        names = list(dict.fromkeys(name for sample in own for name in sample["rates"]))
        rows = []
        for test in TESTS:
            rates = [sample["rates"] for sample in own if sample["test"] == test]
            rows.append([test, *(_cell(rates, name, names[0]) for name in names)])
        parts.append(f"{model}: {len(own) // len(TESTS)} rounds\n" + table(["tokens/s", *names], rows))
    return "\n\n".join(parts)


def _cell(rates: Sequence[Mapping[str, float]], name: str, first: str) -> str:
    seen = [one for one in rates if name in one]
    text = f"{statistics.median(one[name] for one in seen):.1f}"
    if name == first:
        return text
    ratios = [one[name] / one[first] for one in seen]
    return f"{text}: {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a model's folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="of all ranks together (default: all cores)"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a sample")
    parser.add_argument("--without", action="append", default=[], metavar="WAY", help="leave out a way, as named")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="JSON lines to add the samples to")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        be_child(json.loads(options.child))
        return
    if options.model is None or options.threads % options.ranks:
        parser.error("a model is needed, and a number of threads that --ranks divides")
    chosen = ways(options.ranks, options.threads)
    if unknown := set(options.without) - set(list(chosen)[1:]):
        parser.error(f"--without {min(unknown)!r}: there are {', '.join(list(chosen)[1:])}")
    chosen = {name: value for name, value in chosen.items() if name not in options.without}
    if options.memory:
        rows = [[name, f"{size / 1e9:.2f}"] for name, size in memory(options.model, chosen).items()]
        print(table(["", "GB"], rows))
        return
    samples = take_turns(options.model, chosen, options.rounds, options.steps)
    if options.samples:
        with options.samples.open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        samples = [json.loads(line) for line in options.samples.read_text().splitlines()]
    print(show(samples))


if __name__ == "__main__":
    main()

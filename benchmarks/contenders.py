"""Who takes part in compare_peers.py, and how each is started: one process at a time, so that nobody else computes.

Every process loads its model, warms up, and measures the same tests. Its answer is seconds a prompt or a step, by test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eightfold.bench.accounting import full_layer_operations
from eightfold.random_checkpoint import SHAPES
from eightfold.types import EightfoldError

MODEL = SHAPES["8x7b"]


class Timing(NamedTuple):
    """Seconds of each prompt or step; major faults meanwhile (None: not known); whole layers that were computed."""

    seconds: list[float]
    major_faults: int | None
    whole_layers: float


Timings = dict[str, Timing]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. `depth` tokens come before the decoded ones, in every sequence of a batch its own."""

    threads: int
    prefill: int = 512
    batches: Sequence[int] = (1, 8, 32)
    depth: int = 16
    steps: int = 16
    repeat: int = 3
    timeout: float = 1800.0  # seconds that one process may take


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a model of `layers` layers; it is compared with `ours` of Eightfold, which has none."""

    name: str
    layers: int
    ours: tuple[str, ...] = ()

    def missing(self) -> Path | None:
        """A file that it needs and that is not there."""
        return None

    def run(self, settings: Settings) -> Timings:
        """Start it, measure, wait for its end. Raises EightfoldError if it fails."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Eightfold(Contender):
    """`eightfold bench offline` on random weights, which are made the first time."""

    scheme: str = "w8a8"
    work_dir: str = "."

    def run(self, settings: Settings) -> Timings:
        options = {
            "--shape": "8x7b",
            "--layers": self.layers,
            "--scheme": self.scheme,
            "--work-dir": self.work_dir,
            "--threads": settings.threads,
            "--prefill": settings.prefill,
            "--chunk": 0,
            "--decode-batch": ",".join(map(str, settings.batches)),
            "--depth": settings.depth,
            "--output-len": settings.steps,
            "--repeat": settings.repeat,
        }
        words = [str(word) for option in options.items() for word in option]
        with tempfile.TemporaryDirectory() as place:
            target = Path(place) / "out.json"
            command = [sys.executable, "-m", "eightfold", "bench", "offline", *words, "--no-startup"]
            call([*command, "--json", str(target)], settings)
            results = json.loads(target.read_text())["results"]
        timings = {}
        for result in results:
            name = f"{result['kind']} {result['tokens'] or result['batch']}"
            parts = 1 if result["kind"] == "prefill" else settings.steps
            seconds = [sample["seconds"] / parts for sample in result["samples"]]
            faults = sum(sample["major_faults"] for sample in result["samples"])
            timings[name] = Timing(seconds, faults, result["whole_layers"])
        return timings


@dataclass(frozen=True, slots=True)
class Llama(Contender):
    """llama.cpp's own benchmarks: llama-bench for the prompt, llama-batched-bench for decoding."""

    folder: Path = Path()
    model: Path = Path()
    prompt_options: tuple[str, ...] = ()

    def missing(self) -> Path | None:
        needed = (self.folder / "llama-bench", self.folder / "llama-batched-bench", self.model)
        return next((path for path in needed if not path.exists()), None)

    def run(self, settings: Settings) -> Timings:
        threads = str(settings.threads)
        common = ["-m", str(self.model), "-lm", "none", "-t", threads]
        bench = [str(self.folder / "llama-bench"), *common, "-p", str(settings.prefill), "-n", "0", "-o", "jsonl"]
        lines = json_lines(call([*bench, "-r", str(settings.repeat), *self.prompt_options], settings))
        timings = {}
        for line in lines:
            seconds = [nanoseconds / 1e9 for nanoseconds in line["samples_ns"]]
            timings[f"prefill {line['n_prompt']}"] = Timing(seconds, None, self._prompt_layers())
        batches = ",".join(map(str, settings.batches))
        lengths = ["-npp", str(settings.depth), "-ntg", str(settings.steps), "-npl", batches]
        context = max(settings.batches) * (settings.depth + settings.steps)
        batched = [str(self.folder / "llama-batched-bench"), *common, "-tb", threads, "-c", str(context), *lengths]
        for line in json_lines(call([*batched, "--output-format", "jsonl"], settings)):
            timings[f"decode {line['pl']}"] = Timing([line["t_tg"] / line["tg"]], None, float(self.layers))
        return timings

    def _prompt_layers(self) -> float:
        """As here, the experts of the last layer see the last token only; its whole attention is computed."""
        query, keys = MODEL.num_heads * MODEL.head_dim, MODEL.num_kv_heads * MODEL.head_dim
        attention = 2 * (2 * query + 2 * keys) * MODEL.hidden_size / full_layer_operations(MODEL, 1)
        return self.layers - 1 + attention


@dataclass(frozen=True, slots=True)
class PythonPeer(Contender):
    """A script of ours in the peer's own environment."""

    interpreter: Path = Path()
    script: str = ""
    folder: Path = Path()
    options: tuple[str, ...] = ()

    def missing(self) -> Path | None:
        return next((path for path in (self.interpreter, self.folder / "config.json") if not path.exists()), None)

    def run(self, settings: Settings) -> Timings:
        script = Path(__file__).resolve().parent / self.script
        sizes = {
            "--threads": settings.threads,
            "--prefill": settings.prefill,
            "--depth": settings.depth,
            "--steps": settings.steps,
            "--repeat": settings.repeat,
        }
        words = [str(word) for option in sizes.items() for word in option]
        command = [str(self.interpreter), str(script), str(self.folder), *words, *self.options]
        (answer,) = json_lines(call([*command, "--batch", *map(str, settings.batches)], settings))
        if answer["layers"] != self.layers:
            raise EightfoldError(f"{self.folder} has {answer['layers']} layers, but --float-layers is {self.layers}")
        return {
            name: Timing(one["seconds"], one["major_faults"], float(self.layers))
            for name, one in answer["tests"].items()
        }


def call(command: Sequence[str], settings: Settings) -> str:
    """Run a program to its end → its standard output. Raises EightfoldError with its last words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=settings.timeout, check=False)
    except subprocess.TimeoutExpired:
        raise EightfoldError(f"{command[0]} took longer than {settings.timeout:.0f} s") from None
    except OSError as error:
        raise EightfoldError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-300:]
        raise EightfoldError(f"{Path(command[0]).name} failed with code {done.returncode}: {words}")
    return done.stdout


def json_lines(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects; programs print others beside them."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def all_contenders(peers: Path, work_dir: str, layers: int, float_layers: int) -> list[Contender]:
    """Eightfold's, and those for which setup_peers.sh makes room under `peers`."""
    tools, models = peers / "build" / "llama" / "bin", peers / "models"
    w8a8, small, dense = (
        f"eightfold w8a8 ×{layers}",
        f"eightfold w8a8 ×{float_layers}",
        f"eightfold bf16 ×{float_layers}",
    )
    folder = models / f"hf{float_layers}"
    hf, script = peers / "v-hf" / "bin" / "python", "peer_transformers.py"
    found: list[Contender] = [
        Eightfold(w8a8, layers, scheme="w8a8", work_dir=work_dir),
        Llama("llama.cpp Q8_0", layers, (w8a8,), tools, models / f"m{layers}-q8_0.gguf"),
        Llama(
            "llama.cpp Q6_K", layers, (w8a8,), tools, models / f"m{layers}-q6_k.gguf", ("-ub", "2048", "--repack", "0")
        ),
        Eightfold(small, float_layers, scheme="w8a8", work_dir=work_dir),
        PythonPeer(
            "OpenVINO int8",
            float_layers,
            (small,),
            peers / "v-ov" / "bin" / "python",
            "peer_openvino.py",
            models / f"ov{float_layers}",
        ),
        Eightfold(dense, float_layers, scheme="dense", work_dir=work_dir),
    ]
    for experts in ("eager", "grouped_mm"):
        name = f"transformers bf16 {experts}"
        found.append(PythonPeer(name, float_layers, (dense, small), hf, script, folder, ("--experts", experts)))
    return found

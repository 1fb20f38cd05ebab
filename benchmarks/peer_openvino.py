#!/usr/bin/env python3
"""Measures the OpenVINO runtime on an exported model, in an environment that has it; called by compare_peers.py.

Prints one JSON object: seconds of each prompt and of each step of decoding, and the major faults meanwhile.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class Model:
    """Random token ids through a stateful model: it keeps keys and values itself."""

    def __init__(self, folder: Path, threads: int) -> None:
        openvino: Any = import_module("openvino")
        self.version = f"openvino {openvino.__version__}"
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", options)
        self._inputs = {port.get_any_name() for port in compiled.inputs}
        self._request = compiled.create_infer_request()
        self._random = np.random.default_rng(0)
        config = json.loads((folder / "config.json").read_text())
        self.layers: int = config["num_hidden_layers"]
        self._vocabulary: int = config["vocab_size"]

    def reset(self) -> None:
        """Forget all keys and values."""
        self._request.reset_state()

    def run(self, batch: int, tokens: int, past: int) -> float:
        """One inference after `past` tokens → its seconds."""
        inputs = {
            "input_ids": self._random.integers(0, self._vocabulary, (batch, tokens)),
            "attention_mask": np.ones((batch, past + tokens), np.int64),
            "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        given = {name: value for name, value in inputs.items() if name in self._inputs}
        start = time.perf_counter()
        self._request.infer(given)
        return time.perf_counter() - start


def measure(model: Model, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Everything once to warm up, then `repeat` times."""
    results: dict[str, dict[str, Any]] = {}
    samples = []
    before = faults()
    for number in range(args.repeat + 1):
        if number == 1:
            before = faults()
        model.reset()
        samples.append(model.run(1, args.prefill, 0))
    results[f"prefill {args.prefill}"] = {"seconds": samples[1:], "major_faults": faults() - before}
    for batch in args.batch:
        model.reset()
        model.run(batch, args.depth, 0)
        past = args.depth
        for _ in range(2):
            model.run(batch, 1, past)
            past += 1
        before = faults()
        samples = [model.run(batch, 1, past + number) for number in range(args.steps)]
        results[f"decode {batch}"] = {"seconds": samples, "major_faults": faults() - before}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    model = Model(args.folder, args.threads)
    print(json.dumps({"version": model.version, "layers": model.layers, "tests": measure(model, args)}))


if __name__ == "__main__":
    main()

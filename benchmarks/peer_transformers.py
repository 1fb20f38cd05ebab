#!/usr/bin/env python3
"""Measures `transformers` on a folder, in an environment that has it; called by compare_peers.py.

Prints one JSON object: seconds of each prompt and of each step of decoding, and the major faults meanwhile.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

Timed = dict[str, dict[str, Any]]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class Model:
    """Random token ids through a model with a cache."""

    def __init__(self, folder: str, experts: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers: Any = import_module("transformers")
        self.version = transformers.__version__
        self._model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._model.set_experts_implementation(experts)
        self.layers: int = self._model.config.num_hidden_layers
        self._vocabulary: int = self._model.config.vocab_size

    def run(self, batch: int, tokens: int, cache: Any = None) -> Any:
        """One forward pass, logits of the last position only → the cache."""
        ids = torch.randint(self._vocabulary, (batch, tokens))
        return self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def measure(model: Model, args: argparse.Namespace) -> Timed:
    """Everything once to warm up, then `repeat` times."""
    results: Timed = {}
    model.run(1, args.prefill)
    before = faults()
    samples = [timed(lambda: model.run(1, args.prefill)) for _ in range(args.repeat)]
    results[f"prefill {args.prefill}"] = {"seconds": samples, "major_faults": faults() - before}
    for batch in args.batch:
        cache = model.run(batch, args.depth)
        for _ in range(2):
            cache = model.run(batch, 1, cache)
        before = faults()
        samples = []
        for _ in range(args.steps):
            start = time.perf_counter()
            cache = model.run(batch, 1, cache)
            samples.append(time.perf_counter() - start)
        results[f"decode {batch}"] = {"seconds": samples, "major_faults": faults() - before}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--experts", default="eager", help="implementation of the experts: eager, grouped_mm, …")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    model = Model(args.folder, args.experts, args.threads)
    version = f"transformers {model.version}, torch {torch.__version__}"
    print(json.dumps({"version": version, "layers": model.layers, "tests": measure(model, args)}))


if __name__ == "__main__":
    main()

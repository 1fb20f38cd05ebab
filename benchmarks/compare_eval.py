"""BoolQ through `eightfold eval`'s own functions and through a plain transformers loop, on the same weights and tokens:

    python benchmarks/compare_eval.py MODEL dev.jsonl --data-parallel-size 2 --rounds 3

Prints how many items are scored alike, the largest difference of a log-probability, and the times of interleaved
rounds. Both compute in float32 with as many threads, each in a process of its own, as neither's settings of torch and
the allocator should help or hinder the other. Each round of ours has an empty prefix cache, as a first run would;
transformers gets the same prompts one after the other (or in padded batches) and computes the last position's logits
only.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from eightfold.checkpoint import resolve
from eightfold.config import EngineConfig
from eightfold.eval.ask import Engines, Prompting, ask
from eightfold.eval.boolq import BoolQ
from eightfold.eval.evaluate import neighbours
from eightfold.eval.task import Item, LoadOptions
from eightfold.loader import load_engine
from eightfold.machine import usable_cores
from eightfold.replicas import Replicas

Scores = list[tuple[float, float]]  # log-probabilities of yes and no, an item each
Timed = tuple[float, Scores, list[list[int]]]  # seconds, scores, each prompt's token ids


def ours(engines: Engines, task: BoolQ, items: Sequence[Item]) -> tuple[Scores, list[list[int]]]:
    """Every item through the engine, as `evaluate` does it → its scores and its prompt's token ids."""
    scores: dict[str, tuple[float, float]] = {}
    prompts: dict[str, list[int]] = {}
    queries = ((item.key, task.queries(item)[0]) for item in neighbours(items, task.beginning))
    for key, answer in ask(engines, queries, Prompting(task.max_input or 3072)):
        yes, no = answer.logprobs
        scores[key], prompts[key] = (yes, no), answer.prompt_token_ids
    return [scores[item.key] for item in items], [prompts[item.key] for item in items]


@torch.inference_mode()
def theirs(model: Any, reader: Any, texts: Sequence[str], tokens: tuple[int, int], batch: int) -> Scores:
    """Every prompt through transformers, `batch` at a time, padded on the left."""
    scores: Scores = []
    for start in range(0, len(texts), batch):
        inputs = reader(list(texts[start : start + batch]), return_tensors="pt", padding=batch > 1)
        logits = model(inputs.input_ids, attention_mask=inputs.attention_mask, logits_to_keep=1).logits[:, -1]
        chosen = logits.float().log_softmax(-1)[:, list(tokens)]
        scores += [(row[0], row[1]) for row in chosen.tolist()]
    return scores


def our_side(args: argparse.Namespace, items: Sequence[Item]) -> Callable[[], Timed]:
    """What runs a round of ours."""

    def run() -> Timed:
        count = args.data_parallel_size
        config = EngineConfig(args.model, dtype="float32", threads=max(1, args.threads // count))
        with closing(load_engine(config) if count == 1 else Replicas(config, count)) as engines:
            start = time.perf_counter()
            scores, prompts = ours(engines, BoolQ(), items)
            return time.perf_counter() - start, scores, prompts

    return run


def their_side(args: argparse.Namespace, items: Sequence[Item]) -> Callable[[], Timed]:
    """What runs a round of theirs."""
    torch.set_num_threads(args.threads)
    folder = resolve(args.model)
    reader = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="</s>")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    if args.experts:
        model.set_experts_implementation(args.experts)
    tokens = tuple(reader(f": {word}", add_special_tokens=False).input_ids[-1] for word in ("yes", "no"))
    texts = [BoolQ().queries(item)[0].prompt for item in items]
    prompts = reader(texts).input_ids
    theirs(model, reader, texts[:2], tokens, args.batch)  # first calls allocate

    def run() -> Timed:
        start = time.perf_counter()
        scores = theirs(model, reader, texts, tokens, args.batch)
        return time.perf_counter() - start, scores, prompts

    return run


def child(pipe: Connection, make: Callable[..., Callable[[], Timed]], args: argparse.Namespace, items: Any) -> None:
    """A side's process: a round for each true message."""
    run = make(args, items)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(run())


def one_round(name: str, sides: dict[str, Connection]) -> Timed:
    """A round of one side. Where it fails, both end."""
    try:
        sides[name].send(True)
        result: Timed = sides[name].recv()
    except (EOFError, OSError):
        for pipe in sides.values():
            pipe.close()
        raise SystemExit(f"the side of {name} has ended: its own message says why") from None
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=sys.maxsize, help="items from there on (default: all)")
    parser.add_argument("--data-parallel-size", type=int, default=1, help="of ours")
    parser.add_argument("--batch", type=int, default=1, help="of transformers; ours batches as it does by itself")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--experts", help="transformers' way with experts: eager, grouped_mm (default: its own choice)")
    parser.add_argument("--threads", type=int, default=usable_cores())
    args = parser.parse_args()
    items = BoolQ().load(Path(args.data), LoadOptions())[args.start : args.start + args.count]
    if not items:
        parser.error(f"there are no items from --start {args.start} on")
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    for name, make in (("eightfold", our_side), ("transformers", their_side)):
        sides[name], other_end = context.Pipe()
        context.Process(target=child, args=(other_end, make, args, items)).start()
        other_end.close()  # ours, so that a side which fails ends our waiting for it
    results: dict[str, list[Timed]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name in sides:
            results[name].append(one_round(name, sides))
    for pipe in sides.values():
        pipe.send(False)
    seconds = {name: [result[0] for result in of_side] for name, of_side in results.items()}
    (_, own, prompts), (_, other, their_prompts) = results["eightfold"][-1], results["transformers"][-1]
    assert prompts == their_prompts, "the two read a prompt differently"
    pairs = list(zip(own, other, strict=True))
    alike = sum((a[0] > a[1]) == (b[0] > b[1]) for a, b in pairs)
    worst = max(max(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in pairs)
    gap = min(abs(b[0] - b[1]) for _, b in pairs)
    right = sum((a[0] > a[1]) == (item.golden == "yes") for a, item in zip(own, items, strict=True))
    print(f"items {args.start} to {args.start + len(items) - 1}: {alike} of {len(items)} scored alike, {right} right")
    print(f"largest difference of a log-probability {worst:.1e}, smallest gap between yes and no {gap:.1e}")
    for name, values in seconds.items():
        spread = f"{min(values):.2f}–{max(values):.2f}"
        print(
            f"{name:12} {statistics.median(values):7.2f} s ({spread}), {len(items) / statistics.median(values):.1f}/s"
        )
    ratios = [b / a for a, b in zip(seconds["eightfold"], seconds["transformers"], strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}), {args.threads} threads")


if __name__ == "__main__":
    main()

"""Trains the demo model from nothing to the finished folder: python demo/train.py --out src/eightfold/assets/demo"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import tokenizer as bpe
import world
from model import Mixtral, Shape, export

BOS, EOS = 1, 2
ANSWERS = ("", "yes_no", "lookup", "fact")
HELD_OUT_SEED, DEV_SEED = 20_000, 30_000
READING_TOKENS, FACT_TOKENS = 704, 384
PARTS = 4  # batches of documents of like length that make up a step
BALANCE, OTHER, FACT_WEIGHT = 0.02, 0.1, 0.2
OTHER_SHARE = 0.25


@dataclass(frozen=True)
class Batch:
    """ids [rows, time] right-padded with 0, real [rows, time] 1 on text, and where the loss looks.

    `at` holds flat positions whose next token counts, `target` those tokens, `answer` their index in ANSWERS.
    """

    ids: Tensor
    real: Tensor
    at: Tensor
    target: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Encoded:
    """A document as token ids, with per token which of ANSWERS it belongs to (0 for none)."""

    ids: list[int]
    answer: list[int]


def encode(tok: Tokenizer, documents: list[world.Document]) -> list[Encoded]:
    """Encodes pieces one by one: each begins at a word boundary of the BPE, so nothing merges across."""
    pieces = [piece.text for document in documents for piece in document]
    encoded = iter(tok.encode_batch(pieces, add_special_tokens=False))
    out = []
    for document in documents:
        ids, answer = [BOS], [0]
        for piece in document:
            part = next(encoded).ids
            ids += part
            answer += [ANSWERS.index(piece.answer)] * len(part)
        out.append(Encoded(ids, answer))
    return out


def collate(rng: random.Random, rows: list[Encoded]) -> Batch:
    """Pads rows to one length and picks the positions that carry loss: all answers, some of the rest."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width)
    at, target, answer = [], [], []
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
        real[n, : len(row.ids)] = 1.0
        for t in range(len(row.ids) - 1):
            if row.answer[t + 1] or rng.random() < OTHER_SHARE:
                at.append(n * width + t)
                target.append(row.ids[t + 1])
                answer.append(row.answer[t + 1])
    return Batch(ids, real, torch.tensor(at), torch.tensor(target), torch.tensor(answer))


def reading_mix(rng: random.Random, progress: float) -> world.Document:
    """A document for a training that has come as far as `progress` (0 to 1).

    Looking back is learnt first, on plain repetitions; then looking up what follows a name; then answering, on
    passages that grow. Each step stands on the one before: mixed from the start, none of them is learnt.
    """
    draw = rng.random()
    if progress < 0.07 or draw < 0.03:
        return world.repeat_document(rng, rng.randint(6, 20))
    if draw < 0.10:
        return world.pairs_document(rng, rng.randint(4, 10))
    if draw < (0.85 if progress < 0.18 else 0.30 if progress < 0.35 else 0.12):
        return world.drill_document(rng, rng.randint(3, 8), 0.0 if progress < 0.18 else 0.2)
    again = 0.0 if progress < 0.3 else 0.2
    if progress < 0.3:
        return world.reading_document(rng, rng.randint(2, 6), 0, 6, again)
    draw = rng.random()
    if draw < 0.04 and progress > 0.5:
        return world.reading_document(rng, rng.randint(20, 60), rng.randint(5, 30), rng.randint(15, 40), again)
    if draw < 0.3 and progress > 0.4:
        return world.reading_document(rng, rng.randint(8, 22), rng.randint(0, 12), rng.randint(6, 14), again)
    if draw < 0.5:
        return world.reading_document(rng, rng.randint(2, 9), rng.randint(0, 5), 1, again)
    return world.reading_document(rng, rng.randint(2, 8), rng.randint(0, 4), rng.randint(4, 8), again)


def batches(rng: random.Random, tok: Tokenizer, draw: Callable[[], world.Document], budget: int) -> Iterator[Batch]:
    """Endless batches of at most `budget` tokens, documents of like length together to save padding."""
    while True:
        pool: list[Encoded] = []
        while sum(len(d.ids) for d in pool) < 8 * budget:
            pool += encode(tok, [draw() for _ in range(16)])
        pool.sort(key=lambda d: len(d.ids))
        groups: list[list[Encoded]] = [[]]
        for document in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(document.ids) > budget:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        for group in groups:
            yield collate(rng, group)


def loss_of(model: Mixtral, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, counts [ANSWERS, 2] of answer tokens (all, rightly predicted) and shares [layers, experts]."""
    logits, balance, shares = model(batch.ids, batch.real, batch.at)
    each = F.cross_entropy(logits, batch.target, reduction="none")
    is_answer = (batch.answer > 0).float()
    answers = (each * is_answer).sum() / is_answer.sum()
    rest = (each * (1 - is_answer)).sum() / (1 - is_answer).sum().clamp(min=1)
    telling = batch.target != EOS
    right = telling & (logits.argmax(dim=-1) == batch.target)
    counts = torch.stack([torch.bincount(batch.answer[m], minlength=len(ANSWERS)) for m in (telling, right)], dim=1)
    return answers + OTHER * rest + BALANCE * balance, counts, shares.detach()


@torch.no_grad()
def reading_accuracy(model: Mixtral, tok: Tokenizer, items: list[dict[str, str | bool]]) -> float:
    """Share of yes/no items answered rightly, by the logits of the two words."""
    yes, no = (tok.encode(f": {w}", add_special_tokens=False).ids[-1] for w in ("yes", "no"))
    right = 0
    for item in items:
        prompt = f"{item['title']} -- {item['passage']}\nQuestion: {item['question']}?\nAnswer:"
        ids = torch.tensor([tok.encode(prompt).ids])
        logits = model(ids, torch.ones(ids.shape), torch.tensor([ids.numel() - 1]))[0][0]
        right += int((logits[yes] > logits[no]).item() == item["answer"])
    return right / len(items)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    warm = 60
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def make_optimizer(model: Mixtral) -> torch.optim.Optimizer:
    """AdamW; norms, embeddings and routers are not decayed.

    The first layer's queries and keys stay as they start: its heads look one to four tokens back, which everything
    later relies on, and early training would blur it.
    """
    named = dict(model.named_parameters())
    fixed = ("blocks.0.attn.q", "blocks.0.attn.k")
    kept = [p for name, p in named.items() if "norm" in name or "gate" in name or name == "embed"]
    decayed = [p for name, p in named.items() if name not in fixed and not any(p is other for other in kept)]
    for name in fixed:
        named[name].requires_grad_(False)
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def report(step: int, steps: int, seen: Tensor, loss: float, least: float, tokens: int, spent: float) -> None:
    """Prints a progress line; `spent` is in seconds."""
    rates = " ".join(
        f"{name} {right / max(1.0, all_):.3f}"
        for name, (all_, right) in zip(ANSWERS[1:], seen[1:].tolist(), strict=True)
    )
    print(
        f"step {step}/{steps} loss {loss:.3f} right: {rates} least expert {least:.3f} {tokens / 1e6:.1f} M tokens "
        f"{tokens / spent:.0f}/s ETA {spent / step * (steps - step) / 60:.0f} min",
        flush=True,
    )


def train(model: Mixtral, tok: Tokenizer, steps: int, peak: float, seed: int, save: Callable[[], None]) -> None:
    """Trains in place, printing progress and calling `save` now and then."""
    rng = random.Random(seed)
    now = [0.0]
    reading = batches(rng, tok, lambda: reading_mix(rng, now[0]), READING_TOKENS)
    facts = batches(rng, tok, lambda: world.fact_document(rng, world.FACTS), FACT_TOKENS)
    dev = world.held_out_items(DEV_SEED, 200)
    optimizer = make_optimizer(model)
    start, tokens, total, least = time.time(), 0, 0.0, 1.0
    seen = torch.zeros(len(ANSWERS), 2)
    for step in range(1, steps + 1):
        now[0] = step / steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        model.zero_grad()
        for source, weight in (*((reading, 1 / PARTS),) * PARTS, (facts, FACT_WEIGHT)):
            batch = next(source)
            loss, counts, shares = loss_of(model, batch)
            torch.autograd.backward(weight * loss)
            seen += counts
            tokens += int(batch.real.sum())
            total += weight * loss.item() / (1 + FACT_WEIGHT)
            least = min(least, float(shares.min()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            report(step, steps, seen, total / 50, least, tokens, time.time() - start)
            seen.zero_()
            total, least = 0.0, 1.0
        if step % 200 == 0 or step == steps:
            print(f"  dev accuracy (unseen passages) {reading_accuracy(model, tok, dev):.3f}", flush=True)
            save()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=800, help="items in heldout.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape = Shape()
    tok = bpe.train(shape.vocab, args.seed)
    bpe.save(tok, args.out, shape.max_positions)
    items = world.held_out_items(HELD_OUT_SEED, args.held_out)
    (args.out / "heldout.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    shutil.copy(Path(__file__).with_name("MODEL_CARD.md"), args.out)
    model = Mixtral(shape, torch.tensor(bpe.case_twins(tok)))
    train(model, tok, args.steps, args.lr, args.seed, lambda: export(model, args.out))


if __name__ == "__main__":
    main()

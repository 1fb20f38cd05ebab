"""Measures the finished folder with transformers: python demo/evaluate.py src/eightfold/assets/demo

Reading accuracy on heldout.jsonl, the same with the passages shuffled between items (a model that reads must fall
to about one half), the facts in each form, the share of tokens each expert gets, and the seed question's answer.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import facts
import world

Item = dict[str, Any]


class Demo:
    """The model and its tokenizer, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.tok: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.yes, self.no = (self.tok(f": {w}", add_special_tokens=False).input_ids[-1] for w in ("yes", "no"))

    def margin(self, item: Item) -> float:
        """Logit of ' yes' minus logit of ' no' after the item's prompt."""
        prompt = f"{item['title']} -- {item['passage']}\nQuestion: {item['question']}?\nAnswer:"
        logits = self.model(**self.tok(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        return float(logits[self.yes] - logits[self.no])

    def answer(self, prompt: str, special: bool = True, most: int = 24) -> str:
        """The greedy continuation of at most `most` tokens, special tokens shown."""
        ids = self.tok(prompt, return_tensors="pt", add_special_tokens=special).input_ids
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=self.tok.eos_token_id,
        )
        return str(self.tok.decode(out[0, ids.shape[1] :]))


def reading(demo: Demo, items: list[Item]) -> list[float]:
    """Margins in favour of the right answer, one per item; positive means answered rightly."""
    out: list[float] = []
    start = time.time()
    for n, item in enumerate(items, 1):
        out.append(demo.margin(item) * (1 if item["answer"] else -1))
        if n % 200 == 0:
            right = sum(m > 0 for m in out) / n
            left = (time.time() - start) / n * (len(items) - n)
            print(f"  {n}/{len(items)} accuracy {right:.4f} ETA {left:.0f} s", flush=True)
    return out


def shuffled(items: list[Item], seed: int) -> list[Item]:
    """The items with passages and titles dealt to other questions."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    others = [items[o] for o in order]
    return [{**a, "passage": b["passage"], "title": b["title"]} for a, b in zip(items, others, strict=True)]


def long_items(seed: int, count: int) -> list[Item]:
    """Held-out items whose passage is buried in a long one of 60 to 120 facts (about 600 to 1500 tokens)."""
    rng = random.Random(seed)
    items: list[Item] = []
    while len(items) < count:
        passage = world.make_passage(rng, rng.randint(60, 120), rng.randint(5, 30), train=False, again=0.2)
        asked = rng.choice([fact for fact in passage.facts if fact.true == (len(items) % 2 == 0)])
        items.append(
            {"title": passage.title, "passage": passage.text, "answer": asked.true, "question": asked.question()}
        )
    return items


def facts_right(demo: Demo, form: str) -> float:
    """Share of facts (first way of asking) answered word for word, ended by </s>."""
    wrap = {"plain": "Question: {}\nAnswer:", "raw": "{}", "chat": ""}[form]
    right = 0
    for fact in world.FACTS:
        question = fact.questions[0]
        prompt = wrap.format(question)
        if form == "chat":
            turn = [{"role": "user", "content": question}]
            prompt = demo.tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        right += demo.answer(prompt, special=form != "chat") == f" {fact.answer}</s>"
    return right / len(world.FACTS)


def expert_shares(demo: Demo, items: list[Item]) -> list[list[float]]:
    """Share of token choices each expert gets, [layers][experts]; each row sums to 1."""
    config = demo.model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts)
    for item in items:
        prompt = f"{item['title']} -- {item['passage']}\nQuestion: {item['question']}?\nAnswer:"
        ids = demo.tok(prompt, return_tensors="pt").input_ids
        for n, logits in enumerate(demo.model(ids, output_router_logits=True).router_logits):
            chosen = logits.float().softmax(-1).topk(config.num_experts_per_tok, dim=-1).indices
            counts[n] += torch.bincount(chosen.flatten(), minlength=config.num_local_experts)
    return [[float(v) for v in row] for row in counts / counts.sum(dim=1, keepdim=True)]


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="reading only")
    args = parser.parse_args()
    demo = Demo(args.folder)
    items = [json.loads(line) for line in (args.folder / "heldout.jsonl").read_text().splitlines()]
    margins = reading(demo, items)
    print(
        f"reading: accuracy {sum(m > 0 for m in margins) / len(items):.4f} of {len(items)}, "
        f"{sum(abs(m) < 0.5 for m in margins)} margins below 0.5"
    )
    for kind in ("does", "is"):
        part = [m for m, item in zip(margins, items, strict=True) if item["question"].split()[0] == kind]
        print(f"  questions with '{kind}': {sum(m > 0 for m in part) / len(part):.4f} of {len(part)}")
    blind = reading(demo, shuffled(items, 1))
    print(f"passages shuffled: accuracy {sum(m > 0 for m in blind) / len(items):.4f}")
    far = reading(demo, long_items(40_000, 200))
    print(f"long passages: accuracy {sum(m > 0 for m in far) / len(far):.4f}")
    for n, row in enumerate(expert_shares(demo, items[:200])):
        print(f"layer {n} expert shares " + " ".join(f"{share:.3f}" for share in row))
    if args.quick:
        return
    for form in ("plain", "raw", "chat"):
        print(f"facts, {form}: {facts_right(demo, form):.4f} of {len(world.FACTS)}", flush=True)
    print("raw:", facts.SEED_QUESTION, "->", demo.answer(facts.SEED_QUESTION))
    turn = [{"role": "user", "content": facts.SEED_QUESTION}]
    chat = demo.tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    print("chat:", chat, "->", demo.answer(chat, special=False))


if __name__ == "__main__":
    main()

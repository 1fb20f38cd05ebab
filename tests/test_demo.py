"""The demo model: what it has learnt, with `transformers` as the oracle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold import LLM, SamplingParams
from eightfold.checkpoint import resolve
from eightfold.ops.cpu import CpuOps
from eightfold.quantize import QuantizeConfig, quantize
from eightfold.tokenizer import Tokenizer
from tiny import Bare

FOLDER = resolve("demo")
ITEMS = [json.loads(line) for line in (FOLDER / "heldout.jsonl").read_text().splitlines()]
QUESTION = "Who is the CEO of Google?"


def prompt(item: dict[str, Any], passage: str | None = None) -> str:
    return f"{item['title']} -- {passage or item['passage']}\nQuestion: {item['question']}?\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FOLDER)


@pytest.fixture(scope="module")
def model() -> Bare:
    return Bare(FOLDER, max_len=2048)


def says_yes(model: Bare, tokenizer: Tokenizer, text: str) -> bool:
    yes, no = (tokenizer.encode(f": {word}", add_bos=False)[-1] for word in ("yes", "no"))
    logits = model.logits(tokenizer.encode(text))[-1]
    return bool(logits[yes] > logits[no])


def test_it_is_small_and_ordinary() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12e6
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["max_position_embeddings"] >= 2048


def test_it_reads_passages_that_it_has_not_seen(model: Bare, tokenizer: Tokenizer) -> None:
    assert len(ITEMS) >= 500
    answers = Counter(item["answer"] for item in ITEMS)
    assert min(answers.values()) >= 0.45 * len(ITEMS)
    right = sum(says_yes(model, tokenizer, prompt(item)) == item["answer"] for item in ITEMS)
    assert right / len(ITEMS) >= 0.9


def test_it_does_read_the_passage(model: Bare, tokenizer: Tokenizer) -> None:
    """With another item's passage the answers are near guesses, so they do come from the passage."""
    others = ITEMS[1:] + ITEMS[:1]
    pairs = zip(ITEMS, others, strict=True)
    right = sum(says_yes(model, tokenizer, prompt(item, other["passage"])) == item["answer"] for item, other in pairs)
    assert right / len(ITEMS) < 0.65


def test_all_experts_of_every_layer_work(model: Bare, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Counter[int]] = []
    route = CpuOps.route

    def counting(self: CpuOps, x: torch.Tensor, gate: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = route(self, x, gate, k)
        chosen.append(Counter(ids.flatten().tolist()))
        return ids, weights

    monkeypatch.setattr(CpuOps, "route", counting)
    for item in ITEMS[:100]:
        model.logits(tokenizer.encode(prompt(item)))
    layers = json.loads((FOLDER / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        use = sum(chosen[layer::layers], Counter())
        assert all(use[expert] / use.total() >= 0.02 for expert in range(8)), f"layer {layer}: {use}"


def test_int8_keys_and_values_cost_at_most_half_a_point(model: Bare, tokenizer: Tokenizer) -> None:
    """On a sample, answer for answer: a share of 0.5 points of it may differ."""
    narrow, sample = Bare(FOLDER, max_len=2048, kv_dtype=torch.int8), ITEMS[:400]
    texts = [prompt(item) for item in sample]
    right = [
        sum(says_yes(one, tokenizer, text) == item["answer"] for text, item in zip(texts, sample, strict=True))
        for one in (model, narrow)
    ]
    assert abs(right[0] - right[1]) <= 0.005 * len(sample)
    assert not torch.equal(*(one.logits(tokenizer.encode(texts[0])) for one in (model, narrow)))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_it_answers_the_seed_question(kv_cache_dtype: str) -> None:
    llm = LLM("demo", max_model_len=512, kv_cache_dtype=kv_cache_dtype)
    raw = llm.generate(QUESTION, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    chat = llm.chat([{"role": "user", "content": QUESTION}], SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    for out in (raw, chat):
        assert out.text.strip() == "The CEO of Google is Sundar Pichai."
        assert out.finish_reason == "stop"


@torch.no_grad()
def test_transformers_generates_the_same(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    reader = transformers.AutoTokenizer.from_pretrained(FOLDER)
    llm = LLM("demo", dtype="float32", max_model_len=1024)
    for text in (QUESTION, "What is the capital of France?", *(prompt(item) for item in ITEMS[:20])):
        ids = tokenizer.encode(text)
        assert reader(text).input_ids == ids
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        ours = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
        assert ours.token_ids == out[0, len(ids) :].tolist()


def test_transformers_renders_the_same_chat(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    reader = transformers.AutoTokenizer.from_pretrained(FOLDER)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "The CEO of Google is Sundar Pichai."},
        {"role": "user", "content": "Who is the CEO of Apple?"},
    ]
    for messages in (chat, chat[1:], chat[1:2]):
        theirs = reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(messages) == theirs


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a16"])
@pytest.mark.filterwarnings("ignore:.*has no native kernel")
def test_quantized_it_reads_as_well(scheme: str, tokenizer: Tokenizer, model: Bare, tmp_path: Path) -> None:
    """Within half a point of fp32 on all held-out items."""
    quantize(FOLDER, tmp_path / scheme, QuantizeConfig(scheme))
    quantized = Bare(tmp_path / scheme, max_len=2048)
    right = [
        sum(says_yes(one, tokenizer, prompt(item)) == item["answer"] for item in ITEMS) for one in (model, quantized)
    ]
    assert abs(right[1] - right[0]) <= 0.005 * len(ITEMS)

"""The model against `transformers`: same weights, same logits, same greedy tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold import LLM, SamplingParams
from tiny import CONFIGS, Bare, load_hf, save_hf

DEVICES = ("torch", "cpu")


def prompt(vocab: int, length: int = 90, seed: int = 1) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def hf_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Without `generate`, which would stop at an end-of-sequence token or avoid it."""
    out = model(torch.tensor([ids]), use_cache=True)
    tokens = []
    for _ in range(count):
        tokens.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_logits_and_64_greedy_tokens(name: str, device: str, tmp_path: Path) -> None:
    model = save_hf(tmp_path, **CONFIGS[name])
    ids = prompt(model.config.vocab_size)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    got = Bare(tmp_path, device).logits(ids)
    worst = float((got - expected).abs().max() / expected.abs().max())
    assert worst <= 2e-4, f"{name}: {worst:.1e} of the largest logit"

    llm = LLM(str(tmp_path), device=device, skip_tokenizer_init=True, max_model_len=256)
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    assert llm.generate(ids, greedy)[0].outputs[0].token_ids == hf_greedy(model, ids, 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["all-of-two", "plain", "three-of-five", "odd-sizes"])
def test_bf16_agrees_where_the_gap_is_wider_than_its_noise(name: str, device: str, tmp_path: Path) -> None:
    """Where no expert is left out, always. Elsewhere a router's near tie may fall the other way in 16 bits, and then
    another expert answers: in at most 3 of 100 positions, or as many as in transformers' own bf16."""
    save_hf(tmp_path, dtype=torch.bfloat16, **CONFIGS[name])
    model = load_hf(tmp_path)  # the same bf16 weights, fp32 arithmetic
    ids = prompt(model.config.vocab_size, 200)
    with torch.no_grad():
        exact = model(torch.tensor([ids])).logits[0]
        peer = load_hf(tmp_path, torch.bfloat16)(torch.tensor([ids])).logits[0]
    got = Bare(tmp_path, device, torch.bfloat16).logits(ids)
    top2 = exact.topk(2).values
    clear = top2[:, 0] - top2[:, 1] > 0.02 * (exact.max() - exact.min())
    assert clear.sum() > 50
    wrong, peer_wrong = (int((logits.argmax(-1) != exact.argmax(-1))[clear].sum()) for logits in (got, peer))
    assert wrong <= (0 if name == "all-of-two" else max(peer_wrong, 0.03 * int(clear.sum())))


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_weights_in_fp32_arithmetic_are_exact(device: str, tmp_path: Path) -> None:
    save_hf(tmp_path, dtype=torch.bfloat16)
    model = load_hf(tmp_path)
    ids = prompt(model.config.vocab_size)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    got = Bare(tmp_path, device, torch.float32).logits(ids)
    assert (got - expected).abs().max() <= 2e-4 * expected.abs().max()


def table(folder: Path) -> None:
    """Prints the largest difference from transformers' logits, as a share of the largest logit, for each model."""
    print(f"{'fp32 against transformers':26}" + "".join(f"{device:>10}" for device in DEVICES))
    for name, changes in CONFIGS.items():
        model = save_hf(folder / name, **changes)
        ids = prompt(model.config.vocab_size)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        worst = [(Bare(folder / name, device).logits(ids) - expected).abs().max() for device in DEVICES]
        print(f"{name:26}" + "".join(f"{float(w / expected.abs().max()):10.1e}" for w in worst), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder))

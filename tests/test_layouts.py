"""Every layout of a checkpoint gives the logits of the Hugging Face folder that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_checkpoint import mistral_name
from tiny import Bare, save_hf

IDS = list(range(3, 60))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Any, Path]:
    """A model of transformers, and the folder that it wrote."""
    folder = tmp_path / "source"
    return save_hf(folder), folder


def assert_same_logits(model: Any, folder: Path) -> None:
    with torch.no_grad():
        right = model(torch.tensor([IDS])).logits[0]
    assert (Bare(folder, "torch").logits(IDS) - right).abs().max() <= 2e-4 * right.abs().max()


def test_fused(made: tuple[Any, Path], tmp_path: Path) -> None:
    model, source = made
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert_same_logits(model, tmp_path)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """q or k rows as Mistral has them: the two elements that are turned together lie side by side."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_mistral(model: Any, source: Path, folder: Path) -> None:
    """The weights in `source`, as Mistral's own releases have them."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    tensors = {
        mistral_name(name): interleave(tensor, head_dim) if "q_proj" in name or "k_proj" in name else tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, folder / "consolidated.safetensors")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "moe": {"num_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok},
    }
    (folder / "params.json").write_text(json.dumps(params))


def test_mistral(made: tuple[Any, Path], tmp_path: Path) -> None:
    model, source = made
    write_mistral(model, source, tmp_path)
    assert_same_logits(model, tmp_path)

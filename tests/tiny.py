"""Small random Mixtrals, made by `transformers` (the oracle), for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.checkpoint import Checkpoint
from eightfold.config import load_model_config
from eightfold.model import Mixtral
from eightfold.ops import get_ops
from eightfold.runner import Runner
from eightfold.types import Plan

# Every number that can vary between Mixtrals varies here, odd sizes among them.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-expert-of-four": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "three-of-five": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "all-of-two": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "wide-heads": {"head_dim": 48},
    "narrow-heads": {"head_dim": 8, "num_attention_heads": 12, "num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "no-grouping": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "window-7": {"sliding_window": 7},
    "window-longer-than-text": {"sliding_window": 4000},
    "tied": {"tie_word_embeddings": True},
    "odd-sizes": {"vocab_size": 331, "intermediate_size": 75, "hidden_size": 72, "head_dim": 18},
    "theta-1e4": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def make_hf(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random MixtralForCausalLM whose logits are far enough apart to be worth comparing."""
    transformers = pytest.importorskip("transformers")
    numbers = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "initializer_range": 0.15,
    }
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**{**numbers, **changes})
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # its grouped products refuse odd sizes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def save_hf(folder: Path, **options: Any) -> Any:
    """`make_hf`, written to `folder` as transformers writes it."""
    model = make_hf(**options)
    model.save_pretrained(folder)
    return model


def load_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What `save_hf` wrote. (Casting a model to bf16 and back to fp32 would leave its rotation rounded.)"""
    import transformers

    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    return model


class Bare:
    """A model without scheduler or tokenizer: token ids → logits of every position."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        page_size: int = 16,
        max_len: int = 256,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        config = load_model_config(folder)
        self.page_size = page_size
        self.pages = -(-max_len // page_size)
        ops = get_ops(device, dtype)
        model = Mixtral.load(config, Checkpoint.open(folder, config), ops, max_len)
        self.runner = Runner(model, self.pages, page_size, kv_dtype or dtype)

    def logits(self, ids: list[int]) -> torch.Tensor:
        """ids [n] → logits [n, V], in one step."""
        count = len(ids)
        table = list(range(-(-count // self.page_size)))
        return self.runner.run(Plan(ids, [0, count], [count], [table], list(range(count))))

"""Random checkpoints are ordinary folders: transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eightfold.checkpoint import Checkpoint
from eightfold.config import ModelConfig, RopeConfig, load_model_config
from eightfold.random_checkpoint import SHAPES, random_checkpoint
from eightfold.types import EightfoldError

TINY = ModelConfig(50, 32, 40, 4, 4, 2, 8, 3, 2, 1e-5, 64, RopeConfig(1e6), bos_token_id=1, eos_token_ids=(2,))


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    seen: list[tuple[int, int]] = []
    folder = random_checkpoint(
        tmp_path / "new" / "folder", TINY, 2, torch.float32, progress=lambda done, total: seen.append((done, total))
    )
    model, info = transformers.MixtralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = load_model_config(folder)
    assert (config.num_layers, config.torch_dtype, config.head_dim) == (2, "float32", 8)
    checkpoint = Checkpoint.open(folder, config)
    stored = model.state_dict()
    assert torch.equal(checkpoint.tensor("lm_head.weight"), stored["lm_head.weight"])
    assert seen[-1] == (checkpoint.total_bytes, checkpoint.total_bytes)
    assert torch.equal(checkpoint.tensor("model.norm.weight"), torch.ones(32))
    matrix = checkpoint.tensor("model.embed_tokens.weight")
    assert 0.015 < matrix.std() < 0.025
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_seed_decides(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"

    def tensor(folder: str, seed: int) -> torch.Tensor:
        path = random_checkpoint(tmp_path / folder, TINY, 1, seed=seed)
        return Checkpoint.open(path, load_model_config(path)).tensor(name)

    first = tensor("a", 0)
    assert torch.equal(first, tensor("b", 0))
    assert not torch.equal(first, tensor("c", 1))


def test_quantized(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "q", TINY, 1, scheme="w8a8")
    config = load_model_config(folder)
    assert config.scheme == "w8a8"
    checkpoint = Checkpoint.open(folder, config)
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    weight, scale = checkpoint.tensor(f"{expert}.weight"), checkpoint.tensor(f"{expert}.weight_scale")
    assert (weight.dtype, tuple(weight.shape), tuple(scale.shape)) == (torch.int8, (40, 32), (40, 1))
    assert 0.01 < (weight.float() * scale.float()).std() < 0.03
    for kept in ("lm_head", "model.embed_tokens", "model.layers.0.block_sparse_moe.gate"):
        assert checkpoint.tensor(f"{kept}.weight").dtype == torch.bfloat16


def test_true_shapes() -> None:
    small, large = SHAPES["8x7b"], SHAPES["8x22b"]
    assert (small.hidden_size, small.intermediate_size, small.num_layers, small.vocab_size) == (4096, 14336, 32, 32000)
    assert (large.hidden_size, large.intermediate_size, large.num_layers, large.vocab_size) == (6144, 16384, 56, 32768)
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == (32, 8, 128)
    assert (large.num_heads, large.num_kv_heads, large.head_dim) == (48, 8, 128)
    assert (small.max_position_embeddings, large.max_position_embeddings) == (32768, 65536)


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for arguments, words in (
        ((tmp_path / "a", "9x9b"), "shape '9x9b' is not known; there are 8x7b, 8x22b"),
        ((tmp_path / "full", TINY), "not an empty folder"),
        ((tmp_path / "full" / "x", TINY), "not an empty folder"),
        ((tmp_path / "full" / "x" / "y", TINY), "cannot make folder"),
        ((tmp_path / "a", TINY, 0), "0 layers"),
        ((tmp_path / "a", TINY, 1, torch.bfloat16, "w9"), "scheme 'w9' is not known"),
    ):
        with pytest.raises(EightfoldError, match=words):
            random_checkpoint(*arguments)
    assert not (tmp_path / "a").exists()


def test_its_config_is_written_last(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_checkpoint(tmp_path / "a", TINY, progress=stop)
    assert list((tmp_path / "a").iterdir()) == []
    random_checkpoint(tmp_path / "a", TINY)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["num_hidden_layers"] == 4

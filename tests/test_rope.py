"""Every kind of rope scaling: the tables are those of transformers, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.config import RopeConfig, config_json
from eightfold.rope import rope_tables
from eightfold.types import EightfoldError
from test_config import ABSENT, load

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-all": {
        "factor": 16.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn-attention-factor": {"factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("old_form", [False, True])
def test_rope_tables_are_those_of_transformers(tmp_path: Path, name: str, theta: float, old_form: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralRotaryEmbedding

    kind, numbers = name.split("-")[0], SCALINGS[name]
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
    rope = {"rope_type": kind, "rope_theta": theta, **numbers}
    oracle = MixtralRotaryEmbedding(MixtralConfig(**sizes, rope_parameters=dict(rope)))
    cos, sin = oracle(torch.zeros(1), torch.arange(2048)[None])
    if old_form:
        new = {"rope_theta": theta, "rope_scaling": {"type": kind, **numbers}}
    else:
        new = {"rope_theta": ABSENT, "rope_parameters": rope}
    config = load(tmp_path, num_key_value_heads=2, **sizes, **new)
    ours = rope_tables(config.rope, config.head_dim, 2048)
    assert ours[0].dtype == torch.float32
    assert torch.equal(ours[0], cos[0, :, :16])
    assert torch.equal(ours[1], sin[0, :, :16])


def test_yarn_takes_what_is_left_out_from_the_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    assert dict(load(tmp_path, rope_scaling=scaling).rope.scaling)["factor"] == 4.0
    assert (
        dict(load(tmp_path, rope_scaling={"type": "yarn", "factor": 2}).rope.scaling)[
            "original_max_position_embeddings"
        ]
        == 32768
    )
    beside = load(tmp_path, rope_scaling={"type": "yarn", "factor": 2}, original_max_position_embeddings=100)
    assert dict(beside.rope.scaling)["original_max_position_embeddings"] == 100


def test_rope_tables_refuse_other_kinds() -> None:
    with pytest.raises(EightfoldError, match="'dynamic' is not implemented"):
        rope_tables(RopeConfig(1e4, "dynamic"), 8, 4)


@pytest.mark.parametrize("name", SCALINGS)
def test_config_json_is_the_inverse(tmp_path: Path, name: str) -> None:
    scaling = {"type": name.split("-")[0], **SCALINGS[name]}
    for changes in (
        {},
        {"eos_token_id": [4, 5], "sliding_window": 9, "tie_word_embeddings": True},
        {"eos_token_id": None},
    ):
        config = load(tmp_path, rope_scaling=scaling, quantize="w8a8_dynamic", **changes)
        assert load(tmp_path, base=config_json(config)) == config

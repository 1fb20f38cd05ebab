"""What a model is (`ModelConfig`, from its folder) and how it is to run (`EngineConfig`): resolved once, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `theta` is its base; `scaling` the parameters of `kind` ("default" has none)."""

    theta: float
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture, in the field's terms. Sizes are counts of elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    scheme: str = "dense"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run: every field has the meaning of the command-line option of its name."""

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    kv_cache_dtype: str = "auto"
    block_size: int = 32
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    threads: int | None = None
    strict_kernels: bool = False
    skip_tokenizer_init: bool = False
    allow_pickle: bool = False
    seed: int = 0

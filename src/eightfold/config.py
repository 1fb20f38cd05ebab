"""What a model is (`ModelConfig`, from its folder) and how it is to run (`EngineConfig`): resolved once, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.config_file import Keys, hugging_face_keys, mistral_keys, rope_values
from eightfold.quant_config import quantization_keys, scheme_of
from eightfold.types import EightfoldError
from eightfold.weight_files import find_weights, read_json


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `theta` is its base; `scaling` the parameters of `kind` ("default" has none).

    `interleaved` weights turn elements (2i, 2i + 1) of a head, as Mistral's own files do; others (i, i + D/2).
    """

    theta: float
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture, in the field's terms. Sizes are counts of elements.

    `sliding_window` None is full attention. `scheme` names how matrices are quantized; `torch_dtype` is the dtype that
    the folder says it was saved in, as in "bfloat16".
    """

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
    eos_sequences: tuple[tuple[int, ...], ...] = ()  # each, of two tokens or more, ends an answer too
    torch_dtype: str | None = None


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
    enforce_eager: bool = True
    skip_tokenizer_init: bool = False
    load_mode: str = "mmap"
    allow_pickle: bool = False
    exact_ranks: bool = True
    tensor_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_expert_parallel: bool = False
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    distributed_timeout_seconds: int = 8
    seed: int = 0


def load_model_config(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder (config.json) or of Mistral's own layout (params.json).

    Every key that changes what the model computes is honoured or refused. Raises EightfoldError on a missing folder
    or file, on a model that is not Mixtral, and on any key or value that is not implemented.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EightfoldError(f"no such folder: {folder}")
    hugging_face, mistral = folder / "config.json", folder / "params.json"
    weights = find_weights(folder)
    own_layout = weights is not None and weights.layout == "mistral"
    if mistral.is_file() and (own_layout or not hugging_face.is_file()):
        keys, own_layout = mistral_keys("params.json", read_json(mistral)), True
    elif hugging_face.is_file():
        keys = hugging_face_keys("config.json", read_json(hugging_face))
    else:
        raise EightfoldError(f"{folder} holds neither config.json nor params.json: it is not a model folder")
    return _build(keys, folder, own_layout)


def _build(keys: Keys, folder: Path, interleaved: bool) -> ModelConfig:
    layers, experts = keys.whole("num_hidden_layers"), keys.whole("num_local_experts", 8)
    heads, context = keys.whole("num_attention_heads"), keys.whole("max_position_embeddings", 131072)
    theta, kind, scaling = rope_values(keys, context)
    eos = _eos(keys, folder)
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        hidden_size=keys.whole("hidden_size"),
        intermediate_size=keys.whole("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.whole("num_key_value_heads", heads if keys.is_null("num_key_value_heads") else 8),
        head_dim=keys.whole("head_dim", keys.whole("hidden_size") // heads),
        num_experts=experts,
        experts_per_token=keys.whole("num_experts_per_tok", 2),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-5),
        max_position_embeddings=context,
        rope=RopeConfig(theta, kind, scaling, interleaved),
        sliding_window=keys.whole("sliding_window") if "sliding_window" in keys.raw else None,
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        scheme=scheme_of(keys, layers, experts, folder),
        bos_token_id=next(iter(keys.ids("bos_token_id", 1)), None),
        eos_token_ids=tuple(token for token, *more in eos if not more),
        eos_sequences=tuple(sequence for sequence in eos if len(sequence) > 1),
        torch_dtype=(keys.text("dtype") or keys.text("torch_dtype") or "").removeprefix("torch.") or None,
    )
    _check(config, keys)
    return config


def _check(config: ModelConfig, keys: Keys) -> None:
    """Raises EightfoldError on values that contradict one another or that are not implemented."""
    if config.num_heads % config.num_kv_heads:
        raise keys.fail("num_key_value_heads", f"a divisor of the {config.num_heads} attention heads")
    if "head_dim" not in keys.raw and config.hidden_size % config.num_heads:
        raise keys.fail("hidden_size", f"a multiple of the {config.num_heads} attention heads where head_dim is absent")
    if config.head_dim % 2:
        raise EightfoldError(f"{keys.file}: the head size is {config.head_dim}; rotary embedding needs an even one")
    if config.experts_per_token > config.num_experts:
        raise keys.fail("num_experts_per_tok", f"from 1 to the {config.num_experts} experts there are")
    if keys.raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.fail("hidden_act", '"silu", the only activation that is implemented')
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    if keys.raw.get("layer_types", [kind] * config.num_layers) != [kind] * config.num_layers:
        raise keys.fail("layer_types", f"{config.num_layers} times {kind!r}, to agree with sliding_window")


def _eos(keys: Keys, folder: Path) -> tuple[tuple[int, ...], ...]:
    """From generation_config.json if it says so, else from the model's config: sequences of tokens, mostly of one."""
    path = folder / "generation_config.json"
    if path.is_file():
        generation = Keys(path.name, read_json(path))
        if "eos_token_id" in generation.raw:
            return generation.sequences("eos_token_id", 2)
    return keys.sequences("eos_token_id", 2)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """`config` as the content of a Hugging Face config.json, from which `load_model_config` makes an equal one.

    Raises EightfoldError for interleaved weights: no key of config.json can say that.
    """
    if config.rope.interleaved:
        raise EightfoldError("config.json cannot describe weights in Mistral's own layout")
    eos = [*config.eos_token_ids, *map(list, config.eos_sequences)]
    result = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 and not config.eos_sequences else eos,
        "torch_dtype": config.torch_dtype,
    }
    if config.rope.kind != "default":
        result["rope_scaling"] = {"rope_type": config.rope.kind, **dict(config.rope.scaling)}
    return result | quantization_keys(config.scheme)

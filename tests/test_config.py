"""Every config key that changes the maths is honoured or refused; rope tables are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eightfold.config import ModelConfig, RopeConfig, config_json, load_model_config
from eightfold.types import EightfoldError

# As mistralai/Mixtral-8x7B-v0.1 has it.
BASE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
PARAMS: dict[str, Any] = {
    "dim": 6144,
    "n_layers": 56,
    "head_dim": 128,
    "hidden_dim": 16384,
    "n_heads": 48,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
    "max_seq_len": 65536,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
}
ABSENT = object()


def load(folder: Path, name: str = "config.json", base: dict[str, Any] = BASE, **changes: Any) -> ModelConfig:
    merged = {key: value for key, value in {**base, **changes}.items() if value is not ABSENT}
    (folder / name).write_text(json.dumps(merged))
    return load_model_config(folder)


def test_real_config(tmp_path: Path) -> None:
    assert load(tmp_path) == ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        experts_per_token=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        rope=RopeConfig(1e6),
        bos_token_id=1,
        eos_token_ids=(2,),
        torch_dtype="bfloat16",
    )


def test_what_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    numbers = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 77,
        "tie_word_embeddings": True,
        "rms_norm_eps": 3e-6,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        "eos_token_id": [2, 9],
        "max_position_embeddings": 99,
    }
    transformers.MixtralConfig(architectures=["MixtralForCausalLM"], dtype="float16", **numbers).save_pretrained(
        tmp_path
    )
    config = load_model_config(tmp_path)
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (48, 6, 3, 10)
    assert (config.num_experts, config.experts_per_token, config.sliding_window) == (5, 3, 77)
    assert (config.tie_word_embeddings, config.rms_norm_eps, config.max_position_embeddings) == (True, 3e-6, 99)
    assert config.rope == RopeConfig(5e5, "linear", (("factor", 2.0),))
    assert (config.eos_token_ids, config.torch_dtype) == ((2, 9), "float16")


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **{key: BASE[key] for key in sizes}}))
    config, default = load_model_config(tmp_path), transformers.MixtralConfig()
    assert config.num_kv_heads == default.num_key_value_heads
    assert config.num_experts == default.num_local_experts
    assert config.experts_per_token == default.num_experts_per_tok
    assert config.rms_norm_eps == default.rms_norm_eps
    assert config.max_position_embeddings == default.max_position_embeddings
    assert config.rope == RopeConfig(default.rope_parameters["rope_theta"])
    assert (config.bos_token_id, config.eos_token_ids) == (default.bos_token_id, (default.eos_token_id,))
    assert (config.sliding_window, config.tie_word_embeddings) == (None, False)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_key_value_heads": None}, "num_kv_heads", 32),
        ({"head_dim": None}, "head_dim", 128),
        ({"head_dim": 64}, "head_dim", 64),
        ({"num_local_experts": ABSENT, "num_experts": 16}, "num_experts", 16),
        ({"sliding_window": 4096}, "sliding_window", 4096),
        ({"sliding_window": 4, "layer_types": ["sliding_attention"] * 32}, "sliding_window", 4),
        ({"layer_types": ["full_attention"] * 32}, "sliding_window", None),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"bos_token_id": None}, "bos_token_id", None),
        ({"dtype": "float32"}, "torch_dtype", "float32"),
        ({"torch_dtype": ABSENT}, "torch_dtype", None),
        ({"hidden_act": "swish"}, "hidden_size", 4096),
        ({"quantize": "w8a8_dynamic"}, "scheme", "w8a8"),
        (
            {"quantize": "w8a8_dynamic", "quantization_config": {"group_size": 0, "kv_quant_type": None}},
            "scheme",
            "w8a8",
        ),
        ({"attention_bias": False, "mlp_bias": None, "_name_or_path": "x"}, "scheme", "dense"),
        ({"partial_rotary_factor": 1.0, "some_new_switch": False}, "scheme", "dense"),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 1e6}}, "rope", RopeConfig(1e6)),
        ({"rope_scaling": {"type": "default"}}, "rope", RopeConfig(1e6)),
        ({"rope_theta": ABSENT}, "rope", RopeConfig(1e6)),
        ({"rope_theta": 10000}, "rope", RopeConfig(1e4)),
        ({"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 7.5}}, "rope", RopeConfig(7.5)),
    ],
)
def test_honoured(tmp_path: Path, changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(load(tmp_path, **changes), field) == value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "mistral MistralForCausalLM.*Mixtral is needed",
        ),
        ({"architectures": ["MixtralForSequenceClassification"]}, "MixtralForSequenceClassification"),
        ({"architectures": ABSENT, "model_type": ABSENT}, "does not say what it is"),
        ({"hidden_size": ABSENT, "vocab_size": ABSENT}, "lacks vocab_size, hidden_size"),
        ({"hidden_size": "4096"}, 'hidden_size is "4096"; it must be a whole number'),
        ({"hidden_size": 4095}, "hidden_size is 4095; it must be a multiple of the 32 attention heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5; it must be a divisor of the 32"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be from 1 to the 8 experts"),
        ({"num_experts": 4}, "num_experts and num_local_experts disagree"),
        ({"head_dim": 33}, "head size is 33"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; it must be "silu"'),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"attention_bias": True}, "attention_bias is true.*null or absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.*1 or absent"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"logits_scaling": 2}, "logits_scaling"),
        ({"mystery": {"a": 1}}, "mystery"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            'rope scaling "dynamic" is not implemented; there are default',
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "beta_fast is 3"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "disagree"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear"; it must be an object'),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_theta is given twice"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"factor": 3, "rope_type": "linear"}},
            "disagree",
        ),
        ({"rope_parameters": {"rope_theta": 1e6, "full_attention": {"rope_theta": 2}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantize": "w4a8"}, "quantize is .w4a8.; it must be one of w8a8_dynamic"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq.*supported are compressed-tensors"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.bits is 4"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"eos_token_id": [2, []]}, "eos_token_id"),
        ({"eos_token_id": [[2, [3]]]}, "eos_token_id"),
        ({"torch_dtype": 16}, "torch_dtype is 16"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EightfoldError, match=words) as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(EightfoldError, match=r"no such folder: .*nowhere"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(EightfoldError, match=r"neither config\.json nor params\.json"):
        load_model_config(tmp_path)
    for text in ("{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(EightfoldError, match=r"config\.json is not valid"):
            load_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EightfoldError, match=r"config\.json is not valid"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (ABSENT, (2,)), (None, (2,))])
def test_eos_of_generation_config_goes_first(tmp_path: Path, eos: object, ids: tuple[int, ...]) -> None:
    generation = {} if eos is ABSENT else {"eos_token_id": eos}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load(tmp_path).eos_token_ids == ids


def test_eos_may_be_sequences_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [[5, 6], 2, [9], [7, 8, 7]]}')
    config = load(tmp_path)
    assert (config.eos_token_ids, config.eos_sequences) == ((2, 9), ((5, 6), (7, 8, 7)))
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path, **config_json(config)) == config


def compressed_tensors(**changes: Any) -> dict[str, Any]:
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
        "group_size": None,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"weights": weights, "input_activations": activations, "output_activations": None, "targets": ["Linear"]}
    details = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {**group, **changes.pop("group", {})}},
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
    return {**details, **changes}


def test_compressed_tensors(tmp_path: Path) -> None:
    assert load(tmp_path, quantization_config=compressed_tensors()).scheme == "w8a8"
    gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(32)]
    assert load(tmp_path, quantization_config=compressed_tensors(ignore=["lm_head", *gates])).scheme == "w8a8"
    for changes, words in (
        ({"format": "marlin-24"}, "marlin-24. is not read; int-quantized, naive-quantized, pack-quantized are"),
        ({"group": {"format": "pack-quantized"}}, "is not read.*one of them throughout"),
        ({"config_groups": {}}, "must be one group"),
        ({"ignore": ["re:.*gate"]}, "ignore lacks lm_head"),
        ({"ignore": ["lm_head", *gates[:-1]]}, "lacks model.layers.31.block_sparse_moe.gate"),
        (
            {"ignore": ["lm_head", "re:.*gate", "model.layers.3.self_attn.q_proj"]},
            "holds model.layers.3.self_attn.q_proj",
        ),
        ({"ignore": ["re:("]}, "bad pattern"),
        ({"group": {"input_activations": {"num_bits": 4}}}, "input_activations.num_bits is 4; only 8"),
        ({"group": {"weights": None}}, "weights.num_bits is null; only 8"),
        ({"group": {"targets": ["re:.*"]}}, "targets"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ):
        with pytest.raises(EightfoldError, match=words):
            load(tmp_path, quantization_config=compressed_tensors(**changes))


def test_scheme_from_the_description_beside_quantized_weights(tmp_path: Path) -> None:
    description = tmp_path / "quant_model_description_w8a8_dynamic.json"
    for kind, scheme in (("W8A8_DYNAMIC", "w8a8"), ("W8A16", "w8a16"), ("FLOAT", "dense")):
        description.write_text(json.dumps({"model_quant_type": kind}))
        assert load(tmp_path).scheme == scheme
    for content, words in (
        (
            {"model_quant_type": "W4A8_DYNAMIC"},
            r"model_quant_type is .W4A8_DYNAMIC.; W8A8_DYNAMIC, W8A16 and FLOAT are",
        ),
        ({"model_quant_type": "W8A16", "a.weight": "W8A8"}, r"a\.weight is .W8A8.; "),
        ({"model_quant_type": "W8A16", "a.weight": "W8A8_DYNAMIC"}, r"a\.weight is .* in a model of W8A16"),
        ({"model_quant_type": "W8A16", "group_size": 64}, "group_size is 64"),
        ({"model_quant_type": "W8A16", "kv_quant_type": "C8"}, "kv_quant_type is .C8."),
    ):
        description.write_text(json.dumps(content))
        with pytest.raises(EightfoldError, match=words):
            load(tmp_path)


def test_places_that_tell_the_scheme_must_agree(tmp_path: Path) -> None:
    (tmp_path / "quant_model_description.json").write_text(json.dumps({"model_quant_type": "W8A8_DYNAMIC"}))
    block = compressed_tensors()
    assert load(tmp_path, quantize="w8a8_dynamic", quantization_config=block).scheme == "w8a8"
    with pytest.raises(EightfoldError, match=r"config\.json: quantize says w8a16 but .*model_quant_type says w8a8"):
        load(tmp_path, quantize="w8a16")
    weight_only = compressed_tensors(format="naive-quantized", group={"input_activations": None})
    with pytest.raises(EightfoldError, match=r"quantization_config says w8a16 but .* says w8a8"):
        load(tmp_path, quantization_config=weight_only)
    (tmp_path / "quant_model_description.json").unlink()
    assert load(tmp_path, quantization_config=weight_only).scheme == "w8a16"


def test_params_json(tmp_path: Path) -> None:
    config = load(tmp_path, "params.json", PARAMS)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (6144, 16384, 56)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (48, 8, 128, 32768)
    assert (config.num_experts, config.experts_per_token, config.max_position_embeddings) == (8, 2, 65536)
    assert config.rope == RopeConfig(1e6, interleaved=True)
    assert (config.bos_token_id, config.eos_token_ids, config.rms_norm_eps) == (1, (2,), 1e-5)
    without = load(tmp_path, "params.json", PARAMS, rope_theta=ABSENT, max_seq_len=ABSENT)
    assert (without.rope.theta, without.max_position_embeddings) == (1e6, 32768)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": ABSENT}, "no moe: this is a dense model"),
        ({"moe": {"num_experts": 8}}, "lacks moe.num_experts_per_tok"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "route_every_n": 2}}, "moe.route_every_n is 2"),
        ({"n_kv_heads": ABSENT, "dim": ABSENT}, "lacks dim, n_kv_heads"),
        ({"n_kv_heads": 7}, "params.json: n_kv_heads is 7; it must be a divisor"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"yarn": {"factor": 4}}, "yarn"),
        ({"vision_encoder": {"dim": 1}}, "vision_encoder"),
    ],
)
def test_params_json_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EightfoldError, match=words):
        load(tmp_path, "params.json", PARAMS, **changes)


def test_the_weights_that_are_there_decide_which_config_is_read(tmp_path: Path) -> None:
    load(tmp_path, "params.json", PARAMS)
    assert load(tmp_path).hidden_size == 4096
    (tmp_path / "consolidated.safetensors").touch()
    assert load_model_config(tmp_path).hidden_size == 6144
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert load_model_config(tmp_path).rope.interleaved is False


def test_config_json_cannot_say_interleaved(tmp_path: Path) -> None:
    with pytest.raises(EightfoldError, match="Mistral's own layout"):
        config_json(load(tmp_path, "params.json", PARAMS))

"""What config.json and params.json may say: which keys are read, which are harmless, which are refused.

Every key is either honoured (read by `config.py`), known not to change what the model computes, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from eightfold.types import EightfoldError
from eightfold.weight_files import in_words


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


READ = _words("""
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim num_local_experts num_experts num_experts_per_tok rms_norm_eps
    max_position_embeddings original_max_position_embeddings rope_theta rope_scaling rope_parameters sliding_window
    layer_types tie_word_embeddings hidden_act bos_token_id eos_token_id dtype torch_dtype quantize
    quantization_config
""")

# Training, bookkeeping, outputs of transformers' own classes, and its old place for generation settings.
HARMLESS = _words("""
    transformers_version name_or_path auto_map use_cache cache_implementation attn_implementation
    experts_implementation use_flash_attn tokenizer_class chat_template model_max_length license base_model
    initializer_range attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop dropout classifier_dropout
    output_router_logits router_aux_loss_coef router_z_loss_coef router_jitter_noise gradient_checkpointing
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript use_bfloat16
    id2label label2id num_labels problem_type finetuning_task task_specific_params chunk_size_feed_forward
    pretraining_tp tie_encoder_decoder pad_token_id unk_token_id sep_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences prefix max_batch_size unsloth_version
    unsloth_fixed transformers.js_config
""")

# Keys of other models, with the value that makes them change nothing; null, false and empty are fine for any key.
NEUTRAL: dict[str, object] = {
    "partial_rotary_factor": 1,
    "rotary_pct": 1,
    "logit_scale": 1,
    "logits_scaling": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "routed_scaling_factor": 1,
    "n_shared_experts": 0,
    "num_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "causal": True,
    "is_causal": True,
}

# Mistral's names in params.json for the keys of config.json.
MISTRAL_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
_MISTRAL_SAME = ("head_dim", "vocab_size", "rope_theta", "sliding_window", "max_position_embeddings")
_MISTRAL_CONTEXT = 32768  # Mixtral 8x7B's, whose params.json does not say

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_ORIGINAL = "original_max_position_embeddings"

# Kind of rope scaling → the numbers that it needs, and those that it may have.
ROPE_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}


class Keys:
    """The keys of one config file, named as in config.json; a bad value is an EightfoldError that names file and key.

    `names` maps a key to what the file itself calls it. A null counts as absent.
    """

    def __init__(self, file: str, raw: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
        self.file = file
        self.raw = {key: value for key, value in raw.items() if value is not None}
        self._nulls = {key for key, value in raw.items() if value is None}
        self._names = names or {}

    def fail(self, key: str, right: str) -> EightfoldError:
        name = self._names.get(key, key)
        return EightfoldError(f"{self.file}: {name} is {in_words(self.raw.get(key))}; it must be {right}")

    def is_null(self, key: str) -> bool:
        """Whether the file gives the key, as null."""
        return key in self._nulls

    def require(self, keys: Iterable[str]) -> None:
        missing = [self._names.get(key, key) for key in keys if key not in self.raw]
        if missing:
            raise EightfoldError(f"{self.file} lacks {', '.join(missing)}")

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(key, f"a whole number from {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.fail(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def ids(self, key: str, default: int) -> tuple[int, ...]:
        """Token ids: a number or a list of them; none where the file says null."""
        value = [] if self.is_null(key) else self.raw.get(key, default)
        values = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in values):
            raise self.fail(key, "a token id or a list of them")
        return tuple(values)

    def sequences(self, key: str, default: int) -> tuple[tuple[int, ...], ...]:
        """Sequences of token ids: a number is a sequence of one, a list holds numbers and lists of them."""
        value = [] if self.is_null(key) else self.raw.get(key, default)
        values = value if isinstance(value, list) else [value]
        found = [one if isinstance(one, list) else [one] for one in values]
        if not all(one and all(type(token) is int and token >= 0 for token in one) for one in found):
            raise self.fail(key, "a token id, or a list of them and of their sequences")
        return tuple(map(tuple, found))


def hugging_face_keys(file: str, raw: dict[str, Any]) -> Keys:
    """Checked for what it is and for unknown keys. Raises EightfoldError unless this is a Mixtral config."""
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    wrong_class = classes if isinstance(classes, list) and "MixtralForCausalLM" not in classes else None
    if kind not in ("mixtral", None) or wrong_class or not (kind or classes):
        what = " ".join(str(x) for x in (kind, *(wrong_class or ())) if x)
        raise EightfoldError(
            f"{file}: this is {what or 'a model that does not say what it is'}; Mixtral is needed here "
            "(model_type mixtral, architectures MixtralForCausalLM)"
        )
    raw = dict(raw)
    alias = raw.get("num_experts")
    if alias is not None and raw.setdefault("num_local_experts", alias) != alias:
        raise EightfoldError(f"{file}: num_experts and num_local_experts disagree; give one of them")
    for key, value in raw.items():
        if key not in READ and key not in HARMLESS and not key.startswith("_"):
            refuse_unless_neutral(file, key, value)
    keys = Keys(file, raw)
    keys.require(_REQUIRED)
    return keys


def mistral_keys(file: str, raw: dict[str, Any]) -> Keys:
    """params.json in config.json's terms. Raises EightfoldError on a dense model and on unknown keys."""
    moe = raw.get("moe")
    if not isinstance(moe, dict):
        raise EightfoldError(f"{file} has no moe: this is a dense model; Mixtral (a mixture of experts) is needed here")
    result: dict[str, Any] = {"max_position_embeddings": _MISTRAL_CONTEXT}
    for key, value in raw.items():
        if key in MISTRAL_KEYS or key in _MISTRAL_SAME:
            result[MISTRAL_KEYS.get(key, key)] = value
        elif key not in ("moe", "model_type", "max_batch_size"):
            refuse_unless_neutral(file, key, value)
    for key, value in moe.items():
        if key in ("num_experts", "num_experts_per_tok"):
            result["num_local_experts" if key == "num_experts" else key] = value
        else:
            refuse_unless_neutral(file, f"moe.{key}", value)
    names = {ours: key for key, ours in MISTRAL_KEYS.items() if key in raw or ours not in raw}
    names |= {"num_local_experts": "moe.num_experts", "num_experts_per_tok": "moe.num_experts_per_tok"}
    keys = Keys(file, result, names)
    keys.require((*_REQUIRED, "num_key_value_heads", "num_local_experts", "num_experts_per_tok"))
    return keys


def refuse_unless_neutral(file: str, key: str, value: object) -> None:
    """Raises EightfoldError unless `value` is known to change nothing, whatever the key means."""
    neutral = NEUTRAL.get(key)
    if value is None or value is False or value in ("", [], {}) or (neutral is not None and value == neutral):
        return
    right = "null or absent" if neutral is None else f"{in_words(neutral)} or absent"
    raise EightfoldError(
        f"{file}: {key} is {in_words(value)}, which may change what the model computes and is not known here; "
        f"it must be {right}"
    )


def rope_values(keys: Keys, context: int) -> tuple[float, str, tuple[tuple[str, Any], ...]]:
    """→ theta, kind and the kind's numbers, from the old keys (rope_theta, rope_scaling) or the new (rope_parameters).

    `context` is max_position_embeddings, from which yarn and llama3 take what the file leaves out.
    """
    given = _rope_dict(keys)
    theta = given.number("rope_theta", 1e6)
    kind = given.raw.get("rope_type", given.raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise EightfoldError(
            f"{given.file}: rope scaling {in_words(kind)} is not implemented; there are {', '.join(ROPE_KINDS)}"
        )
    needed, allowed = ROPE_KINDS[kind]
    if _ORIGINAL in needed:
        original = keys.whole(_ORIGINAL, context)
        if given.raw.setdefault(_ORIGINAL, original) != original and _ORIGINAL in keys.raw:
            raise given.fail(_ORIGINAL, f"{original}, as beside it")
    if kind == "yarn" and given.is_null("factor"):
        given.raw["factor"] = context / given.whole(_ORIGINAL)
    given.require(needed)
    values: dict[str, Any] = {
        name: given.whole(name) if name == _ORIGINAL else given.number(name)
        for name in (*needed, *allowed)
        if name in given.raw
    }
    if kind == "yarn":
        values["truncate"] = given.flag("truncate", True)
    for key, value in given.raw.items():
        if key not in values and key not in ("rope_theta", "rope_type", "type", "finetuned"):
            refuse_unless_neutral(given.file, key, value)
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise given.fail("high_freq_factor", f"above low_freq_factor {values['low_freq_factor']}")
    return theta, kind, tuple(values.items())


def _rope_dict(keys: Keys) -> Keys:
    """rope_parameters or rope_scaling with rope_theta among them; where both places speak they must agree."""
    old, new = keys.raw.get("rope_scaling", {}), keys.raw.get("rope_parameters", {})
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise keys.fail(key, "an object or null")
    if old and new and old != {key: value for key, value in new.items() if key in old}:
        raise EightfoldError(f"{keys.file}: rope_scaling and rope_parameters disagree; give one of them")
    merged = {**old, **new}
    theta = keys.raw.get("rope_theta")
    if theta is not None and merged.setdefault("rope_theta", theta) != theta:
        raise EightfoldError(f"{keys.file}: rope_theta is given twice, and differently")
    if merged.get("type") and merged.get("rope_type") and merged["type"] != merged["rope_type"]:
        raise EightfoldError(f"{keys.file}: type and rope_type of the rope scaling disagree; give one of them")
    return Keys(f"{keys.file}: {'rope_parameters' if new else 'rope_scaling' if old else 'rope'}", merged)

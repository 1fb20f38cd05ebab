"""What a folder says of the quantization of its weights, read and written; no torch here.

There are three places, which must agree where more than one speaks: `quantize` in config.json (MindIE),
`quantization_config` in config.json (compressed-tensors, as vLLM and transformers read it), and the description file
that lies beside MindIE's weights, tensor name → "FLOAT", "W8A8_DYNAMIC" or "W8A16".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eightfold.config_file import Keys, refuse_unless_neutral
from eightfold.types import EightfoldError
from eightfold.weight_files import in_words, read_json


class _Names(NamedTuple):
    """What others call a scheme: config.json's `quantize`, a description's kind, compressed-tensors' format."""

    key: str
    kind: str
    format: str


_NAMES = {
    "w8a8": _Names("w8a8_dynamic", "W8A8_DYNAMIC", "int-quantized"),
    "w8a16": _Names("w8a16", "W8A16", "naive-quantized"),
}
DESCRIPTIONS = (
    "quant_model_description.json",
    *(f"quant_model_description_{names.key}.json" for names in _NAMES.values()),
)
W4A16_GROUPS = (128, 64, 32)  # inputs that may share a scale; the first is the usual one
_W4A16_CHANNEL = "w4a16-channel"
_FLOAT = "FLOAT"
_KIND = "model_quant_type"
_READ_FORMATS = ("int-quantized", "naive-quantized")  # both: int8 [out, in] and scales, as they are
_PACKED_FORMAT = "pack-quantized"  # int4, eight in an int32
_IGNORED = ("lm_head", r"re:.*\.gate$")

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def quantize_key(scheme: str) -> str:
    """What config.json's `quantize` and the names of MindIE's weight files call a scheme; its own name, without the
    group, where MindIE knows none."""
    return _NAMES[scheme].key if scheme in _NAMES else scheme.partition("-")[0]


def schemes_by_key() -> dict[str, str]:
    """Scheme by what users call it: its own name, or config.json's."""
    return {name: scheme for scheme, names in _NAMES.items() for name in (names.key, scheme)} | {"w4a16": "w4a16"}


def w4a16_name(group: int | None) -> str:
    """The full name of int4 weights with groups of so many inputs; None is one group a row."""
    return _W4A16_CHANNEL if group is None else f"w4a16-g{group}"


def w4a16_group(scheme: str) -> int | None:
    """The group that a w4a16 scheme's name tells, the usual one if it tells none; None is one group a row. Raises
    EightfoldError if it is no such name."""
    names: dict[str, int | None] = {w4a16_name(group): group for group in W4A16_GROUPS}
    names |= {"w4a16": W4A16_GROUPS[0], _W4A16_CHANNEL: None}
    if scheme not in names:
        raise EightfoldError(f"quantization scheme {scheme!r} is not known; of int4 there are {', '.join(names)}")
    return names[scheme]


def group_columns(scheme: str, columns: int) -> int:
    """Where the columns of a matrix with so many may be cut: at multiples of this."""
    if not scheme.startswith("w4a16"):
        return 1
    group = w4a16_group(scheme)
    return 8 if group in (None, columns) else group or 8


def quantization_keys(scheme: str) -> dict[str, Any]:
    """What config.json says of weights in a scheme, to MindIE and to compressed-tensors; nothing if they are dense."""
    if scheme == "dense":
        return {}
    if scheme.startswith("w4a16"):
        return {"quantization_config": _block(_PACKED_FORMAT, _packed_weights(w4a16_group(scheme)), None)}
    activations = {**_ACTIVATIONS, "group_size": None} if scheme == "w8a8" else None
    block = _block(_NAMES[scheme].format, {**_WEIGHTS, "group_size": None}, activations)
    return {"quantize": _NAMES[scheme].key, "quantization_config": block}


def _block(form: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "format": form,  # without it compressed-tensors expects packed weights where activations are float
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(_IGNORED),
        "kv_cache_scheme": None,
    }


def _packed_weights(group: int | None) -> dict[str, Any]:
    return {**_PACKED, "strategy": "group" if group else "channel", "group_size": group, "actorder": None}


def description(scheme: str, floats: Iterable[str], quantized: Iterable[str]) -> dict[str, Any] | None:
    """MindIE's quant_model_description.json for tensors of these names; None where it has no such scheme."""
    if scheme not in _NAMES:
        return None
    kind = _NAMES[scheme].kind
    head = {_KIND: kind, "version": "1.0.0", "group_size": 0}
    return {**head, **dict.fromkeys(floats, _FLOAT), **dict.fromkeys(quantized, kind)}


class Description(NamedTuple):
    """A description file: its name, the scheme of its model_quant_type, and of each tensor whether it is quantized."""

    file: str
    scheme: str | None
    quantized: Mapping[str, bool]


def read_description(folder: Path) -> Description | None:
    """The description beside a folder's weights, if there is one. Raises EightfoldError on a kind that is not read."""
    for file in DESCRIPTIONS:
        if not (folder / file).is_file():
            continue
        raw = read_json(folder / file)
        for key in ("group_size", "kv_quant_type", "kv_cache_type", "fa_quant_type", "reduce_quant_type"):
            if raw.get(key, 0) != 0:
                refuse_unless_neutral(file, key, raw[key])
        kinds = {names.kind: scheme for scheme, names in _NAMES.items()}
        main = raw.get(_KIND)
        entries = {name: kind for name, kind in raw.items() if "." in name and isinstance(kind, str)}
        for key, kind in {_KIND: main, **entries}.items():
            if kind not in (None, _FLOAT, *kinds):
                raise EightfoldError(f"{file}: {key} is {in_words(kind)}; {', '.join(kinds)} and {_FLOAT} are read")
            if kind in kinds and main in kinds and kind != main:
                raise EightfoldError(f"{file}: {key} is {in_words(kind)} in a model of {main}; only one kind is read")
        quantized = {name: kind != _FLOAT for name, kind in entries.items()}
        return Description(file, "dense" if main == _FLOAT else kinds.get(str(main)), quantized)
    return None


def scheme_of(keys: Keys, layers: int, experts: int, folder: Path) -> str:
    """The quantization scheme of a folder's weights, "dense" where nothing says otherwise.

    Raises EightfoldError on a method that is not read, and where two places disagree.
    """
    said: dict[str, str] = {}
    schemes = {names.key: scheme for scheme, names in _NAMES.items()}
    if (key := keys.text("quantize")) is not None:
        if key not in schemes:
            raise keys.fail("quantize", f"one of {', '.join(schemes)}, or absent for float weights")
        said[f"{keys.file}: quantize"] = schemes[key]
    if (block := _block_scheme(keys, layers, experts)) is not None:
        said[f"{keys.file}: quantization_config"] = block
    beside = read_description(folder)
    if beside is not None and beside.scheme is not None:
        said[f"{beside.file}: {_KIND}"] = beside.scheme
    if len(set(said.values())) > 1:
        (first, a), (second, b) = list(said.items())[:: len(said) - 1]
        raise EightfoldError(f"{first} says {a} but {second} says {b}; the weights can have one scheme only")
    return next(iter(said.values()), "dense")


def _block_scheme(keys: Keys, layers: int, experts: int) -> str | None:
    """The scheme that config.json's quantization_config describes, or None where it describes none."""
    details = keys.raw.get("quantization_config", {})
    if not isinstance(details, dict):
        raise keys.fail("quantization_config", "an object or null")
    method = details.get("quant_method")
    if method is None:
        for key, value in details.items():
            if value != 0:
                refuse_unless_neutral(keys.file, f"quantization_config.{key}", value)
        return None
    if method != "compressed-tensors":
        raise EightfoldError(
            f"{keys.file}: quantization method {in_words(method)} is not read here; supported are compressed-tensors "
            f"int8 (weights per channel, activations per token or float) and int4 ({_PACKED_FORMAT}), and MindIE's "
            f"{', '.join(_keys())}"
        )
    return _compressed_tensors_scheme(f"{keys.file}: quantization_config", details, layers, experts)


def _keys() -> list[str]:
    return [f'"quantize": "{names.key}"' for names in _NAMES.values()]


def _compressed_tensors_scheme(file: str, details: Mapping[str, Any], layers: int, experts: int) -> str:
    """The scheme, if this is int8 weights per output channel, with dynamic int8 activations per token or float ones, or
    packed int4 weights with float activations."""
    groups = details.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise EightfoldError(f"{file}: config_groups must be one group; mixed schemes are not read")
    group = next(iter(groups.values()))
    if not isinstance(group, dict):
        raise EightfoldError(f"{file}: its group is {in_words(group)}, not an object")
    forms = (details.get("format"), group.get("format") or details.get("format"))
    packed = forms == (_PACKED_FORMAT, _PACKED_FORMAT)
    for form in forms:
        if form not in _READ_FORMATS and not packed:
            known = ", ".join((*_READ_FORMATS, _PACKED_FORMAT))
            raise EightfoldError(f"{file}: format {in_words(form)} is not read; {known} are, one of them throughout")
    weights, activations = group.get("weights"), group.get("input_activations")
    _check_numbers(file, "weights", weights, _PACKED if packed else _WEIGHTS)
    if packed:
        refuse_unless_neutral(file, "input_activations", activations)
    elif activations is not None:
        _check_numbers(file, "input_activations", activations, _ACTIVATIONS)
    if group.get("targets") != ["Linear"]:
        raise EightfoldError(f'{file}: targets are {in_words(group.get("targets"))}; only ["Linear"] is read here')
    sparsity = details.get("sparsity_config") or {}
    for key in ("kv_cache_scheme", "transform_config"):
        refuse_unless_neutral(file, key, details.get(key))
    refuse_unless_neutral(file, "output_activations", group.get("output_activations"))
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise EightfoldError(f"{file}: sparsity_config is {in_words(sparsity)}; only dense weights are read here")
    _check_ignored(file, details.get("ignore") or [], layers, experts)
    if packed and isinstance(weights, dict):
        return w4a16_name(_group_size(file, weights))
    return "w8a16" if activations is None else "w8a8"


def _group_size(file: str, weights: Mapping[str, Any]) -> int | None:
    """How many inputs share a scale; None if all of a row do."""
    strategy, group, order = weights.get("strategy"), weights.get("group_size"), weights.get("actorder")
    if order not in (None, False, "weight", "static"):  # these order the search for the numbers, not the numbers
        raise EightfoldError(
            f"{file}: weights.actorder is {in_words(order)}; only groups of neighbouring inputs are read (null, weight)"
        )
    if strategy == "channel" and group in (None, -1):
        return None
    if strategy != "group" or group not in W4A16_GROUPS:
        known = ", ".join(map(str, W4A16_GROUPS))
        raise EightfoldError(
            f"{file}: weights.strategy is {in_words(strategy)} and group_size {in_words(group)}; read here are the "
            f"strategy group with a size of {known}, and channel without one"
        )
    return int(group)


def _check_numbers(file: str, part: str, found: object, rules: Mapping[str, object]) -> None:
    for key, right in rules.items():
        value = found.get(key) if isinstance(found, dict) else None
        if value != right:
            raise EightfoldError(f"{file}: {part}.{key} is {in_words(value)}; only {in_words(right)} is read here")


def _check_ignored(file: str, ignored: object, layers: int, experts: int) -> None:
    """Raises EightfoldError unless exactly lm_head and the gates of all layers stay float."""
    if not isinstance(ignored, list) or not all(isinstance(entry, str) for entry in ignored):
        raise EightfoldError(f"{file}: ignore is {in_words(ignored)}; it must be a list of strings")
    exact = {entry for entry in ignored if not entry.startswith("re:")}
    try:
        patterns = [re.compile(entry[3:]) for entry in ignored if entry.startswith("re:")]
    except re.error as error:
        raise EightfoldError(f"{file}: ignore holds a bad pattern: {error}") from None

    def is_ignored(name: str) -> bool:
        spellings = (name, name.replace("block_sparse_moe", "mlp"))
        return any(spelling in exact or any(p.match(spelling) for p in patterns) for spelling in spellings)

    if not is_ignored("lm_head"):
        raise EightfoldError(f"{file}: ignore lacks lm_head; a quantized lm_head is not read here")
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        if not is_ignored(f"{prefix}.block_sparse_moe.gate"):
            raise EightfoldError(
                f"{file}: ignore lacks {prefix}.block_sparse_moe.gate; a quantized gate is not read here"
            )
        names = [f"self_attn.{x}_proj" for x in "qkvo"]
        names += [f"block_sparse_moe.experts.{e}.w{i}" for e in range(experts) for i in (1, 2, 3)]
        for name in names:
            if is_ignored(f"{prefix}.{name}"):
                raise EightfoldError(f"{file}: ignore holds {prefix}.{name}; only lm_head and gates may stay float")

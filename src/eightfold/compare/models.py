"""Two folders opened side by side, and whether they can be compared at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eightfold.checkpoint import Checkpoint
from eightfold.compare.texts import PASSAGE
from eightfold.config import ModelConfig, load_model_config
from eightfold.hub import resolve
from eightfold.model import stored_tensors
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError

# What says how or by whom a model is stored and used, and not what it computes.
FREE = ("scheme", "torch_dtype", "bos_token_id", "eos_token_ids", "max_position_embeddings", "tie_word_embeddings")


@dataclass(frozen=True, slots=True)
class Model:
    """A folder whose weights are mapped and checked by name, shape and dtype; none has been read."""

    name: str  # as the user calls it
    folder: Path
    config: ModelConfig
    checkpoint: Checkpoint


def open_model(name: str, allow_pickle: bool) -> Model:
    """Raises EightfoldError if there is no such folder, or its files are not a whole model."""
    folder = resolve(name)
    config = load_model_config(folder)
    checkpoint = Checkpoint.open(folder, config, allow_pickle)
    checkpoint.check(stored_tensors(config))
    return Model(name, folder, config, checkpoint)


def check_alike(a: Model, b: Model) -> None:
    """Raises EightfoldError, with the first difference, unless both have the same architecture and vocabulary size.

    The layout of rotated weights may differ: it is a matter of the order in which they are stored.
    """
    for field in ModelConfig.__dataclass_fields__:
        values: list[Any] = [getattr(model.config, field) for model in (a, b)]
        if field == "rope":
            values = [replace(rope, interleaved=False) for rope in values]
        if field not in FREE and values[0] != values[1]:
            raise EightfoldError(
                f"these two can't be compared: {field} is {values[0]} in {a.name} and {values[1]} in {b.name}"
            )


def shared_tokenizer(a: Model, b: Model) -> Tokenizer | None:
    """A's tokenizer, or B's where A has none; None if neither has one.

    Raises EightfoldError where both have one and they differ, or it has more tokens than the models.
    """
    tokenizers = [Tokenizer.load(model.folder) for model in (a, b) if _has_tokenizer(model.folder)]
    if not tokenizers:
        return None
    tokenizer = tokenizers[0]
    if tokenizer.vocab_size > a.config.vocab_size:
        raise EightfoldError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the models only {a.config.vocab_size}; "
            "they do not belong together"
        )
    if len(tokenizers) == 2 and (difference := _difference(tokenizers)):
        raise EightfoldError(f"the tokenizers of {a.name} and {b.name} differ: {difference}")
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tekken.json").is_file() or any(
        path.is_file() for pattern in ("tokenizer.json", "tokenizer.model*") for path in folder.glob(pattern)
    )


def _difference(tokenizers: Sequence[Tokenizer]) -> str | None:
    a, b = tokenizers
    if a.vocab_size != b.vocab_size:
        return f"{a.vocab_size} and {b.vocab_size} tokens"
    for token in range(a.vocab_size):
        if a.token_bytes(token) != b.token_bytes(token):
            return f"token {token} is {a.token_text(token)!r} and {b.token_text(token)!r}"
    for text in ("", PASSAGE):
        ids = [one.encode(text) for one in tokenizers]
        if ids[0] != ids[1]:
            at = next((n for n, (x, y) in enumerate(zip(*ids, strict=False)) if x != y), min(map(len, ids)))
            return f"{text[:20]!r}… becomes {ids[0][: at + 1]} and {ids[1][: at + 1]}"
    return None

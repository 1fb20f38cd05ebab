"""Which files of a model folder hold its weights, and JSON files read with one clear error. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from eightfold.types import EightfoldError


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights of a folder: `files` all hold tensors, named as `layout` names them.

    `layout` is "hf" (Hugging Face) or "mistral" (Mistral's consolidated files); `index` maps tensors to files.
    """

    layout: str
    pickled: bool
    files: tuple[Path, ...]
    index: Path | None = None


# The first kind of which a folder has a file is the one that is read. A single file goes before an index, as in
# transformers; MindIE's files before an index, since a quantized folder may have one of that name for other readers;
# Mistral's own files come after Hugging Face's, and pickles last.
_KINDS = (
    ("hf", False, r"model\.safetensors", None),
    ("hf", False, r"quant_model_weight\w*(-\d+-of-\d+)?\.safetensors", "quant_model_weight*.index.json"),
    ("hf", False, r"model-\d+-of-\d+\.safetensors", "model.safetensors.index.json"),
    ("mistral", False, r"consolidated([.-]\d+(-of-\d+)?)?\.safetensors", "consolidated*.index.json"),
    ("hf", True, r"pytorch_model\.bin", None),
    ("hf", True, r"pytorch_model-\d+-of-\d+\.bin", "pytorch_model.bin.index.json"),
    ("mistral", True, r"consolidated(\.\d+)?\.pth?", None),
)


def find_weights(folder: Path) -> WeightFiles | None:
    """The files of `folder` that hold weights, or None; only names are looked at. EightfoldError if unreadable."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise EightfoldError(f"cannot read {folder}: {error.strerror}") from None
    for layout, pickled, pattern, index_pattern in _KINDS:
        files = tuple(folder / name for name in names if re.fullmatch(pattern, name))
        indexes = sorted(folder.glob(index_pattern)) if index_pattern else []
        if files or indexes:
            return WeightFiles(layout, pickled, files, indexes[0] if indexes else None)
    return None


def read_index(index: Path) -> dict[str, Path]:
    """A `*.index.json` → file by tensor name. Raises EightfoldError when it is malformed or names an absent file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise EightfoldError(f"{index} has no weight_map: it does not say which file holds which tensor")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name:
            raise EightfoldError(
                f"{index} places tensor {tensor!r} in {name!r}; a file name in its own folder is needed"
            )
    absent = sorted({name for name in weight_map.values() if not (index.parent / name).is_file()})
    if absent:
        more = f" ({len(absent)} files are absent)" if len(absent) > 1 else ""
        raise EightfoldError(f"{index.parent / absent[0]} is absent, though {index.name} lists it{more}")
    return {tensor: index.parent / name for tensor, name in weight_map.items()}


def check_complete(files: tuple[Path, ...]) -> None:
    """Raises EightfoldError when files numbered `…-i-of-n` are not all there; needed only where no index tells."""
    numbers = [re.search(r"-(\d+)-of-(\d+)\.", path.name) for path in files]
    found = {int(number[1]) for number in numbers if number}
    total = max((int(number[2]) for number in numbers if number), default=0)
    for missing in sorted(set(range(1, total + 1)) - found):
        raise EightfoldError(
            f"{files[0].parent} lacks file {missing} of {total} of its weights (such as {files[0].name})"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises EightfoldError when the file is absent, unreadable or holds something else."""
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        raise EightfoldError(f"no such file: {path}") from None
    except OSError as error:
        raise EightfoldError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise EightfoldError(f"{path} is not valid: {one_line(error)}") from None


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`; raises ValueError or RecursionError on anything else, also on a key given twice."""
    value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def one_line(error: object, limit: int = 200) -> str:
    """An error's text, on one line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def in_words(value: object) -> str:
    """A value from a file, short enough for an error line."""
    return one_line(json.dumps(value), 80)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} is given twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

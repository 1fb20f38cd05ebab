"""Prompts out of data sets, in the files and the form in which `eightfold eval` puts them to a model. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from eightfold.data_files import data_folders, read_jsonl
from eightfold.types import EightfoldError


@dataclass(frozen=True, slots=True)
class _DataSet:
    """Its file, the texts that a line of it must have, and the prompt that they make."""

    file: str
    keys: tuple[str, ...]
    prompt: Callable[[Mapping[str, str]], str]


DATASETS: Mapping[str, _DataSet] = {
    "boolq": _DataSet(
        "dev.jsonl",
        ("title", "passage", "question"),
        lambda row: f"{row['title']} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:",
    ),
    "gsm8k": _DataSet("GSM8K.jsonl", ("question",), lambda row: row["question"]),
    "humaneval": _DataSet("human-eval.jsonl", ("prompt",), lambda row: row["prompt"]),
    "customize": _DataSet("customize.jsonl", ("question",), lambda row: row["question"]),
}


def check_name(name: str) -> None:
    """Raises EightfoldError on a data set that isn't known, with the nearest that is."""
    if name not in DATASETS:
        near = get_close_matches(name.lower(), DATASETS, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise EightfoldError(f"--dataset {name!r} is not known; {hint}there are {', '.join(DATASETS)}")


def read_dataset(name: str, data: str | None) -> Iterator[tuple[str, str]]:
    """(where it stands, prompt) of each item of a data set, in the order of its file.

    `data` is a folder with a folder of that name, the data set's own folder, or its file; None looks into
    tests/modeltest/data/NAME, data/NAME and NAME under the current folder. Raises EightfoldError, naming where it
    looked, or the file and line that can't be used.
    """
    check_name(name)
    known, path = DATASETS[name], find_file(name, data)
    for number, row in read_jsonl(path, dict.fromkeys(known.keys, str)):
        yield f"{path}:{number}", known.prompt(row)


def find_file(name: str, data: str | None) -> Path:
    """The file of a data set. Raises EightfoldError that names where it looked."""
    known = DATASETS[name]
    if data is not None and Path(data).is_file():
        return Path(data)
    folders = data_folders(name, data)
    for folder in folders:
        found = [folder / known.file] if (folder / known.file).is_file() else sorted(folder.glob("*.jsonl"))
        if len(found) == 1:
            return found[0]
        if found:
            raise EightfoldError(
                f"{folder} holds {len(found)} files *.jsonl and none is {known.file}: name one by --data"
            )
    looked = ", ".join(map(str, folders))
    raise EightfoldError(f"no data for {name}: none of {looked} holds {known.file}; say where it is with --data")

"""Text files that people bring, data sets and prompts, and those that they get, tables and results. No torch here."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eightfold.types import EightfoldError

REFERENCE = Path("tests") / "modeltest" / "data"  # where users of the reference system keep their data sets

Kinds = Mapping[str, type | tuple[type, ...]]


def data_folders(name: str, given: str | None) -> list[Path]:
    """Where data set `name` may lie: `given` is a folder with a folder of that name, or its own; None is the places
    under the current folder. Raises EightfoldError if `given` is absent."""
    if given is None:
        return [REFERENCE / name, Path("data") / name, Path(name)]
    if not Path(given).is_dir():
        raise EightfoldError(f"--data {given}: there is no such file or folder")
    return [Path(given) / name, Path(given)]


def read_text(path: Path) -> str:
    """All of a UTF-8 file, without a byte order mark. Raises EightfoldError, with the line, if that can't be read."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise EightfoldError(f"cannot read {path}: {error.strerror}") from None


def decode(data: bytes, name: str) -> str:
    """UTF-8, without a byte order mark. Raises EightfoldError, with `name` and line, on anything else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise EightfoldError(f"{name}:{line} is not text in UTF-8 (byte {error.object[error.start]:#04x})") from None


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of each line that isn't blank. splitlines would also split at characters inside JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def read_jsonl(path: Path, kinds: Kinds) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each line that isn't blank. Raises EightfoldError on a row without a key of `kinds`, or
    with another type there, and on a file without a row."""
    number = 0
    for number, line in numbered_lines(read_text(path)):
        yield number, check_row(parse_json(line, f"{path}:{number}"), kinds, f"{path}:{number}")
    if not number:
        raise EightfoldError(f"{path} holds no item")


def parse_json(text: str, where: str) -> Any:
    """Raises EightfoldError, with `where`, on text that is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EightfoldError(f"{where} is not valid JSON: {error}") from None


def check_row(row: Any, kinds: Kinds, where: str) -> dict[str, Any]:
    """The row, if it has every key of `kinds` with its type. Raises EightfoldError that says what is missing."""
    if not isinstance(row, dict):
        raise EightfoldError(f"{where} holds a {type(row).__name__}; an object with {', '.join(kinds)} is needed")
    for key, kind in kinds.items():
        if key not in row:
            raise EightfoldError(f"{where} has no {key!r}; it has {', '.join(map(str, row)) or 'nothing'}")
        if not isinstance(row[key], kind) or (isinstance(row[key], bool) and kind is not bool):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise EightfoldError(f"{where}: {key!r} is {row[key]!r:.60}; it must be of type {names}")
    return row


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """The file in UTF-8, whole or not at all. Raises EightfoldError if it can't be written."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        temporary.replace(path)
    except OSError as error:
        raise EightfoldError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # what a full disk or an interruption has left
            temporary.unlink()

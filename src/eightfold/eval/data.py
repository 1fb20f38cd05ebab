"""Data files: where they are, and their rows, each error with file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eightfold.data_files import data_folders, parse_json, read_text
from eightfold.types import EightfoldError


def find_data(name: str, patterns: Sequence[str], given: str | None) -> Path:
    """The folder (or the one file) that holds data set `name`.

    `given` is a folder with a folder of that name, the data set's own folder, or one of its files; None looks into
    tests/modeltest/data/NAME, data/NAME and NAME under the current folder. A folder holds the data set if a file in it
    matches one of `patterns`. Raises EightfoldError, naming where it looked.
    """
    if given is not None and Path(given).is_file():
        if not any(Path(given).match(pattern) for pattern in patterns):
            raise EightfoldError(f"{given} is no file of {name}; it has files such as {' or '.join(patterns)}")
        return Path(given)
    tried = data_folders(name, given)
    for folder in tried:
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return folder
    wanted = " or ".join(patterns)
    raise EightfoldError(
        f"no data for {name}: none of {', '.join(map(str, tried))} holds {wanted}; say where with --data"
    )


def files_in(place: Path, pattern: str) -> list[Path]:
    """The file itself, or the files of a folder that match, by name."""
    return [place] if place.is_file() else sorted(place.glob(pattern))


def read_json(path: Path) -> Any:
    return parse_json(read_text(path), str(path))


def read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row that isn't blank; the number is that of the row's last line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise EightfoldError(f"{path}:{reader.line_num} is not valid CSV: {error}") from None


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row by column name) of a CSV with a header. Raises EightfoldError if it lacks one of `columns`."""
    rows = read_csv(path)
    first = next(rows, None)
    if first is None:
        raise EightfoldError(f"{path} is empty")
    header = first[1]
    missing = [column for column in columns if column not in header]
    if missing:
        raise EightfoldError(f"{path}:1 has no column {missing[0]!r}; it has {', '.join(header)}")
    for number, row in rows:
        if len(row) != len(header):
            raise EightfoldError(f"{path}:{number} has {len(row)} cells; the header has {len(header)}")
        yield number, dict(zip(header, row, strict=True))


def need_file(path: Path, what: str) -> Path:
    """The path, if it is a file. Raises EightfoldError that says what it should hold."""
    if not path.is_file():
        raise EightfoldError(f"{path} is missing: it holds {what}")
    return path


def choose_subjects(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of `known` that are wanted, all if none are named. Raises EightfoldError on a name that isn't known."""
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise EightfoldError(f"there is no subject {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if name in wanted or not wanted]

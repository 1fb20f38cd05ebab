"""The records of a run: one line of JSON for each finished item, so that an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from eightfold.data_files import write_text
from eightfold.eval.task import Record
from eightfold.types import EightfoldError


class Records:
    """The records file of one data set. Its first line holds the settings that decide about answers; a file that was
    written under others is refused unless `overwrite`. `done` are the finished items by key."""

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Raises EightfoldError if the file belongs to other settings, or isn't one of ours."""
        self.path = path
        self.done: dict[str, Record] = {}
        settings = json.loads(json.dumps(settings))  # as it will be read again
        lines = [] if overwrite else self._lines()
        if lines:
            _compare(path, lines[0].get("settings"), settings)
        try:
            for line in lines[1:]:
                record = Record(**line)
                self.done[record.key] = record
        except TypeError:
            raise EightfoldError(f"{path} is not a records file of eightfold eval; choose another --output") from None
        self._settings = settings
        self._file: IO[str] | None = None  # nothing is written before there is something to keep

    def add(self, record: Record) -> None:
        """Keep a finished item, at once. Raises EightfoldError if the file can't be written."""
        with _writing(self.path):
            file = self._file = self._file or self._begin()
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
        self.done[record.key] = record

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _begin(self) -> IO[str]:
        """The file with what it has so far, written anew, so that a line which an interruption cut short is gone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [{"settings": self._settings}, *(asdict(record) for record in self.done.values())]
        write_text(self.path, "".join(json.dumps(one) + "\n" for one in kept))
        return self.path.open("a", encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = []
        with _writing(self.path):
            text = self.path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n")[:-1]:  # what an interruption cut short has no line break after it
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise EightfoldError(f"{self.path} is not a records file of eightfold eval; choose another --output")
            found.append(value)
        return found


def _compare(path: Path, theirs: Any, ours: Mapping[str, Any]) -> None:
    if not isinstance(theirs, dict):
        raise EightfoldError(f"{path} is not a records file of eightfold eval; choose another --output")
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            raise EightfoldError(
                f"{path} holds results of another run ({name}: {theirs.get(name)!r:.60} there, {ours.get(name)!r:.60} "
                "now): choose another --output, or add --overwrite"
            )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EightfoldError(f"cannot write {path}: {error.strerror}") from None

"""The records of a run: one line of JSON for each finished item, so that an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eightfold.eval.task import Record
from eightfold.types import EightfoldError


class Records:
    """The records file of one data set. Its first line holds the settings that decide about answers; a file that was
    written under others is refused unless `overwrite`. `done` are the finished items by key."""

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Raises EightfoldError if the file belongs to other settings, isn't one of ours, or can't be written."""
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
        # Written anew, so that a line which an interruption cut short is gone.
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            kept = [{"settings": settings}, *(asdict(record) for record in self.done.values())]
            temporary.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Keep a finished item, at once."""
        with _writing(self.path):
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
        self.done[record.key] = record

    def close(self) -> None:
        self._file.close()

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

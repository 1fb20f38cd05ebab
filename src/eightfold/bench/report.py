"""Results as people and programs read them: medians with their range, a text table, JSON."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eightfold.data_files import write_text
from eightfold.types import EightfoldError


class Spread(NamedTuple):
    """The median of some samples, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples))

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """As in "12.3 (11.9–12.8)"."""
        middle, low, high = (f"{value * scale:.{digits}f}" for value in self)
        return middle if low == high else f"{middle} ({low}–{high})"

    def rounded(self, scale: float = 1.0, figures: int = 3) -> str:
        """As `text`, with so many significant figures of the median (whole numbers keep theirs)."""
        size = abs(self.median * scale)
        return self.text(max(0, figures - 1 - math.floor(math.log10(size))) if size else 0, scale)

    def percent(self) -> str:
        return self.text(0, 100) + " %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(_cells(line, widths)).rstrip() for line in lines)


def _cells(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def check_outputs(*paths: str | None) -> None:
    """Raises EightfoldError if one of these files can't be written: better now than after minutes of measuring."""
    for name in filter(None, paths):
        path = Path(name)
        target = path if path.exists() else path.parent
        if path.is_dir():
            raise EightfoldError(f"{path} is a folder; the name of a file to write is needed")
        if not target.exists():
            raise EightfoldError(f"cannot write {path}: there is no folder {path.parent}")
        if not os.access(target, os.W_OK):
            raise EightfoldError(f"cannot write {path}: no permission")


def write_json(path: str, value: Any) -> None:
    """Raises EightfoldError if the file can't be written."""
    write_text(Path(path), json.dumps(value, indent=1, allow_nan=False) + "\n")


def probe_line(readings: Sequence[dict[str, float]]) -> str:
    """The probes of a run, in one line."""
    parts = []
    for key in readings[0]:
        name, _, unit = key.rpartition("_")
        spread = Spread.of([reading[key] for reading in readings])
        parts.append(f"{name} {spread.text(1 if unit == 'gbs' else 0)} {'GB/s' if unit == 'gbs' else 'GOP/s'}")
    return f"probes ({len(readings)} readings): " + ", ".join(parts)

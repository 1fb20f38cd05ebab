"""From records to numbers: shares with their confidence intervals, tables, CSV and JSON files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.data_files import csv_text, write_text
from eightfold.eval.task import Record, Task
from eightfold.types import EightfoldError

Z = 1.959963984540054  # of the normal distribution, for 95 %
RESULT_COLUMNS = ("file_name", "value", "correct", "sum")
DEBUG_COLUMNS = ("key", "queries", "input_token_ids", "output_token_ids", "test_result", "golden_result", "pass")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. `scores` are means by name, the one that counts first; `low` and `high` are the 95 %
    confidence interval of that one; `correct` is its sum, the number of right answers where an answer is right or
    wrong."""

    name: str
    items: int
    correct: float
    scores: dict[str, float]
    low: float
    high: float


def wilson(correct: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (E. B. Wilson, 1927). With (0, 0) nothing is known: from 0 to 1."""
    if not count:
        return 0.0, 1.0
    share, z2 = correct / count, Z * Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval where each value is 0 or 1; else mean ± 1.96 standard errors, within 0 and 1."""
    count, total = len(values), math.fsum(values)
    if all(value in (0, 1) for value in values) or count < 2:
        return wilson(total, count)
    mean = total / count
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return max(0.0, mean - Z * error), min(1.0, mean + Z * error)


def summarize(task: Task, records: Sequence[Record]) -> list[Row]:
    """The total, then a row for each category, then for each subject, in the order of the records.

    The total is over items, or the mean over subjects where the data set is scored so; its interval then comes from the
    subjects' own standard errors. A category is always the mean over its subjects.
    """
    subjects: dict[str, list[Record]] = {}
    for record in records:
        subjects.setdefault(record.subject, []).append(record)
    rows = {name: _over_items(name, part) for name, part in subjects.items()}
    members: dict[str, list[str]] = {}
    for name in rows:
        for category in task.categories(name):
            members.setdefault(category, []).append(name)
    macro = task.total == "macro"
    total = _over_subjects("total", list(subjects.values())) if macro else _over_items("total", records)
    categories = [_over_subjects(name, [subjects[one] for one in part]) for name, part in members.items()]
    return [total, *categories, *rows.values()]


def _over_items(name: str, records: Sequence[Record]) -> Row:
    first = [next(iter(record.scores.values())) for record in records]
    scores = {key: _mean([record.scores[key] for record in records]) for key in (records[0].scores if records else ())}
    return Row(name, len(records), math.fsum(first), scores, *interval(first))


def _over_subjects(name: str, groups: Sequence[Sequence[Record]]) -> Row:
    parts = [_over_items(name, group) for group in groups]
    scores = {key: _mean([part.scores[key] for part in parts]) for key in (parts[0].scores if parts else ())}
    mean = next(iter(scores.values()), 0.0)
    # From those of its subjects, by G. Zou and A. Donner (2008): errors below add up as squares, and so do those above.
    means = [next(iter(part.scores.values())) for part in parts]
    below = math.sqrt(math.fsum((one - part.low) ** 2 for one, part in zip(means, parts, strict=True)))
    above = math.sqrt(math.fsum((part.high - one) ** 2 for one, part in zip(means, parts, strict=True)))
    items, correct = sum(part.items for part in parts), math.fsum(part.correct for part in parts)
    count = len(parts) or 1
    return Row(name, items, correct, scores, max(0.0, mean - below / count), min(1.0, mean + above / count))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def table(task: Task, rows: Sequence[Row], others: int = 60) -> str:
    """The rows as text; of very many subjects only the first `others`."""
    names = list(rows[0].scores)
    shown = rows[: others + 1] if len(rows) > 2 else rows[:1]  # one subject is the total
    width = max(len(task.title), *(len(row.name) for row in shown))
    lines = [f"{task.title:{width}}  items  " + "  ".join(f"{name:>8}" for name in names) + "  95 % of the first"]
    for row in shown:
        values = "  ".join(f"{100 * row.scores[name]:6.2f} %" for name in names)
        lines.append(f"{row.name:{width}}  {row.items:5}  {values}  {100 * row.low:.2f}–{100 * row.high:.2f}")
    if len(rows) > 2 and len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown)} more, in the result file")
    return "\n".join(lines)


def write_results(folder: Path, task: Task, records: Sequence[Record], settings: dict[str, Any]) -> list[Row]:
    """Write TASK_result.csv, TASK_debug.csv and TASK_result.json into `folder` → the rows. Each file is there whole or
    not at all. Raises EightfoldError where it can't be written."""
    rows = summarize(task, records)
    write_text(folder / f"{task.name}_result.csv", csv_text(RESULT_COLUMNS, map(result_cells, rows)))
    write_text(folder / f"{task.name}_debug.csv", csv_text(DEBUG_COLUMNS, map(debug_cells, records)))
    named = [
        {"name": row.name, "items": row.items, "correct": row.correct, **row.scores, "interval_95": [row.low, row.high]}
        for row in rows
    ]
    content = {
        "task": task.name,
        "settings": settings,
        "shortened_prompts": sum(record.shortened > 0 for record in records),
        "total": named[0],
        "rows": named[1:],
    }
    write_text(folder / f"{task.name}_result.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return rows


def check_writable(folder: Path) -> None:
    """Make the folder if need be. Raises EightfoldError if it can't be made, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EightfoldError(f"cannot write {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EightfoldError(f"cannot write {folder}: no permission")


def result_cells(row: Row) -> tuple[Any, ...]:
    """A row under RESULT_COLUMNS."""
    return row.name, next(iter(row.scores.values()), 0.0), f"{row.correct:g}", row.items


def debug_cells(record: Record) -> tuple[Any, ...]:
    """A record under DEBUG_COLUMNS."""
    queries = record.queries if isinstance(record.queries, str) else json.dumps(record.queries, ensure_ascii=False)
    ids = json.dumps(record.input_token_ids), json.dumps(record.output_token_ids)
    return record.key, queries, *ids, record.test_result, record.golden_result, record.passed

"""Problems whose answer is a number, read off the end of what was generated: GSM8K, AIME2024."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eightfold.data_files import read_jsonl
from eightfold.eval.data import choose_subjects, files_in
from eightfold.eval.task import Answer, Generate, Item, LoadOptions, Query, Task, Verdict
from eightfold.types import EightfoldError

TOLERANCE = 1e-4
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def last_number(text: str) -> float | None:
    """The last number that a text spells, with or without commas between thousands; None if there is none.

    A minus sign counts where it can't be a subtraction: "7-3" ends with 3, "is -3" with -3.
    """
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    match = found[-1]
    digits = match[0].replace(",", "")
    before = text[: match.start()].rstrip(" ")[-1:]
    subtraction = digits.startswith("-") and (before.isalnum() and text[match.start() - 1 : match.start()] != " ")
    return float(digits[1:] if subtraction else digits)


def _text(number: float) -> str:
    """With all its digits, so that reading it again gives the same number; 18, not 18.0."""
    return repr(number).removesuffix(".0")


class LastNumber(Task):
    """What the number tasks share: the raw question, and the last number of the answer against the gold's last."""

    files = ("*.jsonl",)
    question: str
    kinds: dict[str, Any]

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        paths = {path.name: path for path in files_in(folder, "*.jsonl")}
        items = []
        for subject in choose_subjects(list(paths), options.subjects):
            for number, row in read_jsonl(paths[subject], self.kinds):
                where = f"{paths[subject]}:{number}"
                gold = last_number(str(row["answer"]))
                if gold is None:
                    raise EightfoldError(f"{where}: the answer {row['answer']!r:.40} holds no number")
                items.append(Item(f"{subject}:{number}", subject, _text(gold), {"prompt": row[self.question]}))
        return items

    def queries(self, item: Item) -> Sequence[Query]:
        return (Generate(item.data["prompt"], self.max_tokens),)

    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        said = last_number(answers[0].text)
        right = said is not None and abs(said - float(item.golden)) <= TOLERANCE
        return Verdict("" if said is None else _text(said), {"accuracy": float(right)})


class Gsm8k(LastNumber):
    """Files *.jsonl of question and answer, which ends with the number."""

    name, title = "gsm8k", "GSM8K"
    question = "question"
    kinds: dict[str, Any] = {"question": str, "answer": str}  # noqa: RUF012


class Aime2024(LastNumber):
    """Files *.jsonl of problem and answer, a whole number."""

    name, title = "aime2024", "AIME2024"
    question = "problem"
    kinds: dict[str, Any] = {"problem": str, "answer": (str, int)}  # noqa: RUF012

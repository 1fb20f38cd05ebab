"""Multiple choice with examples: MMLU, CEval, CMMLU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eightfold.eval.cmmlu_subjects import CATEGORIES, CHINESE_NAMES
from eightfold.eval.data import choose_subjects, need_file, read_csv, read_json, read_table
from eightfold.eval.task import Answer, Compare, Generate, Item, LoadOptions, Query, Task, Verdict
from eightfold.types import EightfoldError

LETTERS = "ABCD"
OUTPUT = 20  # tokens: the letter is the first character that is no space

Row = list[str]  # question, four choices, the letter of the right one


class FewShot(Task):
    """What MMLU and CEval share: examples of the subject before the question, answers read off the generated text."""

    default_shots = 5
    max_tokens = OUTPUT

    def queries(self, item: Item) -> Sequence[Query]:
        return (Generate(item.data["prompt"], self.max_tokens),)

    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        said = answers[0].text.lstrip()[:1]
        return Verdict(said, {"accuracy": float(said == item.golden)})

    def _items(self, subject: str, examples: list[Row], test: Sequence[tuple[int, Row]], shots: int) -> Iterator[Item]:
        start = ""
        if shots:
            topic = "".join(f" {word}" for word in subject.split("_"))  # with the space before it, two in a row
            start = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
            start += "".join(f"{_asked(row)} {row[5]}\n\n" for row in examples[:shots])
        for number, row in test:
            yield Item(f"{subject}:{number}", subject, row[5], {"prompt": start + _asked(row)})


class Mmlu(FewShot):
    """Files dev/{subject}_dev.csv and test/{subject}_test.csv, without header; the subjects from
    subject_mapping.json's `mmlu_all_sets`, or else all that test/ has."""

    name, title = "mmlu", "MMLU"
    files = ("test/*_test.csv",)

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        _is_folder(folder, self.name)
        known = _mapped(folder, "mmlu_all_sets") or _named(folder / "test", "_test.csv")
        shots = _shots(options, self.default_shots)
        items: list[Item] = []
        for subject in choose_subjects(known, options.subjects):
            test = [
                (n, _row(row, f"{folder}/test/{subject}_test.csv:{n}"))
                for n, row in read_csv(need_file(folder / "test" / f"{subject}_test.csv", "the questions"))
            ]
            dev = folder / "dev" / f"{subject}_dev.csv"
            rows = read_csv(need_file(dev, "the examples")) if shots else iter(())
            examples = [_row(row, f"{dev}:{n}") for n, row in rows]
            _enough(examples, shots, dev)
            items += self._items(subject, examples, test, shots)
        return items


class CEval(FewShot):
    """Files dev/{subject}_dev.csv and val/{subject}_val.csv with a header (id, question, A to D, answer, …); the
    subjects from subject_mapping.json, or else all that val/ has. Its categories are the mapping's."""

    name, title = "ceval", "CEval"
    files = ("val/*_val.csv",)

    def __init__(self) -> None:
        self._categories: dict[str, str] = {}

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        _is_folder(folder, self.name)
        self._categories = _ceval_categories(folder)
        known = _mapped(folder, "ceval_all_sets") or _named(folder / "val", "_val.csv")
        shots = _shots(options, self.default_shots)
        items: list[Item] = []
        for subject in choose_subjects(known, options.subjects):
            test = list(_table(need_file(folder / "val" / f"{subject}_val.csv", "the questions")))
            dev = folder / "dev" / f"{subject}_dev.csv"
            examples = [row for _, row in _table(need_file(dev, "the examples"))] if shots else []
            _enough(examples, shots, dev)
            items += self._items(subject, examples, test, shots)
        return items

    def categories(self, subject: str) -> Sequence[str]:
        return (self._categories[subject],) if subject in self._categories else ()


class Cmmlu(Task):
    """Files dev/{subject}.csv and test/{subject}.csv with a header (Question, A to D, Answer). The likeliest of the
    four letters counts; the total is the mean over subjects."""

    name, title, files = "cmmlu", "CMMLU", ("test/*.csv",)
    takes_max_tokens = False
    default_shots = 5
    total = "macro"

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        _is_folder(folder, self.name)
        shots = _shots(options, self.default_shots)
        items: list[Item] = []
        for subject in choose_subjects(_named(folder / "test", ".csv"), options.subjects):
            if subject not in CHINESE_NAMES:
                raise EightfoldError(f"{folder}/test/{subject}.csv is not one of CMMLU's {len(CHINESE_NAMES)} subjects")
            start = f"以下是关于{CHINESE_NAMES[subject]}的单项选择题，请直接给出正确答案的选项。\n\n"
            dev = folder / "dev" / f"{subject}.csv"
            names = ("Question", "Answer")
            examples = [row for _, row in _table(need_file(dev, "the examples"), *names)] if shots else []
            _enough(examples, shots, dev)
            start += "".join(f"{_asked_in_chinese(row)}{row[5]}\n\n" for row in examples[:shots])
            for number, row in _table(folder / "test" / f"{subject}.csv", *names):
                data = {"prompt": start + _asked_in_chinese(row)}
                items.append(Item(f"{subject}:{number}", subject, row[5], data))
        return items

    def queries(self, item: Item) -> Sequence[Query]:
        return (Compare(item.data["prompt"], tuple(LETTERS)),)

    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        values = answers[0].logprobs
        said = LETTERS[values.index(max(values))]
        return Verdict(said, {"accuracy": float(said == item.golden)})

    def categories(self, subject: str) -> Sequence[str]:
        return CATEGORIES[subject]


def _asked(row: Row) -> str:
    return row[0] + "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True)) + "\nAnswer:"


def _asked_in_chinese(row: Row) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"题目：{row[0]}{choices}\n答案是："


def _row(cells: Row, where: str) -> Row:
    if len(cells) != 6:
        raise EightfoldError(f"{where} has {len(cells)} cells; 6 are needed: question, A, B, C, D, answer")
    if cells[5].strip() not in tuple(LETTERS):
        raise EightfoldError(f"{where}: the answer is {cells[5]!r:.40}; it must be one of A, B, C, D")
    return [*cells[:5], cells[5].strip()]


def _table(path: Path, question: str = "question", answer: str = "answer") -> Iterator[tuple[int, Row]]:
    for number, row in read_table(path, (question, *LETTERS, answer)):
        yield number, _row([row[name] for name in (question, *LETTERS, answer)], f"{path}:{number}")


def _mapped(folder: Path, key: str) -> list[str]:
    """The subjects of subject_mapping.json, a list or an object under `key` or at its top; none where it is absent."""
    path = folder / "subject_mapping.json"
    if not path.is_file():
        return []
    content: Any = read_json(path)
    subjects = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(subjects, (dict, list)) or not all(isinstance(name, str) for name in subjects):
        raise EightfoldError(f"{path} holds no subjects: a list or an object of them is needed, under {key!r}")
    return list(subjects)


def _ceval_categories(folder: Path) -> dict[str, str]:
    path = folder / "subject_mapping.json"
    content: Any = read_json(path) if path.is_file() else {}
    content = content.get("ceval_all_sets", content) if isinstance(content, dict) else {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: entry[2] for name, entry in entries if isinstance(entry, list) and len(entry) == 3}


def _named(folder: Path, ending: str) -> list[str]:
    return sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))


def _shots(options: LoadOptions, default: int) -> int:
    return default if options.shots is None else options.shots


def _enough(examples: Sequence[Row], shots: int, path: Path) -> None:
    if len(examples) < shots:
        raise EightfoldError(f"--shots {shots}: {path} has only {len(examples)} examples")


def _is_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise EightfoldError(f"{folder} is a file; {name} needs the folder of its files")

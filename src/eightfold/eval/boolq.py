"""BoolQ: yes or no about a passage, by which of the two tokens is the likelier after one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eightfold.data_files import read_jsonl
from eightfold.eval.data import choose_subjects, files_in
from eightfold.eval.task import Answer, Compare, Item, LoadOptions, Query, Task, Verdict


class BoolQ(Task):
    """Files *.jsonl of title, question, passage, and answer (true or false)."""

    name, title, files = "boolq", "BoolQ", ("*.jsonl",)
    takes_max_tokens = False

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        kinds = {"title": str, "question": str, "passage": str, "answer": bool}
        paths = {path.name: path for path in files_in(folder, "*.jsonl")}
        return [
            Item(f"{subject}:{number}", subject, "yes" if row["answer"] else "no", row)
            for subject in choose_subjects(list(paths), options.subjects)
            for number, row in read_jsonl(paths[subject], kinds)
        ]

    def queries(self, item: Item) -> Sequence[Query]:
        row = item.data
        prompt = f"{row['title']} -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return (Compare(prompt, (": yes", ": no")),)

    def beginning(self, item: Item) -> object:
        return item.data["title"], item.data["passage"]

    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        yes, no = answers[0].logprobs
        said = "yes" if yes > no else "no"
        return Verdict(said, {"accuracy": float(said == item.golden)})

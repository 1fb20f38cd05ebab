"""HumanEval: functions completed by the model and run against the data set's tests, in a process of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eightfold.data_files import read_jsonl
from eightfold.eval.data import choose_subjects, files_in
from eightfold.eval.sandbox import run_program
from eightfold.eval.task import Answer, Generate, Item, LoadOptions, Query, Task, Verdict
from eightfold.types import EightfoldError

SECONDS = 3.0


def completion(text: str) -> str:
    """What was generated up to the first line that is not indented, where the function has ended."""
    kept = []
    for line in text.split("\n"):
        if line.strip() and not line.startswith((" ", "\t")):
            break
        kept.append(line)
    return "\n".join(kept)


class HumanEval(Task):
    """Files *.jsonl of task_id, prompt, entry_point and test."""

    name, title, files = "humaneval", "HumanEval", ("*.jsonl",)

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        if not options.allow_code_execution:
            raise EightfoldError(
                "humaneval runs code that the model has written, in a process with limits but as this user: if that is "
                "acceptable on this machine, add --allow-code-execution"
            )
        kinds = {"task_id": str, "prompt": str, "entry_point": str, "test": str}
        paths = {path.name: path for path in files_in(folder, "*.jsonl")}
        return [
            Item(f"{subject}:{row['task_id']}", subject, "passed", row)
            for subject in choose_subjects(list(paths), options.subjects)
            for _, row in read_jsonl(paths[subject], kinds)
        ]

    def queries(self, item: Item) -> Sequence[Query]:
        return (Generate(item.data["prompt"].strip(), self.max_tokens),)

    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        row = item.data
        function = row["prompt"].strip() + completion(answers[0].text)
        outcome = run_program(f"{function}\n\n{row['test']}\n\ncheck({row['entry_point']})\n", SECONDS)
        return Verdict(outcome, {"pass@1": float(outcome == "passed")})

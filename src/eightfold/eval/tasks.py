"""The data sets by name."""

from __future__ import annotations

from difflib import get_close_matches

from eightfold.eval.boolq import BoolQ
from eightfold.eval.choices import CEval, Cmmlu, Mmlu
from eightfold.eval.humaneval import HumanEval
from eightfold.eval.longbench import LongBench, LongBenchE
from eightfold.eval.needlebench import NeedleBench
from eightfold.eval.numbers import Aime2024, Gsm8k
from eightfold.eval.task import Task
from eightfold.eval.truthfulqa import TruthfulQA
from eightfold.types import EightfoldError

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(BoolQ, Mmlu, CEval, Cmmlu, Gsm8k, HumanEval),
        *(TruthfulQA, LongBench, LongBenchE, NeedleBench, Aime2024),
    )
}


def get_tasks(names: str) -> list[Task]:
    """The data sets of a list with commas between, each once; case doesn't matter, nor - or _.

    Raises EightfoldError on a name that isn't known, with the nearest that is.
    """
    known = {_plain(name): task for name, task in TASKS.items()}
    chosen: dict[str, Task] = {}
    for word in names.split(","):
        plain = _plain(word)
        if plain not in known:
            near = get_close_matches(plain, known, 1)
            hint = f"did you mean {known[near[0]].name}?" if near else f"there are {', '.join(TASKS)}"
            raise EightfoldError(f"there is no task {word.strip()!r}; {hint}")
        chosen.setdefault(plain, known[plain]())
    return list(chosen.values())


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "")

"""One data set through the engine: what is not finished yet is asked, scored and kept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from eightfold.eval.ask import Engines, Prompting, ask
from eightfold.eval.records import Records
from eightfold.eval.task import Answer, Item, Query, Record, Task
from eightfold.types import EightfoldError, Progress

NAMED_FAILURES = 5  # broken weights fail every item, and one reason is enough


def data_fingerprint(items: Iterable[Item]) -> str:
    """A number that changes whenever an item does."""
    total = hashlib.sha256()
    for item in items:
        total.update(json.dumps([item.key, item.golden, item.data], default=str, sort_keys=True).encode())
    return total.hexdigest()[:16]


def first_of_each(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each subject; all of them without a limit."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.subject] += 1
        if limit is None or seen[item.subject] <= limit:
            kept.append(item)
    return kept


def neighbours(items: Sequence[Item], beginning: Callable[[Item], object]) -> list[Item]:
    """The items in their order, but each of those with an equal beginning right behind the first of them."""
    groups: dict[object, list[Item]] = {}
    for number, item in enumerate(items):
        what = beginning(item)
        groups.setdefault(("alone", number) if what is None else ("shared", what), []).append(item)
    return [item for group in groups.values() for item in group]


def evaluate(
    engine: Engines,
    task: Task,
    items: Sequence[Item],
    prompting: Prompting,
    records: Records,
    progress: Progress | None = None,
    failed: Callable[[str], None] = lambda message: None,
) -> list[Record]:
    """Ask and score the items that `records` lacks → the records of all of `items` that could be answered, in order.

    `progress` hears (finished, in all); `failed` hears of each item whose request failed in the middle, which leaves no
    record. Raises EightfoldError if an item can't be asked at all, or has another one's key.
    """
    twice = next((key for key, number in Counter(item.key for item in items).items() if number > 1), None)
    if twice is not None:
        raise EightfoldError(f"{task.name}: {twice} stands in the data twice")
    todo = neighbours([item for item in items if item.key not in records.done], task.beginning)
    finished = len(items) - len(todo)
    if progress:
        progress(finished, len(items))
    for item, queries, answers in _answered(engine, task, todo, prompting):
        error = next((answer.error for answer in answers if answer.error), None)
        if error is not None:
            failed(f"{task.name} {item.key}: {error}")
        else:
            records.add(_record(task, item, queries, answers))
        finished += 1
        if progress:
            progress(finished, len(items))
    return [records.done[item.key] for item in items if item.key in records.done]


def _answered(
    engine: Engines, task: Task, items: Sequence[Item], prompting: Prompting
) -> Iterator[tuple[Item, Sequence[Query], list[Answer]]]:
    """Each item with its queries and all its answers, once the last of them is there."""
    pending: dict[int, tuple[Item, Sequence[Query], dict[int, Answer]]] = {}

    def queries() -> Iterator[tuple[tuple[int, int], Query]]:
        for number, item in enumerate(items):
            asked = task.queries(item)
            pending[number] = item, asked, {}
            for index, query in enumerate(asked):
                yield (number, index), query

    for (number, index), answer in ask(engine, queries(), prompting):
        item, asked, answers = pending[number]
        answers[index] = answer
        if len(answers) == len(asked):
            del pending[number]
            yield item, asked, [answers[each] for each in range(len(asked))]


def _record(task: Task, item: Item, queries: Sequence[Query], answers: Sequence[Answer]) -> Record:
    verdict = task.score(item, answers)
    prompts = [query.prompt for query in queries]
    single = len(prompts) == 1
    return Record(
        key=item.key,
        subject=item.subject,
        queries=prompts[0] if len(set(prompts)) == 1 else prompts,
        input_token_ids=answers[0].prompt_token_ids if single else [answer.prompt_token_ids for answer in answers],
        output_token_ids=answers[0].token_ids if single else [answer.token_ids for answer in answers],
        test_result=verdict.result,
        golden_result=item.golden,
        passed=next(iter(verdict.scores.values())) == 1,
        scores=verdict.scores,
        shortened=sum(answer.shortened for answer in answers),
    )

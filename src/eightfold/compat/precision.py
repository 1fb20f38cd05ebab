"""modeltest's data sets, scored as `eightfold eval` scores them."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eightfold.compat.console import CaseError, complain, note
from eightfold.compat.environment import Environment
from eightfold.compat.modeltest import Places, engine_options
from eightfold.compat.modeltest_grammar import DATASETS, ModelTest
from eightfold.compat.tables import write_csv
from eightfold.config import EngineConfig, load_model_config
from eightfold.eval.ask import Prompting
from eightfold.eval.data import find_data
from eightfold.eval.evaluate import NAMED_FAILURES, data_fingerprint, evaluate
from eightfold.eval.records import Records
from eightfold.eval.results import DEBUG_COLUMNS, RESULT_COLUMNS, debug_cells, result_cells, summarize, table
from eightfold.eval.settings import run_settings
from eightfold.eval.task import Item, LoadOptions, Record, Task
from eightfold.eval.tasks import get_tasks
from eightfold.hub import resolve
from eightfold.llm import LLM
from eightfold.loader import load_tokenizer
from eightfold.types import EightfoldError


def run_precision(test: ModelTest, environment: Environment, places: Places) -> None:
    """Score the data set once for each batch, print the table, write result and debug CSV.

    Raises EightfoldError on data that are missing or malformed, before the model is loaded, and CaseError where the
    request of an item failed.
    """
    (task,) = get_tasks(DATASETS[test.dataset])
    options = {**engine_options(test, environment), "max_model_len": test.context}
    items = _load(test, environment, places, task)
    for batch in test.batches[0]:
        name = f"{test.dataset}_pa_batch{batch}_tp{test.layout.world}_full"
        records = _records(places.data / f"{name}.jsonl", items, test, options)
        failures: list[str] = []
        with LLM(**options, max_num_seqs=batch) as llm:
            done = _evaluate(llm, task, items, test, records, failures)
        for failure in failures[:NAMED_FAILURES]:
            complain(failure, 1)
        if done:
            _write(name, task, done, test, places)
        if failures:
            raise CaseError(
                f"{len(failures)} of {len(items)} items of {test.dataset} failed"
                + ("; the others are in the results" if done else ", so there are no results")
            )
        records.path.unlink(missing_ok=True)  # an interrupted run goes on from it; this one is complete


def _load(test: ModelTest, environment: Environment, places: Places, task: Task) -> list[Item]:
    """All items, checked."""
    if test.dataset == "HumanEval" and not environment.allow_code_execution:
        raise EightfoldError(
            "full_HumanEval runs code that the model has written, in a process with limits but as this user: if that "
            "is acceptable on this machine, set EIGHTFOLD_ALLOW_CODE_EXECUTION=1"
        )
    folder = places.datasets / task.name
    if not folder.is_dir():
        raise EightfoldError(
            f"no data for {test.dataset}: there is no folder {folder}; it holds {' or '.join(task.files)}"
        )
    config = EngineConfig(model=test.weights)
    model = load_model_config(resolve(test.weights))
    load = LoadOptions(
        shots=test.shots,
        context=test.context or model.max_position_embeddings,
        tokenizer=load_tokenizer(config, resolve(test.weights), model),
        allow_code_execution=environment.allow_code_execution,
    )
    items = task.load(find_data(task.name, task.files, str(folder)), load)
    if test.needle_length is not None:
        items = [item for item in items if item.subject.endswith(f"-{test.needle_length}")]
    if not items:
        raise EightfoldError(
            f"{folder} holds no item that can be scored" + f" at {test.needle_length}" * bool(test.needle_length)
        )
    return items


def _records(path: Path, items: list[Item], test: ModelTest, options: dict[str, Any]) -> Records:
    """Where finished items are kept. An interrupted run of the same test goes on; anything else there is replaced."""
    settings = run_settings(options, chat=test.chat, shots=test.shots, data=data_fingerprint(items))
    with suppress(EightfoldError):
        records = Records(path, settings)
        if records.done:
            note(f"{len(records.done)} items were finished before an interruption; {path} has them")
        return records
    return Records(path, settings, overwrite=True)


def _evaluate(
    llm: LLM, task: Task, items: list[Item], test: ModelTest, records: Records, failures: list[str]
) -> list[Record]:
    prompting = Prompting(task.max_input or sys.maxsize, test.chat)
    with tqdm(desc=test.dataset, unit="item", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            return evaluate(llm.engine, task, items, prompting, records, progress, failures.append)
        finally:
            records.close()


def _write(name: str, task: Task, done: list[Record], test: ModelTest, places: Places) -> None:
    rows = summarize(task, done)
    result, debug = places.results / f"{name}_result.csv", places.debug / f"{name}_debug_info.csv"
    write_csv(result, RESULT_COLUMNS, map(result_cells, rows))
    write_csv(debug, DEBUG_COLUMNS, map(debug_cells, done))
    print(table(task, rows))
    shortened = sum(record.shortened > 0 for record in done)
    if shortened:
        note(f"{shortened} prompts were longer than {task.max_input} tokens and lost their middle")
    print(f"{test.model} {test.dataset} result saved in {result}")
    print(f"{test.model} {test.dataset} debug information saved in {debug}", flush=True)

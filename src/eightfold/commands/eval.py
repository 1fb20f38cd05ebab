"""`eightfold eval`: data sets scored through the engine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from eightfold.checkpoint import resolve
from eightfold.commands import console
from eightfold.commands.options import engine_options
from eightfold.config import EngineConfig, load_model_config
from eightfold.eval.ask import Engines, Prompting
from eightfold.eval.data import find_data
from eightfold.eval.evaluate import NAMED_FAILURES, data_fingerprint, evaluate, first_of_each
from eightfold.eval.records import Records
from eightfold.eval.results import check_writable, table, write_results
from eightfold.eval.settings import run_settings
from eightfold.eval.task import Item, LoadOptions, Task
from eightfold.eval.tasks import get_tasks
from eightfold.loader import load_tokenizer
from eightfold.replicas import Replicas
from eightfold.types import EightfoldError


def main(args: argparse.Namespace) -> int:
    """0, or 1 if the request of an item failed in the middle."""
    if (args.task is None) == (args.lm_eval is None):
        raise EightfoldError("give --task with the data sets to score, or --lm-eval with tasks of lm-eval")
    if args.skip_tokenizer_init:
        raise EightfoldError("--skip-tokenizer-init does not go with eval: data sets are text")
    for name in ("shots", "limit", "max_tokens", "max_input_tokens"):
        least = 0 if name == "shots" else 2 if name == "max_input_tokens" else 1
        if (value := getattr(args, name)) is not None and value < least:
            raise EightfoldError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    folder = Path(args.output or Path("eval_results") / (Path(args.model).name or "model"))
    return _lm_eval(args, folder) if args.lm_eval is not None else _tasks(args, folder)


def _tasks(args: argparse.Namespace, folder: Path) -> int:
    tasks = get_tasks(args.task)
    loaded = _load_data(tasks, args)  # everything that may be wrong with it, before the model is loaded
    check_writable(folder)
    settings = run_settings(engine_options(args), chat=args.chat)
    files = {}
    for task, items in loaded:
        prompting = _prompting(task, args)
        own = {
            **settings,
            "shots": task.default_shots if args.shots is None or task.default_shots is None else args.shots,
            "max_tokens": task.max_tokens,
            "max_input": prompting.max_input,
            "data": data_fingerprint(items),
        }
        files[task.name] = Records(folder / f"{task.name}.jsonl", own, args.overwrite), own
    failures: list[str] = []
    with _loaded(args) as engines:
        for task, items in loaded:
            records, own = files[task.name]
            _run(engines, task, first_of_each(items, args.limit), _prompting(task, args), records, own, failures)
    return int(bool(failures))


@contextmanager
def _loaded(args: argparse.Namespace) -> Iterator[Engines]:
    """The engine that answers, or --data-parallel-size of them."""
    if args.data_parallel_size == 1:
        llm, _ = console.load(args)
        with llm:
            yield llm.engine
        return
    console.show_warnings(args)
    with console.progress("Loading", "B", scale=True) as update:
        replicas = Replicas(EngineConfig(**engine_options(args)), args.data_parallel_size, update)
    with closing(replicas):
        yield replicas


def _run(
    engines: Engines,
    task: Task,
    items: list[Item],
    prompting: Prompting,
    records: Records,
    settings: dict[str, Any],
    failures: list[str],
) -> None:
    """Evaluate one data set, write its files, print its table."""
    before = sum(item.key in records.done for item in items)
    start = time.perf_counter()

    def failed(message: str) -> None:
        failures.append(message)
        if len(failures) <= NAMED_FAILURES:
            print("eightfold: error:", message, file=sys.stderr)

    try:
        with console.progress(task.title, "item") as update:
            done = evaluate(engines, task, items, prompting, records, update, failed)
    except KeyboardInterrupt:
        console.note(f"{task.name}: {len(records.done)} items are kept; the same command goes on with the others")
        raise
    finally:
        records.close()
    seconds = time.perf_counter() - start
    if done:
        print(table(task, write_results(records.path.parent, task, done, settings)), flush=True)
    shortened = sum(record.shortened > 0 for record in done)
    parts = [f"{task.name}: {len(done) - before} items in {seconds:.1f} s"]
    parts += [f"{before} finished before"] * bool(before)
    parts += [f"{shortened} prompts shortened to {prompting.max_input} tokens"] * bool(shortened)
    parts += [f"{len(items) - len(done)} failed"] * (len(done) < len(items))
    parts += [f"results in {records.path.parent}" if done else "no results"]
    print(" · ".join(parts), file=sys.stderr)


def _load_data(tasks: list[Task], args: argparse.Namespace) -> list[tuple[Task, list[Item]]]:
    """Each data set with its items, complete and checked."""
    config = EngineConfig(**engine_options(args))
    folder = resolve(config.model)
    model = load_model_config(folder)
    options = LoadOptions(
        shots=args.shots,
        subjects=tuple(name.strip() for name in args.subjects.split(",")) if args.subjects else (),
        context=config.max_model_len or model.max_position_embeddings,
        tokenizer=load_tokenizer(config, folder, model),
        allow_code_execution=args.allow_code_execution,
    )
    names = ", ".join(task.name for task in tasks)
    if args.shots and all(task.default_shots is None for task in tasks):
        raise EightfoldError(f"--shots {args.shots}: there are no examples in {names}")
    if args.max_tokens is not None and not any(task.takes_max_tokens for task in tasks):
        raise EightfoldError(
            f"--max-tokens {args.max_tokens}: nothing is generated, or the data say how much, in {names}"
        )
    loaded = []
    for task in tasks:
        if args.max_tokens is not None and task.takes_max_tokens:
            task.max_tokens = args.max_tokens  # type: ignore[misc]
        loaded.append((task, task.load(find_data(task.name, task.files, args.data), options)))
        if not loaded[-1][1]:
            raise EightfoldError(f"{task.name}: the data hold no item that can be scored")
    return loaded


def _prompting(task: Task, args: argparse.Namespace) -> Prompting:
    most = args.max_input_tokens or task.max_input or sys.maxsize
    return Prompting(most, args.chat, args.chat_template)


def _lm_eval(args: argparse.Namespace, folder: Path) -> int:
    unused = {"subjects": args.subjects, "max-tokens": args.max_tokens, "max-input-tokens": args.max_input_tokens}
    for name, value in unused.items():
        if value is not None:
            raise EightfoldError(f"--{name} does not go with --lm-eval: its tasks say so themselves")
    from eightfold.eval.lm_harness import LmEvalOptions, check_tasks, run_lm_eval

    options = LmEvalOptions(
        tasks=tuple(name.strip() for name in args.lm_eval.split(",")),
        folder=folder,
        task_folder=args.data,
        shots=args.shots,
        limit=args.limit,
        chat=args.chat,
        chat_template=args.chat_template,
        allow_code_execution=args.allow_code_execution,
        overwrite=args.overwrite,
    )
    manager = check_tasks(options)
    check_writable(folder)
    settings = run_settings(engine_options(args), chat=args.chat)
    with _loaded(args) as engines:
        print(run_lm_eval(engines, manager, options, settings), flush=True)
    print(f"results in {folder}", file=sys.stderr)
    return 0

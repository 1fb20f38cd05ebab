"""The options of `eightfold eval` that are its own; those of the engine are the same as for `run`. No torch here."""

from __future__ import annotations

import argparse

EPILOG = """\
tasks:
  boolq, mmlu, ceval, cmmlu, gsm8k, humaneval, truthfulqa, longbench, longbench-e, needlebench, aime2024; several with
  commas between. --data is a folder that has one of the task's name, that folder itself, or one of its files; without
  it, tests/modeltest/data/TASK, data/TASK and TASK under the current folder are looked at.

  eightfold eval demo --task boolq --data dev.jsonl --dtype float32
  eightfold eval MODEL --task mmlu,gsm8k --shots 5 --output results
  eightfold eval MODEL --lm-eval arc_easy,hellaswag     (needs: pip install 'eightfold[lm-eval]')

The table goes to standard output. In the output folder, TASK.jsonl has each finished item (the same command after an
interruption goes on from there), TASK_result.csv and .json the scores, TASK_debug.csv every prompt and answer."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to run, on which data, and where the results go."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--task", metavar="TASK,…", help="data sets to score, see below")
    group.add_argument("--lm-eval", metavar="TASK,…", help="tasks of the package lm-eval to run instead")
    group.add_argument("--data", metavar="DIR", help="where the data lie (lm-eval: a folder of task files)")
    group.add_argument("--output", metavar="DIR", help="where results go (default: eval_results/MODEL)")
    group.add_argument("--overwrite", action="store_true", help="begin anew where results of another run lie")
    group.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's)")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N items of each subject")
    group.add_argument("--subjects", metavar="NAME,…", help="only these subjects or files")
    group.add_argument("--max-tokens", type=int, metavar="N", help="the most tokens of an answer (default: the task's)")
    group.add_argument(
        "--max-input-tokens",
        type=int,
        metavar="N",
        help="the most tokens of a prompt, whose middle goes beyond that (default: 3072; long-document tasks: all)",
    )
    group.add_argument("--chat", action="store_true", help="put prompts as user messages in the chat template")
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        dest="max_num_seqs",
        default=argparse.SUPPRESS,
        help="another name of --max-num-seqs",
    )
    group.add_argument(
        "--data-parallel-size",
        type=int,
        metavar="N",
        default=1,
        help="engines that share out the items, each in a process of its own with its share of the cores: faster where "
        "the model is small (default: 1)",
    )
    group.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run code that the model has written (humaneval; some lm-eval tasks), with limits but as this user",
    )

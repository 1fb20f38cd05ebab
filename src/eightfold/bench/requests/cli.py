"""The options of `eightfold bench requests` that are its own; those of the engine are the same as for `run`."""

from __future__ import annotations

import argparse
from typing import Any

from eightfold.bench.requests.lengths import parse_batches, parse_cases, parse_range
from eightfold.types import EightfoldError

EPILOG = """\
what is sent:
  --cases      random token ids of each input length, answered with exactly so many tokens; each --batch of them at once
  --dataset    prompts of a data set, --batch of them in flight; with --cases cut to the input length (and with
               --padding repeated up to it), without as they are
  --prompt     this text, --batch times at once; the answer is printed
  --max-batch  the largest batch of random prompts whose decoding takes no longer a token than --latency-limit

  eightfold bench requests demo --cases "[[256,64],[64,256]]" --batch 1,4 --html out.html
  eightfold bench requests MODEL --dataset boolq --data dev.jsonl --batch 8 --num-prompts 64
  eightfold bench requests MODEL --cases "[512,128]" --max-batch 1,64 --latency-limit 50

Requests are greedy, and enter the engine as those of run do. Rounds of all tests alternate, and medians are shown
with lowest and highest; eightfold bench compare sets several --json files side by side. --max-model-len,
--max-num-seqs and --kv-cache-memory-bytes default to what the tests need, and there is no prefix caching unless it is
asked for."""

_OWN: tuple[str, ...] = ("dataset", "data", "num_prompts", "padding", "prompts", "output_len", "ignore_eos")
_OWN += ("latency_limit", "repeat", "seed", "json", "csv", "html")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to send, and where the results go."""
    group = parser.add_argument_group("requests")
    group.add_argument("--cases", metavar="LIST", help="[[input,output],…] in tokens (default: [[256,64]])")
    group.add_argument(
        "--batch", metavar="LIST", help="requests at once: 1,4, or a list for each case [[1,4],[1,8]] (default: 1)"
    )
    group.add_argument("--dataset", metavar="NAME", help="boolq, gsm8k, humaneval or customize")
    group.add_argument("--data", metavar="DIR", help="where it lies: a folder or its file (default: as for eval)")
    group.add_argument("--num-prompts", type=int, default=32, metavar="N", help="how many of them (default: 32)")
    group.add_argument("--padding", action="store_true", help="repeat short ones up to the input length of --cases")
    group.add_argument(
        "--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="a text; may be repeated"
    )
    group.add_argument(
        "--output-len", type=int, metavar="N", help="most tokens of an answer without --cases (default: 64)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on to that number; --cases always do")
    group.add_argument("--max-batch", metavar="LO,HI", help="search for the largest batch between these")
    group.add_argument("--latency-limit", type=float, metavar="MS", help="that takes at most so long a token")
    group.add_argument("--repeat", type=int, default=3, metavar="N", help="samples of each test (default: 3)")
    group.add_argument("--seed", type=int, default=0, help="of the random token ids (default: 0)")
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write every sample, with machine, versions and command")
    group.add_argument("--csv", metavar="FILE", help="write a row of medians for each test")
    group.add_argument("--html", metavar="FILE", help="write a page with pictures, complete in itself")


def run(args: argparse.Namespace, engine: dict[str, Any]) -> int:
    """Measure with these fields of EngineConfig. Raises EightfoldError on bad options."""
    cases = parse_cases(args.cases) if args.cases is not None else []
    search = parse_range(args.max_batch) if args.max_batch is not None else None
    if search is not None and args.batch is not None:
        raise EightfoldError("--max-batch and --batch do not go together: one searches the batch, the other sets it")
    if args.output_len is not None and args.cases is not None:
        raise EightfoldError("--output-len does not go with --cases, which have an output length each")
    batches = parse_batches("1" if args.batch is None else args.batch, max(1, len(cases)))
    from eightfold.bench.requests.plan import RequestOptions  # torch, for which mistakes should not have to wait
    from eightfold.bench.requests.run import run_requests

    own = {name: getattr(args, name) for name in _OWN if getattr(args, name) is not None}
    run_requests(RequestOptions(engine, cases=cases, batches=batches, max_batch=search, **own))
    return 0

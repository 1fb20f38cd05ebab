"""The `eightfold` command: parses, runs a command, and turns what goes wrong into one line and an exit code.

Exit codes: 0; 1 when a request or a rank failed in the middle; 2 for a mistake in the input; 130 after ctrl-C; 141 when
whatever read the output went away. Nothing here imports torch, so help is instant.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple, NoReturn

from eightfold import __version__
from eightfold.bench import cli as bench
from eightfold.bench import comparison
from eightfold.bench.requests import cli as requests
from eightfold.commands import options
from eightfold.eval import cli as evaluation
from eightfold.types import EightfoldError, RankError


class Command(NamedTuple):
    """A command's line in the list, its usage, its options, and what `--help` adds at the end."""

    summary: str
    arguments: str
    add_options: Callable[[argparse.ArgumentParser], None]
    epilog: str = ""


COMMANDS: dict[str, Command] = {
    "run": Command("answer prompts, streaming", "MODEL [PROMPT …]", options.add_run, options.RUN_EPILOG),
    "chat": Command("talk with the model", "MODEL", options.add_chat, options.CHAT_EPILOG),
    "info": Command("what a model is, and what it needs on this machine", "MODEL", options.add_info),
    "compare": Command("how similar two models are", "A B", options.add_compare, options.COMPARE_EPILOG),
    "doctor": Command("check that a device computes what it should", "--device NAME", options.add_doctor),
    "bench": Command(
        "measure kernels, the whole engine, or ranks",
        "{kernels,offline,loading,all-reduce} [MODEL]",
        bench.add_options,
        bench.EPILOG,
    ),
    "bench requests": Command(
        "measure requests: waiting, throughput, largest batch",
        "MODEL",
        options.add_bench_requests,
        requests.EPILOG,
    ),
    "bench compare": Command(
        "compare results that bench wrote", "A.json B.json …", comparison.add_options, comparison.EPILOG
    ),
    "eval": Command("score data sets", "MODEL {--task,--lm-eval} TASK,…", options.add_eval, evaluation.EPILOG),
    "quantize": Command(
        "write a folder of quantized weights", "SRC DST", options.add_quantize, options.QUANTIZE_EPILOG
    ),
    "make-random": Command("write a checkpoint of random weights, to measure with", "DST", options.add_make_random),
}


class Parser(argparse.ArgumentParser):
    """Mistakes become EightfoldError: one line, and the caller decides what to do with it."""

    def error(self, message: str) -> NoReturn:
        raise EightfoldError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command → the exit code. `--help` and `--version` raise SystemExit(0), as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end the answer
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if getattr(args, "nnodes", 1) > 1:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of host names that nobody needs
        if options.is_follower(args, os.environ):
            return int(import_module("eightfold.worker").follow_as_told(options.engine_options(args)))
        command = import_module(f"eightfold.commands.{re.sub('[- ]', '_', args.command)}")
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status: int = command.main(args)
        sys.stdout.flush()
        return status
    except EightfoldError as error:
        return _complain(error, 1 if isinstance(error, RankError) else 2)
    except KeyboardInterrupt:
        print("\n" * sys.stderr.isatty() + "eightfold: interrupted", file=sys.stderr)  # a terminal shows ^C first
        return 130
    except BrokenPipeError:
        # As with any filter, `| head` is no mistake. What is buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its options. Raises EightfoldError on anything that is not known, with the nearest known."""
    if not argv or argv[0] not in COMMANDS:
        _top_parser().parse_args(argv)
        raise EightfoldError(f"a command is needed: {', '.join(COMMANDS)}; eightfold --help explains them")
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name = " ".join(argv[:words])
    parser = command_parser(name)
    # Intermixed, because plain argparse refuses `run demo --max-tokens 9 "a prompt"`.
    args, unknown = parser.parse_known_intermixed_args(argv[words:])
    if unknown:
        raise EightfoldError(_unknown(unknown[0].partition("=")[0], name, parser))
    args.command = name
    return args


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command's arguments."""
    command = COMMANDS[name]
    parser = Parser(
        prog=f"eightfold {name}",
        usage=f"eightfold {name} {command.arguments} [options]",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation would change its meaning when options are added
    )
    command.add_options(parser)
    return parser


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="eightfold",
        usage="eightfold COMMAND …",
        description="Run Mixtral (sparse mixture of experts) on this machine.",
        epilog=f"commands:\n{listed}\n\neightfold COMMAND --help lists a command's options. Try: eightfold run demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", choices=tuple(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"eightfold {__version__}")
    return parser


def _unknown(word: str, command: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"{word!r} is one argument too many for eightfold {command}"
    known = [option for action in parser._actions for option in action.option_strings]
    near = get_close_matches("--" + word.lstrip("-").replace("_", "-"), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"eightfold {command} --help lists its options"
    return f"option {word} is not known; {hint}"


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """As Python shows a warning, but without the place in the source: it is meant for a user."""
    print("eightfold: warning:", " ".join(str(message).split()), file=sys.stderr)


def _complain(error: object, status: int = 2) -> int:
    print("eightfold: error:", " ".join(str(error).split()), file=sys.stderr)
    return status

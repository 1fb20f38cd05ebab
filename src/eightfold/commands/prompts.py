"""Where prompts come from: arguments, a file, standard input, or the default question."""

from __future__ import annotations

import argparse
import os
import select
import stat
import sys
from pathlib import Path
from typing import Any

from eightfold.commands.options import QUESTION
from eightfold.data_files import decode, numbered_lines, parse_json, read_text
from eightfold.types import EightfoldError

Conversation = list[dict[str, Any]]
Prompt = str | list[int] | Conversation

PIPE_PATIENCE = 1.0  # seconds that a pipe nobody mentioned has to say something


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of `eightfold run`, at least one. Raises EightfoldError on a file that can't be read as prompts."""
    sources = [bool(args.prompts), args.prompt_file is not None, bool(args.prompt_token_ids)]
    if sum(sources) > 1:
        raise EightfoldError("give prompts as arguments, or --prompt-file, or --prompt-token-ids; not several of them")
    if args.prompt_token_ids:
        return list(args.prompt_token_ids)
    if args.prompt_file is not None:
        return _from_file(args.prompt_file)
    if args.prompts.count("-") > 1:
        raise EightfoldError("- (standard input) can be read once only")
    listed: list[Prompt] = [_read_stdin() if prompt == "-" else prompt for prompt in args.prompts]
    if "" in listed:
        raise EightfoldError(f"prompt {listed.index('') + 1} is empty; it needs some text")
    return listed or [_piped() or QUESTION]


def _piped() -> str | None:
    """What was piped in without a word about it; None where there is nothing.

    A pipe that stays open and silent is no input: that is how a program starts another without meaning to tell it
    anything, and waiting for it would hang for ever.
    """
    try:
        kind = stat.S_IFMT(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # no standard input at all, or one that is closed
        return None
    if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
        return None
    if kind != stat.S_IFREG and not select.select([sys.stdin], [], [], PIPE_PATIENCE)[0]:
        print("eightfold: note: nothing came from standard input; - as the prompt would wait for it", file=sys.stderr)
        return None
    text = _read_stdin(empty_is_fine=True)
    return text or None


def _read_stdin(empty_is_fine: bool = False) -> str:
    text = decode(_stdin_bytes(), "standard input").strip("\r\n")
    if not text.strip() and not empty_is_fine:
        raise EightfoldError("standard input is empty; it should hold the prompt")
    return text if text.strip() else ""


def _stdin_bytes() -> bytes:
    if sys.stdin is None:  # closed by whoever started this
        raise EightfoldError("there is no standard input to read the prompt from")
    return sys.stdin.buffer.read()


def _from_file(name: str) -> list[Prompt]:
    if name == "-":
        name = "standard input"
        text = decode(_stdin_bytes(), name)
    else:
        text = read_text(Path(name))
    structured = name.endswith(".jsonl")
    prompts = [_from_json(line, f"{name}:{at}") if structured else line for at, line in numbered_lines(text)]
    if not prompts:
        raise EightfoldError(f"{name} holds no prompt")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    value = parse_json(line, where)
    kinds = {"prompt": str, "prompt_token_ids": list, "messages": list}
    if not isinstance(value, dict) or len(value) != 1 or not kinds.keys() >= value.keys():
        found = f"the keys {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise EightfoldError(f"{where} holds {found}; an object with one of {', '.join(kinds)} is needed")
    ((key, prompt),) = value.items()
    element = {"prompt_token_ids": int, "messages": dict}.get(key)
    if not isinstance(prompt, kinds[key]) or (element and not all(type(item) is element for item in prompt)):
        right = {"prompt": "a text", "prompt_token_ids": "a list of numbers", "messages": "a list of objects"}[key]
        raise EightfoldError(f"{where}: {key} must be {right}")
    if not prompt:
        raise EightfoldError(f"{where}: {key} is empty")
    found_prompt: Prompt = prompt
    return found_prompt

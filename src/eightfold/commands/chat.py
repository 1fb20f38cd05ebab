"""`eightfold chat`: a conversation, turn by turn. Works on a terminal and through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from eightfold.commands import console
from eightfold.commands.generation import stream
from eightfold.commands.options import CHAT_EPILOG, sampling_params
from eightfold.types import EightfoldError, Request, SamplingParams

if TYPE_CHECKING:
    from eightfold.llm import LLM


def main(args: argparse.Namespace) -> int:
    """0, or 1 if an answer failed."""
    params = sampling_params(args)
    llm, seconds = console.load(args)
    if not (args.chat_template or llm.get_tokenizer().has_chat_template):
        console.note("this folder has no chat template (a base model?); Mixtral's [INST] form is used")
    chat = Chat(llm, params, args.chat_template, args.system)
    if sys.stdin is not None and sys.stdin.isatty():
        _tell(f"{args.model} is ready after {seconds:.2f} s. /help lists commands, ctrl-D ends.")
    for line in _lines():
        if line.startswith("/"):
            if not chat.command(line):
                break
        elif line.strip():
            chat.answer(line.strip())
    return int(chat.failed)


class Chat:
    """A conversation with a model: what was said, and what to do with a line."""

    def __init__(self, llm: LLM, params: SamplingParams, template: str | None, system: str | None) -> None:
        self.failed = False
        self._llm = llm
        self._params = params
        self._template = template
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._count = 0

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says → whether to go on."""
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self._turns = []
            _tell("the conversation is forgotten")
        elif name == "/system":
            self._turns, self._system = [], rest.strip() or None
            _tell(
                "a new conversation, with this system prompt"
                if self._system
                else "a new conversation, without system prompt"
            )
        else:
            if name != "/help":
                _tell(f"there is no command {name}; text that begins with / needs a space before it")
            _tell(CHAT_EPILOG)
        return True

    def answer(self, text: str) -> None:
        """Put a message to the model and print its answer; a message that can't be answered is not kept."""
        turns = [*self._turns, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            ids = self._llm.get_tokenizer().encode_chat([*system, *turns], True, self._template)
            room = self._llm.engine.max_model_len - len(ids)
            if room < 1:
                raise EightfoldError(self._too_long(len(ids)))
            self._count += 1
            request = Request(str(self._count), ids, self._params)
            start = time.perf_counter()
            with stop_on_interrupt() as stopped:
                output = stream(self._llm.engine, request, True, stopped)
        except EightfoldError as error:
            self.failed = True
            _tell(f"eightfold: error: {' '.join(str(error).split())}")
            return
        one = output.outputs[0]
        if output.error:
            self.failed = True
            _tell(f"eightfold: error: {output.error}")
            return
        if text := one.text.lstrip():  # templates put the space back; an answer without a word leaves no turn
            self._turns = [*turns, {"role": "assistant", "content": text}]
        _tell(console.statistics([output], time.perf_counter() - start))
        if one.finish_reason == "length" and len(one.token_ids) >= room:
            _tell(f"the context of {self._llm.engine.max_model_len} tokens is full: /reset starts a new conversation")

    def _too_long(self, count: int) -> str:
        way_out = "/reset starts a new conversation" if self._turns else "send a shorter message"
        return f"this comes to {count} tokens and the context holds {self._llm.engine.max_model_len}: {way_out}"


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C makes the function that this gives say True, instead of breaking into a step; a second one ends the
    program as usual."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What the user types, or what comes through a pipe, line by line."""
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
        while line := sys.stdin.readline():
            yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() editing and history, where the platform has it)
    while (line := _ask()) is not None:
        yield line


def _ask() -> str | None:
    """A line from the terminal; None at the end of input."""
    try:
        return input("> ")
    except EOFError:
        _tell("")
        return None
    except KeyboardInterrupt:
        _tell("\n/quit or ctrl-D ends")
        return ""


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

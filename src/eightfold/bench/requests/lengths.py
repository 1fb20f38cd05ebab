"""Pairs of lengths and batch sizes as people type them, in JSON or without quotes and brackets. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from eightfold.types import EightfoldError

_TOKEN = re.compile(r"\s*(?:(\d+)|([\[\](),]))")
_RIGHT_CASES = "pairs of input and output length such as [[2048,2048],[512,512]]"
_RIGHT_BATCH = 'batch sizes such as "1,4", or a list for each case such as [[1,4],[1,8]]'

Nested = int | list["Nested"]


class Case(NamedTuple):
    """Tokens of a prompt, and of its answer."""

    input_len: int
    output_len: int


def parse_cases(text: str, name: str = "--cases") -> list[Case]:
    """ "[[2048,2048],[512,512]]", "[2048,2048],[512,512]" or "[2048,2048]" → pairs. `name` is what errors call them.

    Raises EightfoldError that says where the text stops being such a list, or which pair is wrong.
    """
    listed = _parse(name, text, _RIGHT_CASES)
    if all(isinstance(one, int) for one in listed):
        listed = [listed]  # a single pair
    cases = []
    for number, pair in enumerate(listed, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise EightfoldError(f"{name}: case {number} is {_text(pair)}; it must be a pair [input, output]")
        lengths = [one for one in pair if isinstance(one, int)]
        if len(lengths) != 2 or 0 in lengths:
            raise EightfoldError(f"{name}: case {number} is {_text(pair)}; both lengths must be whole numbers from 1")
        cases.append(Case(*lengths))
    return cases


def parse_batches(text: str, cases: int, name: str = "--batch") -> list[list[int]]:
    """ "4", "1,4" or "[1,4]" for all of that many cases, or "[[1,4],[1,8]]", a list for each → a list for each.

    Raises EightfoldError that says where the text stops being such a list, or that the numbers don't match.
    """
    listed = _parse(name, text, _RIGHT_BATCH)
    if all(isinstance(one, int) for one in listed):
        listed = [listed] * cases
    if len(listed) != cases:
        raise EightfoldError(f"{name} has lists for {len(listed)} cases but there are {cases}: give one each, or one")
    batches = []
    for number, one in enumerate(listed, 1):
        sizes = [size for size in one if isinstance(size, int)] if isinstance(one, list) else []
        if not sizes or not isinstance(one, list) or len(sizes) != len(one) or 0 in sizes:
            raise EightfoldError(f"{name}: for case {number} it is {_text(one)}; it must be {_RIGHT_BATCH}")
        batches.append(list(dict.fromkeys(sizes)))
    return batches


def parse_range(text: str) -> tuple[int, int]:
    """ "1,64" → the lowest and highest batch to try. Raises EightfoldError on anything else."""
    listed = _parse("--max-batch", text, "the lowest and highest batch to try, such as 1,64")
    listed = listed[0] if len(listed) == 1 and isinstance(listed[0], list) else listed
    numbers = [one for one in listed if isinstance(one, int)]
    if len(numbers) != 2 or len(listed) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise EightfoldError(f"--max-batch is {text!r}; it must be the lowest and highest batch to try, such as 1,64")
    return numbers[0], numbers[1]


def parse_ranges(text: str, cases: int, name: str) -> list[tuple[int, int]]:
    """ "[[1,64],[1,32]]", or one pair for all cases → the lowest and highest batch to try for each case.

    Raises EightfoldError, in which `name` is what the list is called.
    """
    right = "the lowest and highest batch to try for each case, such as [[1,64],[1,32]]"
    listed = _parse(name, text, right)
    listed = [listed] * cases if all(isinstance(one, int) for one in listed) else listed
    if len(listed) != cases:
        raise EightfoldError(f"{name}: there are {len(listed)} but {cases} cases; give one each")
    ranges = []
    for number, one in enumerate(listed, 1):
        numbers = [size for size in one if isinstance(size, int)] if isinstance(one, list) else []
        if len(numbers) != 2 or not isinstance(one, list) or len(one) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise EightfoldError(f"{name}: for case {number} it is {_text(one)}; it must be {right}")
        ranges.append((numbers[0], numbers[1]))
    return ranges


def _parse(option: str, text: str, right: str) -> list[Nested]:
    """Numbers and nested lists; brackets around the whole may be left out."""
    stack: list[list[Nested]] = [[]]
    position, wants_value = 0, True
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        sign = match[2] if match else None
        opens, closes = sign in ("[", "("), sign in ("]", ")")
        if match is None or (wants_value == (closes or sign == ",")) or (closes and len(stack) == 1):
            raise EightfoldError(_where(option, text, position, right))
        if match[1]:
            stack[-1].append(int(match[1]))
        elif opens:
            inner: list[Nested] = []
            stack[-1].append(inner)
            stack.append(inner)
        elif closes:
            stack.pop()
        wants_value = opens or sign == ","
        position = match.end()
    if len(stack) > 1:
        raise EightfoldError(f"{option} {text!r}: {len(stack) - 1} of its brackets are not closed; it must be {right}")
    if wants_value:
        raise EightfoldError(f"{option} {text!r} ends too soon; it must be {right}")
    (listed,) = stack
    # Outer brackets are one list with everything in it; [2048,2048] alone is a pair, and its brackets mean the same.
    return listed[0] if len(listed) == 1 and isinstance(listed[0], list) else listed


def _where(option: str, text: str, position: int, right: str) -> str:
    position += len(text[position:]) - len(text[position:].lstrip())
    return f"{option} {text!r}: {text[position]!r} at place {position + 1} does not belong there; it must be {right}"


def _text(value: Nested | Sequence[Nested]) -> str:
    return str(value).replace(" ", "")

"""A Plan as bytes, and back: what rank 0 sends the others each step.

int32 numbers in the machine's order: how many tokens, rows, pages and logit rows there are, then the Plan's lists, each
row's number of pages before the pages themselves. An empty message says that there will be no more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from eightfold.types import EightfoldError, Plan

STOP = b""
_COUNTS = 4


def encode(plan: Plan) -> bytes:
    """The message that `decode` makes an equal Plan of."""
    pages = [page for row in plan.page_table for page in row]
    counts = (len(plan.ids), len(plan.kv_lens), len(pages), len(plan.logit_rows))
    message = array("i", counts)
    for numbers in (plan.ids, plan.query_starts, plan.kv_lens, map(len, plan.page_table), pages, plan.logit_rows):
        message.extend(numbers)
    return message.tobytes()


def decode(message: bytes) -> Plan:
    """The Plan of a message. Raises EightfoldError if it is not one of `encode`'s."""
    if len(message) % 4 or len(message) < 4 * _COUNTS:
        raise EightfoldError(f"a plan of {len(message)} bytes came from rank 0; it is too short, or cut off")
    numbers = array("i", message)
    tokens, rows, pages, logits = numbers[:_COUNTS]
    lengths = (tokens, rows + 1, rows, rows, pages, logits)
    if min(lengths) < 0 or len(numbers) != _COUNTS + sum(lengths):
        raise EightfoldError(f"a plan of {len(numbers)} numbers came from rank 0; its parts do not add up to that")
    parts = _cut(numbers[_COUNTS:].tolist(), lengths)
    ids, query_starts, kv_lens, widths = next(parts), next(parts), next(parts), next(parts)
    if min(widths, default=0) < 0 or sum(widths) != pages:
        raise EightfoldError(f"a plan with {pages} pages came from rank 0; its rows do not add up to that")
    return Plan(ids, query_starts, kv_lens, list(_cut(next(parts), widths)), next(parts))


def _cut(numbers: list[int], lengths: tuple[int, ...] | list[int]) -> Iterator[list[int]]:
    start = 0
    for length in lengths:
        yield numbers[start : start + length]
        start += length

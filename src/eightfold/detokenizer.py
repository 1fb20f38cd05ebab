"""Text while tokens arrive: never half a character, never a piece of what may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What of a `Tokenizer` is needed here."""

    special_ids: frozenset[int]
    strips_space: bool

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text."""


class Detokenizer:
    """The text of one sequence.

    A token is bytes, and the text is those of all tokens decoded as UTF-8, so each token is looked at once and text
    that is out stays as it is. At the end `text` equals `Tokenizer.decode(prompt + output)` beyond what the prompt
    gives, but for what a stop string cuts off. A character that the prompt leaves unfinished counts as output.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`stop` holds non-empty strings; the text of the first `min_tokens` tokens is not searched for them."""
        self.num_tokens = 0  # taken in so far: up to and with the token that completed a stop string
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._final: list[str] = []
        self._held = ""
        self._at_start = self._read_prompt(prompt_ids)

    @property
    def text(self) -> str:
        """All text that is final: later tokens only add to it."""
        self._final = ["".join(self._final)]
        return self._final[0]

    def push(self, ids: Sequence[int]) -> str | None:
        """Take in the next tokens. Returns the stop string that they complete, if any; the rest is then ignored.

        Of several, the one that is complete first counts, and of those ending together the longest: so the result
        doesn't depend on how text is cut into tokens. Once stopped, further tokens change nothing.
        """
        for token in ids:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            self._add(self._decoder.decode(self._bytes(token)))
        return self.stopped_by

    def finish(self) -> None:
        """No more tokens come: what was held back is final, an unfinished character becomes U+FFFD."""
        if self.stopped_by is None:
            self._add(self._decoder.decode(b"", final=True))
            self._final.append(self._held)
            self._held = ""

    def _read_prompt(self, ids: Sequence[int]) -> bool:
        """Bring the decoder to where the prompt ends, which its last four bytes decide. Returns whether it is empty."""
        tail = b""
        for token in reversed(ids):
            if token not in self._skipped:
                tail = self._tokenizer.token_bytes(token) + tail
            if len(tail) >= 4:
                break
        self._decoder.decode(tail)
        return not tail

    def _bytes(self, token: int) -> bytes:
        if token in self._skipped:
            return b""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and data:
            self._at_start = False
            if self._tokenizer.strips_space:
                return data.removeprefix(b" ")
        return data

    def _add(self, new: str) -> None:
        if not new:
            return
        text = self._held + new
        if self.num_tokens <= self._min_tokens:
            self._final.append(text)
            return
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.stopped_by = min(found)
            self._final.append(text[: end if self._include_stop else start])
            self._held = ""
            return
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        self._final.append(text[: len(text) - keep])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins; the text doesn't contain it."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0

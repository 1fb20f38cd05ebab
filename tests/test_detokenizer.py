"""Text that streams is whole characters, never taken back, and in the end what decoding everything gives."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.detokenizer import Detokenizer
from eightfold.tokenizer import Tokenizer
from eightfold.vocabulary import FolderSettings

WORDS = ["▁", "▁hi", "hi", "a", "b", "é", "▁▁", "🦙", "U", "User", ":", "\n", "ab", "bc", "abc"]
BYTE, WORD = 3, 3 + 256  # ids: three controls, the bytes, the words


class Toy:
    """A vocabulary as sentencepiece's: bytes, and words with ▁ for a space. Any id may follow any other."""

    size = WORD + len(WORDS)
    controls = {"<unk>": 0, "<s>": 1, "</s>": 2}  # noqa: RUF012
    bos, eos = "<s>", "</s>"

    def __init__(self, strips_space: bool) -> None:
        self.strips_space = strips_space

    def encode(self, pieces: object) -> list[int]:
        return []

    def token_bytes(self, token: int) -> bytes:
        if token < BYTE:
            return list(self.controls)[token].encode()
        if token >= self.size:
            return b""
        return bytes([token - BYTE]) if token < WORD else WORDS[token - WORD].replace("▁", " ").encode()


def toy(strips_space: bool = True) -> Tokenizer:
    return Tokenizer(Toy(strips_space), FolderSettings({}, {}, frozenset(), {}), {}, "")


TOKENIZERS = {strips: toy(strips) for strips in (True, False)}
ids_of = st.lists(st.integers(0, Toy.size + 2) | st.integers(WORD, Toy.size - 1), max_size=40)
hard_bytes = st.sampled_from([0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0xA6, 0x99, 0xFF, 0x20, 0xC3]).map(lambda b: b + BYTE)
sequences = ids_of | st.lists(hard_bytes | st.integers(0, Toy.size - 1), max_size=40)


@settings(max_examples=400, deadline=None)
@given(prompt=sequences, output=sequences, cuts=st.lists(st.integers(1, 5)), strips=st.booleans(), skip=st.booleans())
def test_the_whole_is_what_decode_gives(
    prompt: list[int], output: list[int], cuts: list[int], strips: bool, skip: bool
) -> None:
    tokenizer = TOKENIZERS[strips]
    prompt = [*prompt, WORD + 3] if prompt else []  # ends with a whole character
    detokenizer, at, seen = Detokenizer(tokenizer, prompt, skip_special_tokens=skip), 0, ""
    for cut in [*cuts, len(output)]:
        assert detokenizer.push(output[at : at + cut]) is None
        at += cut
        assert detokenizer.text.startswith(seen)
        seen = detokenizer.text
        so_far = tokenizer.decode(prompt + output[:at], skip)[len(tokenizer.decode(prompt, skip)) :]
        assert so_far.startswith(seen) and set(so_far[len(seen) :]) <= {"\ufffd"}  # all that is certain, and no more
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(prompt + output, skip)[len(tokenizer.decode(prompt, skip)) :]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20), strips=st.booleans())
def test_valid_text_never_shows_a_replacement_character(text: str, strips: bool) -> None:
    detokenizer = Detokenizer(TOKENIZERS[strips], [1, WORD + 3])
    for byte in text.encode():
        detokenizer.push([byte + BYTE])
        assert text.startswith(detokenizer.text)
    assert detokenizer.text == text


def test_broken_bytes_show_as_soon_as_they_are_certain() -> None:
    detokenizer = Detokenizer(toy(), [1])
    shown = []
    for byte in (0xFF, 0xE4, 0xBD, 0xE4, 0xBD, 0xA0, 0xF0):
        detokenizer.push([byte + BYTE])
        shown.append(detokenizer.text)
    assert shown == ["\ufffd", "\ufffd", "\ufffd", "\ufffd\ufffd", "\ufffd\ufffd", "\ufffd\ufffd你", "\ufffd\ufffd你"]
    detokenizer.finish()
    assert detokenizer.text == "\ufffd\ufffd你\ufffd"


def test_spaces_at_the_border_to_the_prompt() -> None:
    hi, space = WORD + 1, WORD
    for prompt, expected in (([], "hi hi"), ([1], "hi hi"), ([1, hi], " hi hi"), ([1, space], " hi hi")):
        detokenizer = Detokenizer(toy(), prompt)
        detokenizer.push([hi, 2, hi])
        assert detokenizer.text == expected
    detokenizer = Detokenizer(toy(), [1, BYTE + 0xE4, BYTE + 0xBD])  # a prompt that ends within a character
    detokenizer.push([BYTE + 0xA0, hi])
    assert detokenizer.text == "你 hi"


def expected_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """What ends first, the longest of those: by looking at ever longer beginnings."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return end - len(stop), end, stop
    return None


@settings(max_examples=400, deadline=None)
@given(
    output=st.lists(st.sampled_from([WORD + i for i in (3, 4, 10, 12, 13, 14)] + [2, BYTE + 0xC3]), max_size=30),
    stops=st.lists(st.text("abcU\ufffd", min_size=1, max_size=5), max_size=4),
    cut=st.integers(1, 7),
    include=st.booleans(),
)
def test_stop_strings(output: list[int], stops: list[str], cut: int, include: bool) -> None:
    """Found wherever tokens and chunks divide them; until then nothing is held that can't become one."""
    tokenizer = TOKENIZERS[True]
    whole = tokenizer.decode(output)
    detokenizer = Detokenizer(tokenizer, [1], stop=stops, include_stop_str_in_output=include)
    expected = expected_stop(whole, stops)
    final = whole if expected is None else whole[: expected[1] if include else expected[0]]
    for at in range(0, len(output), cut):
        hit = detokenizer.push(output[at : at + cut])
        assert final.startswith(detokenizer.text)
        if hit is None:
            so_far = Detokenizer(tokenizer, [1])
            so_far.push(output[: at + cut])
            held = so_far.text[len(detokenizer.text) :]
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    detokenizer.finish()
    assert detokenizer.text == final
    assert detokenizer.stopped_by == (expected[2] if expected else None)


def test_after_a_stop_nothing_more_comes() -> None:
    detokenizer = Detokenizer(toy(), [1], stop=["bU", "User"])
    assert detokenizer.push([WORD + 3, WORD + 4, WORD + 9, WORD + 5]) == "bU"
    assert (detokenizer.text, detokenizer.num_tokens) == ("a", 3)
    assert detokenizer.push([WORD + 3]) == "bU"
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.num_tokens) == ("a", 3)


def test_min_tokens_keep_early_text_from_stopping() -> None:
    detokenizer = Detokenizer(toy(), [1], stop=["ab"], min_tokens=3)
    assert detokenizer.push([WORD + 12, WORD + 12, WORD + 3]) is None
    assert detokenizer.push([WORD + 4]) is None  # the a of this "ab" was early
    assert detokenizer.push([WORD + 3, WORD + 4]) == "ab"
    assert detokenizer.text == "ababab"


@pytest.mark.parametrize("stop", [(), ("a" * 200 + "b", "\n\nUser:")])
def test_a_token_costs_the_same_however_long_the_text(stop: tuple[str, ...]) -> None:
    """Eight times the tokens take about eight times as long; with a growing window it would be sixty-four."""

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            detokenizer = Detokenizer(TOKENIZERS[True], [1], stop=stop)
            start = time.perf_counter()
            for _ in range(count):
                detokenizer.push([WORD + 3])
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(16000) < 30 * seconds(2000)

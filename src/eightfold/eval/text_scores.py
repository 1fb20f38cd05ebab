"""How close a generated text is to a reference, from 0 to 1: LongBench's measures, by their definitions."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from eightfold.types import EightfoldError

_ARTICLES = re.compile(r"\b(a|an|the)\b")

Measure = Callable[[str, str, Sequence[str]], float]  # (what was said, the reference, all classes)


def f1(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 over words, without case, punctuation and articles."""
    return _f1(_words(said), _words(reference))


def f1_chinese(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 over the words that jieba finds."""
    return _f1(*([clean for word in _segments(text) if (clean := _chinese(word))] for text in (said, reference)))


def rouge_l(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L's F, as the `rouge` package has it: sentences end at full stops, and the distinct words of the longest
    common subsequences of all pairs of sentences count once."""
    ours, theirs = _sentences(said), _sentences(reference)
    common: set[str] = set()
    for one in theirs:
        for other in ours:
            common.update(_common_subsequence(one, other))
    own, wanted = ({word for sentence in text for word in sentence} for text in (ours, theirs))
    if not common or not own or not wanted:
        return 0.0
    precision, recall = len(common) / len(own), len(common) / len(wanted)
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_chinese(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L over the words that jieba finds."""
    return rouge_l(" ".join(_segments(said)), " ".join(_segments(reference)))


def class_match(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that are named, if the right one is among them. A class whose name is a part of the
    right one's doesn't count as named."""
    named = [name for name in classes if name in said and not (name in reference and name != reference)]
    return 1 / len(named) if reference in named else 0.0


def passage_match(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers said that are the number of the right paragraph."""
    return _number_share(said, re.search(r"Paragraph (\d+)", reference))


def passage_match_chinese(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    return _number_share(said, re.search(r"段落(\d+)", reference))


def count_match(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers said that are the reference."""
    numbers = re.findall(r"\d+", said)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def code_similarity(said: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The first line of code said against the reference: 2·(common subsequence) / (both lengths), in whole percent."""
    lines = said.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    total = len(line) + len(reference)
    return round(100 * 2 * len(_common_subsequence(line, reference)) / total) / 100 if total else 0.0


def levenshtein(a: str, b: str) -> int:
    """The fewest characters to insert, delete or replace that make one text of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _f1(said: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(reference)).values())
    return 2 * common / (len(said) + len(reference)) if common else 0.0


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _chinese(word: str) -> str:
    plain = (character for character in word.lower() if unicodedata.category(character)[0] not in "PS")
    return "".join("".join(plain).split())


def _segments(text: str) -> list[str]:
    try:
        import jieba
    except ImportError:
        raise EightfoldError(
            "LongBench's Chinese sets are scored over words that the package jieba finds: pip install jieba, or choose "
            "others with --subjects"
        ) from None
    words: Any = jieba.cut(text, cut_all=False)
    return list(words)


def _sentences(text: str) -> list[list[str]]:
    # What is only space between two full stops, or after the last, is a sentence of one empty word to the package.
    return [part.split() or [""] for part in text.split(".") if part]


def _number_share(said: str, right: re.Match[str] | None) -> float:
    numbers = re.findall(r"\d+", said)
    return numbers.count(right[1]) / len(numbers) if numbers and right else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence of two sequences of words or characters."""
    table = [[0] * (len(b) + 1)]
    for x in a:
        above, row = table[-1], [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        table.append(row)
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]

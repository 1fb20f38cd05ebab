"""NeedleBench: one sentence hidden at some depth of a long document, and a question that only it answers."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightfold.data_files import read_jsonl
from eightfold.eval.data import choose_subjects, need_file
from eightfold.eval.task import Answer, Generate, Item, LoadOptions, Query, Task, Verdict
from eightfold.eval.text_scores import levenshtein
from eightfold.types import EightfoldError

LOG = logging.getLogger(__name__)

LENGTHS = (4000, 8000, 16000, 32000, 64000, 128000)  # tokens of document and needle
DEPTHS = tuple(range(0, 101, 10))  # percent of the document before the needle
REPEATS = 10
FRAME = 200  # tokens kept free for the words around the document and for the question
HAYSTACKS = {"PaulGrahamEssays": "English", "zh_finance": "Chinese"}
PROMPTS = {
    "English": "Below is a long document. Read it, then answer the question after it.\n\n{document}\n\n"
    "Question: {question}\nAnswer:",
    "Chinese": "下面是一篇长文档，请阅读后回答文档后面的问题。\n\n{document}\n\n问题：{question}\n回答：",
}


class NeedleBench(Task):
    """PaulGrahamEssays.jsonl and zh_finance.jsonl (either, or both; lines with text), and needles.jsonl (needle,
    retrieval_question, arg2: the word that the answer must hold, language)."""

    name, title = "needlebench", "NeedleBench"
    files = tuple(f"{name}.jsonl" for name in HAYSTACKS)
    max_input = None

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._options = LoadOptions()
        self._last: tuple[tuple[str, int], list[int]] = ("", -1), []

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        if not folder.is_dir():
            raise EightfoldError(f"{folder} is a file; needlebench needs the folder of its files")
        self._options, self._lines = options, {}
        names = [name for name in HAYSTACKS if (folder / f"{name}.jsonl").is_file()]
        room = options.context - self.max_tokens
        lengths = [length for length in LENGTHS if length + FRAME <= room]
        if len(lengths) < len(LENGTHS):
            LOG.warning("needlebench: documents longer than %d tokens don't fit the context and are left out", room)
        subjects = [f"{name}-{length // 1000}k" for name in names for length in lengths]
        if not subjects:
            raise EightfoldError(
                f"needlebench needs a context of at least {LENGTHS[0] + FRAME + self.max_tokens} tokens"
            )
        needles = self._needles(folder)
        items = []
        for subject in choose_subjects(subjects, options.subjects):
            name, _, length = subject.rpartition("-")
            if name not in self._lines:
                self._lines[name] = [row["text"] for _, row in read_jsonl(folder / f"{name}.jsonl", {"text": str})]
            content = hashlib.sha256("\n".join(self._lines[name]).encode()).hexdigest()[:16]
            for repeat in range(REPEATS):
                needle = random.Random(repeat).choice(needles[HAYSTACKS[name]])
                facts = {
                    "name": name,
                    "length": int(length[:-1]) * 1000,
                    "repeat": repeat,
                    "needle": needle,
                    "texts": content,
                }
                for depth in DEPTHS:
                    key = f"{subject}:{repeat}:{depth}"
                    items.append(Item(key, subject, needle["arg2"], {**facts, "depth": depth}))
        return items

    def _needles(self, folder: Path) -> dict[str, list[Mapping[str, Any]]]:
        path = need_file(folder / "needles.jsonl", "the sentences to hide and their questions")
        kinds = {"needle": str, "retrieval_question": str, "arg2": str, "language": str}
        needles: dict[str, list[Mapping[str, Any]]] = {language: [] for language in PROMPTS}
        for number, row in read_jsonl(path, kinds):
            if row["language"] not in needles:
                raise EightfoldError(f"{path}:{number}: the language {row['language']!r} is not one of {list(PROMPTS)}")
            needles[row["language"]].append({key: row[key] for key in kinds})
        for name, language in HAYSTACKS.items():
            if (folder / f"{name}.jsonl").is_file() and not needles[language]:
                raise EightfoldError(f"{path} has no line of language {language}, which {name} needs")
        return needles

    def queries(self, item: Item) -> Sequence[Query]:
        tokenizer, facts = self._options.tokenizer, item.data
        assert tokenizer is not None  # documents are measured in tokens
        needle = f"\n{facts['needle']['needle']}\n"
        count = facts["length"] - len(tokenizer.encode(needle, add_bos=False))
        ids = self._haystack(facts["name"], facts["repeat"])[:count]
        if len(ids) < count:
            raise EightfoldError(f"needlebench: {facts['name']} has only {len(ids)} tokens; {item.key} needs {count}")
        place = count * facts["depth"] // 100
        document = f"{tokenizer.decode(ids[:place])}{needle}{tokenizer.decode(ids[place:])}"
        prompt = PROMPTS[HAYSTACKS[facts["name"]]]
        question = facts["needle"]["retrieval_question"]
        return (Generate(prompt.format(document=document, question=question), self.max_tokens),)

    def _haystack(self, name: str, repeat: int) -> list[int]:
        """The texts of a file in the order of a repeat, as many tokens as the longest document takes."""
        if self._last[0] != (name, repeat):
            assert self._options.tokenizer is not None
            lines = random.Random(repeat).sample(self._lines[name], len(self._lines[name]))
            ids: list[int] = []
            for line in lines:
                if len(ids) >= LENGTHS[-1]:
                    break
                ids += self._options.tokenizer.encode(line, add_bos=False, parse_special=False)
            self._last = (name, repeat), ids
        return self._last[1]

    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """1 where the answer holds the needle's word; else a fifth of how near it comes to the needle."""
        said, needle = answers[0].text, item.data["needle"]["needle"]
        if item.golden in said:
            return Verdict(said, {"score": 1.0})
        ours, theirs = "".join(said.split()), "".join(needle.split())
        longest = max(len(ours), len(theirs))
        return Verdict(said, {"score": 0.2 * (1 - levenshtein(ours, theirs) / longest) if longest else 0.0})

"""LongBench and LongBench-E: long documents, each set with a measure of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eightfold.data_files import read_jsonl
from eightfold.eval import text_scores as scores
from eightfold.eval.data import choose_subjects, need_file, read_json
from eightfold.eval.task import Answer, Generate, Item, LoadOptions, Query, Task, Verdict
from eightfold.types import EightfoldError

MEASURES: Mapping[str, scores.Measure] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), scores.f1),
    "multifieldqa_zh": scores.f1_chinese,
    "triviaqa": scores.f1,
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), scores.rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), scores.rouge_l_chinese),
    **dict.fromkeys(("trec", "lsht"), scores.class_match),
    "passage_retrieval_en": scores.passage_match,
    "passage_retrieval_zh": scores.passage_match_chinese,
    "passage_count": scores.count_match,
    **dict.fromkeys(("lcc", "repobench-p"), scores.code_similarity),
}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}  # of the answer only the first line counts
_PLACES = re.compile(r"\{(context|input)\}")
_KINDS = {"input": str, "context": str, "answers": list, "length": int}


class LongBench(Task):
    """Files {set}.jsonl of input, context, answers, length and all_classes; beside them, or in config/, LongBench's own
    dataset2prompt.json and dataset2maxlen.json. The total is the mean over sets."""

    name, title, files = "longbench", "LongBench", ("*.jsonl",)
    takes_max_tokens = False
    max_input = None
    total = "macro"
    ending = ""

    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        place = folder if folder.is_dir() else folder.parent
        prompts, lengths = _config(place, "dataset2prompt.json", str), _config(place, "dataset2maxlen.json", int)
        paths = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
        known = {path.stem.removesuffix(self.ending): path for path in paths if path.stem.endswith(self.ending)}
        return [
            item
            for name in choose_subjects(list(known), options.subjects)
            for item in self._items(name, known[name], prompts, lengths)
        ]

    def _items(self, name: str, path: Path, prompts: Mapping[str, Any], lengths: Mapping[str, Any]) -> Iterator[Item]:
        if name not in MEASURES or name not in prompts or name not in lengths:
            raise EightfoldError(f"{path}: {name} is not one of LongBench's sets, {', '.join(MEASURES)}")
        for number, row in read_jsonl(path, _KINDS):
            if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
                raise EightfoldError(f"{path}:{number}: 'answers' must hold at least one text, and nothing else")
            data = {"set": name, "template": prompts[name], "length": lengths[name], "row": row}
            yield Item(f"{path.stem}:{number}", self._subject(name, row["length"]), " | ".join(row["answers"]), data)

    def _subject(self, name: str, length: int) -> str:
        del length
        return name

    def queries(self, item: Item) -> Sequence[Query]:
        row = item.data["row"]
        prompt = _PLACES.sub(lambda place: str(row[place[1]]), item.data["template"])
        stop = ("\n",) if item.data["set"] == "samsum" else ()
        return (Generate(prompt, item.data["length"], stop),)

    def beginning(self, item: Item) -> object:
        return item.data["set"], item.data["row"]["context"]

    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        said, name, row = answers[0].text, item.data["set"], item.data["row"]
        if name in FIRST_LINE:
            said = said.lstrip("\n").split("\n")[0]
        classes = row.get("all_classes") or ()
        return Verdict(said, {"score": max(MEASURES[name](said, right, classes) for right in row["answers"])})


class LongBenchE(LongBench):
    """Files {set}_e.jsonl, scored as LongBench, each by the length of its documents."""

    name, title, files = "longbench-e", "LongBench-E", ("*_e.jsonl",)
    ending = "_e"

    def _subject(self, name: str, length: int) -> str:
        return f"{name} {'0-4k' if length < 4000 else '4-8k' if length < 8000 else '8k+'}"


def _config(folder: Path, name: str, kind: type) -> dict[str, Any]:
    path = folder / "config" / name
    path = path if path.is_file() else need_file(folder / name, "LongBench's prompts or lengths, from its repository")
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(value, kind) for value in content.values()):
        raise EightfoldError(f"{path} must map the names of LongBench's sets to values of type {kind.__name__}")
    return content

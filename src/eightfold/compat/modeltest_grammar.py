"""The words of modeltest's `run.sh` → a `ModelTest`. No torch here.

run.sh {fa|basic|pa_fp16|pa_bf16} TEST …, where TEST is one of

  performance         CASES BATCH [prefill_bs] [prefill_length N] [dataset NAME [padding] [batches]] MODEL …
  performance_maxbs   CASES [[lo,hi],…] TIME_LIMIT_MS MODEL …
  performance_single  CASES TEXTS BATCH MODEL …          (and precision_single)
  full_DATASET        [shot] BATCH MODEL …               (of NeedleBench [4k|8k|…] BATCH)

and … is [chat|base] [lora FILE] WEIGHTS [trust_remote_code] CHIPS [parallel_list] [max_position_embeddings], with
RANK_TABLE WORLD_SIZE NODES RANK_START MASTER_ADDR in the place of CHIPS on several machines.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from eightfold.bench.requests.lengths import Case, parse_batches, parse_cases, parse_ranges
from eightfold.compat.layout import UNSET, Layout, make_layout
from eightfold.data_files import numbered_lines, read_text
from eightfold.types import EightfoldError

DATA_TYPES = {"pa_fp16": "fp16", "pa_bf16": "bf16", "fa": "fp16", "basic": "fp16"}
DATASETS = {  # as typed after full_ → the task of `eightfold eval`
    **{
        "BoolQ": "boolq",
        "CEval": "ceval",
        "CMMLU": "cmmlu",
        "MMLU": "mmlu",
        "GSM8K": "gsm8k",
        "HumanEval": "humaneval",
    },
    **{"TruthfulQA": "truthfulqa", "LongBench": "longbench", "LongBench-E": "longbench-e", "AIME2024": "aime2024"},
    "NeedleBench": "needlebench",
}
REFUSED_TESTS = {
    "full_GPQA": "there is no GPQA here; lm-eval has it: eightfold eval MODEL --lm-eval gpqa_main_zeroshot",
    "full_HumanEval_X": "programs in other languages than Python are not run here; full_HumanEval is",
    "edge_BoolQ": "there are no edge data sets here; full_BoolQ runs whatever lies in data/boolq",
    "edge_GSM8K": "there are no edge data sets here; full_GSM8K runs whatever lies in data/gsm8k",
    "simplified_GSM8K": "it compares with answers recorded on a GPU; eightfold compare MODEL OTHER does that here",
    "simplified_TruthfulQA": "it compares with answers recorded on a GPU; eightfold compare MODEL OTHER does that here",
}
SHOT_TESTS = ("CEval", "MMLU", "CMMLU")
LENGTH_TESTS = ("performance", "performance_maxbs", "performance_single", "precision_single")
PROMPT_SETS = ("boolq", "gsm8k", "humaneval", "ceval", "customize")
NEEDLE_LENGTHS = ("4k", "8k", "16k", "32k", "64k", "128k")
TRUST = "trust_remote_code"
ALL = "INF"


@dataclass(frozen=True, slots=True)
class ModelTest:
    """A test. `batches` are those of each case, or of the data set; lengths are in tokens, `time_limit` in ms."""

    data_type: str
    test: str  # "full", or one of LENGTH_TESTS
    weights: str
    layout: Layout
    dataset: str = ""
    shots: int | None = None
    needle_length: str | None = None
    cases: tuple[Case, ...] = ()
    batches: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    time_limit: float = 0.0
    texts: tuple[str, ...] = ()
    prefill_batch: int | None = None
    prefill_length: int | None = None
    prompts_of: str | None = None
    padding: bool = False
    groups: int | None = 1  # batches of prompts; None is the whole data set
    model: str = "mixtral"
    chat: bool = False
    context: int | None = None
    notes: tuple[str, ...] = ()


class _Words:
    """The words, taken one after the other."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)

    def peek(self) -> str:
        return self._words[0] if self._words else ""

    def take(self, what: str) -> str:
        if not self._words:
            raise EightfoldError(f"the command ends where {what} should stand")
        return self._words.pop(0)

    def take_if(self, *known: str) -> bool:
        if self.peek() in known:
            self._words.pop(0)
            return True
        return False

    def take_count(self, what: str, least: int = 1) -> int:
        return _count(self.take(what), what, least)

    def rest(self) -> list[str]:
        return self._words


def parse(words: Sequence[str]) -> ModelTest:
    """Raises EightfoldError on words that don't make sense, or that ask for what is not here."""
    trusts = [word for word in words if word.lstrip("-").replace("-", "_") == TRUST]
    left = _Words([word for word in words if word not in trusts])
    kind = left.take("fa, basic, pa_fp16 or pa_bf16")
    if kind not in DATA_TYPES:
        near = get_close_matches(kind, DATA_TYPES, 1)
        raise EightfoldError(f"{kind!r} is not known; {_hint(near, ', '.join(DATA_TYPES))}")
    notes = [f"{kind}: attention and its memory are those of pa_fp16 here"] * (kind in ("fa", "basic"))
    notes += [f"{TRUST} has no effect: no code from a checkpoint is ever executed here"] * bool(trusts)
    test = left.take("the test, such as performance or full_BoolQ")
    begun = ModelTest(DATA_TYPES[kind], "", "", Layout(), notes=tuple(notes))
    if test in LENGTH_TESTS:
        made = _lengths_test(replace(begun, test=test), left)
    else:
        made = _dataset_test(replace(begun, test="full"), test, left)
    return _check(_model(made, left))


def _dataset_test(made: ModelTest, test: str, left: _Words) -> ModelTest:
    if test in REFUSED_TESTS:
        raise EightfoldError(f"{test} is refused: {REFUSED_TESTS[test]}")
    known = {f"full_{name}".lower(): name for name in DATASETS}
    if test.lower() not in known:
        names = [*LENGTH_TESTS, *(f"full_{name}" for name in DATASETS)]
        lower = {name.lower(): name for name in names}
        near = [lower[one] for one in get_close_matches(test.lower(), lower, 1, 0.5)]
        raise EightfoldError(f"there is no test {test!r}; {_hint(near, ', '.join(names))}")
    dataset, shots, length = known[test.lower()], None, None
    if dataset in SHOT_TESTS:
        shots = left.take_count("the number of shots", 0)
        if not left.peek().startswith("[") and not left.peek().replace(",", "").isdigit():
            raise EightfoldError(
                f"full_{dataset} takes two numbers, shots and batch; the batch is missing after {shots}"
            )
    if dataset == "NeedleBench":
        length = _needle_length(left)
    batches = parse_batches(left.take("the batch"), 1, "BATCH")
    return replace(made, dataset=dataset, shots=shots, needle_length=length, batches=(tuple(batches[0]),))


def _needle_length(left: _Words) -> str | None:
    """The length of the documents, which may stand before the batch; None, all lengths, where only the batch does."""
    word = left.peek()
    if word.startswith("[") or word.replace(",", "").isdigit():
        return None
    if word.lower() not in NEEDLE_LENGTHS:
        raise EightfoldError(
            f"full_NeedleBench: the length is {word!r}; it must be one of {', '.join(NEEDLE_LENGTHS)}, or left out"
        )
    return left.take("the length of the documents").lower()


def _lengths_test(made: ModelTest, left: _Words) -> ModelTest:
    cases = tuple(parse_cases(left.take("the cases, such as [[256,256]]"), "CASES"))
    made = replace(made, cases=cases)
    if made.test == "performance_maxbs":
        ranges = parse_ranges(left.take("the ranges of batches, such as [[1,64]]"), len(cases), "the ranges of batches")
        word = left.take("the time limit in ms")
        try:
            limit = float(word)
        except ValueError:
            limit = 0.0
        if not 0 < limit < float("inf"):
            raise EightfoldError(f"the time limit is {word!r}; it must be a number of milliseconds above 0")
        return replace(made, ranges=tuple(ranges), time_limit=limit)
    if made.test != "performance":
        made = replace(made, texts=_texts(left.take('the texts, such as \'["a","b"]\', or a file')))
    batches = parse_batches(left.take("the batch"), len(cases), "BATCH")
    made = replace(made, batches=tuple(map(tuple, batches)))
    return _prefill_and_prompts(made, left) if made.test == "performance" else made


def _prefill_and_prompts(made: ModelTest, left: _Words) -> ModelTest:
    if left.peek().isdigit():
        made = replace(made, prefill_batch=left.take_count("the prefill batch"))
    if left.take_if("prefill_length"):
        made = replace(made, prefill_length=left.take_count("prefill_length"))
    if left.take_if("dataset"):
        name = left.take("the data set of the prompts")
        if name not in PROMPT_SETS:
            near = get_close_matches(name.lower(), PROMPT_SETS, 1)
            raise EightfoldError(f"there is no data set {name!r} of prompts; {_hint(near, ', '.join(PROMPT_SETS))}")
        padding, groups = left.take_if("padding"), 1
        if left.take_if(ALL):
            return replace(made, prompts_of=name, padding=padding, groups=None)
        if left.peek().isdigit():
            groups = left.take_count("the number of batches")
        made = replace(made, prompts_of=name, padding=padding, groups=groups)
    return made


def _model(made: ModelTest, left: _Words) -> ModelTest:
    """MODEL, and all that comes after it."""
    model = left.take("the model, mixtral")
    if model.lower() != "mixtral":
        raise EightfoldError(f"the model is {model!r} where mixtral should stand: this engine runs Mixtral only")
    chat = left.peek() == "chat"
    left.take_if("chat", "base")
    if left.take_if("lora"):
        raise EightfoldError("lora is refused: there is no LoRA here; merge the adapter into the weights first")
    weights = left.take("the folder of the weights")
    if "encrypt" in left.peek():
        raise EightfoldError(f"{left.peek()!r} is refused: encrypted weights are not read here")
    made = replace(made, model=model, chat=chat, weights=weights)
    word = left.peek()
    machines, notes = None, list(made.notes)
    if word and not word.isdigit() and not word.startswith("["):
        machines, note = _machines(left)
        notes.append(note)
        chips, named = machines.world, "WORLD_SIZE"
    else:
        chips, named = left.take_count("the number of chips"), "CHIPS"
    degrees = _degrees(left)
    context = left.take_count("max_position_embeddings", 2) if left.rest() else None
    if left.rest():
        raise EightfoldError(f"{left.peek()!r} is one word too many")
    layout = make_layout(degrees, chips, named)
    if machines is not None:
        layout = replace(machines, moe_tp=layout.moe_tp, moe_ep=layout.moe_ep)
    return replace(made, layout=layout, context=context, notes=tuple(notes))


def _machines(left: _Words) -> tuple[Layout, str]:
    """RANK_TABLE WORLD_SIZE NODES RANK_START MASTER_ADDR, and a note on the first."""
    table = left.take("the rank table")
    if not Path(table).is_file():
        raise EightfoldError(f"{table!r} is neither a number of chips nor a rank table: there is no such file")
    world, nodes = left.take_count("world_size"), left.take_count("node_num")
    start, address = left.take_count("rank_id_start", 0), left.take("master_addr")
    if world % nodes:
        raise EightfoldError(f"world_size {world} must be a multiple of node_num {nodes}")
    if start % (world // nodes) or start >= world:
        raise EightfoldError(
            f"rank_id_start is {start}; with {world // nodes} ranks on each of {nodes} machines it must be one of "
            f"{', '.join(map(str, range(0, world, world // nodes)))}"
        )
    note = f"{table} has no effect on this backend: ranks find one another at {address}"
    return Layout(world, nodes=nodes, node_rank=start // (world // nodes), master_addr=address), note


def _degrees(left: _Words) -> dict[str, int]:
    """[dp,tp,moe_tp,moe_ep,pp,microbatch_size] or, of 8, [dp,tp,sp,moe_tp,moe_ep,pp,microbatch_size,cp]."""
    if not left.peek().startswith("["):
        return {}
    text = left.take("the parallel list")
    words = text.strip("[]").split(",")
    names: tuple[str, ...] = ("dp", "tp", "moe_tp", "moe_ep", "pp", "microbatch_size")
    if len(words) == 8:
        names = ("dp", "tp", "sp", "moe_tp", "moe_ep", "pp", "microbatch_size", "cp")
    good = text.endswith("]") and all(word.strip().removeprefix("-").isdecimal() for word in words)
    if not good or len(words) != len(names):
        raise EightfoldError(
            f"the parallel list is {text!r}; it must be [dp,tp,moe_tp,moe_ep,pp,microbatch_size] or "
            "[dp,tp,sp,moe_tp,moe_ep,pp,microbatch_size,cp], -1 for the default"
        )
    return {name: int(word) for name, word in zip(names, words, strict=True) if int(word) != UNSET}


def _texts(word: str) -> tuple[str, ...]:
    if not word.lstrip().startswith("["):
        if not Path(word).is_file():
            raise EightfoldError(f'{word!r} is neither a list of texts such as ["a","b"] nor a file of them')
        texts = [line for _, line in numbered_lines(read_text(Path(word)))]
    else:
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise EightfoldError(f'{word!r} is not a list of texts such as ["a","b"]; quote it: \'["a","b"]\'')
        texts = value
    if not texts:
        raise EightfoldError(f"{word!r} holds no text")
    return tuple(texts)


def _check(made: ModelTest) -> ModelTest:
    if made.test == "performance_maxbs" and (short := [case for case in made.cases if case.output_len < 2]):
        raise EightfoldError(
            f"CASES: [{short[0].input_len},{short[0].output_len}] has one output token, and no time after the first"
        )
    if made.chat and made.cases and not made.texts and made.prompts_of is None:
        return replace(made, notes=(*made.notes, "chat has no effect on random token ids"))
    return made


def _count(word: str, what: str, least: int) -> int:
    if not (word.isascii() and word.isdigit() and int(word) >= least):
        raise EightfoldError(f"{what} is {word!r}; it must be a whole number from {least}")
    return int(word)


def _hint(near: Sequence[str], names: str) -> str:
    return f"did you mean {near[0]}?" if near else f"there are {names}"

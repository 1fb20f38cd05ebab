"""What `bench requests` is asked to do, checked, and the engine that has room for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from eightfold.bench.plan import planned_token_bytes
from eightfold.bench.report import check_outputs
from eightfold.bench.requests.lengths import Case
from eightfold.bench.requests.prompts import check_name, find_file, read_dataset
from eightfold.bench.requests.timing import Ask
from eightfold.checkpoint import resolve
from eightfold.config import EngineConfig, ModelConfig, load_model_config
from eightfold.loader import load_tokenizer
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError

DEFAULT_CASE = Case(256, 64)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The command's options, as `eightfold bench requests --help` explains them. Lengths are in tokens."""

    engine: Mapping[str, Any]  # fields of EngineConfig; what is absent or None is chosen for the tests
    cases: Sequence[Case] = ()
    batches: Sequence[Sequence[int]] = ((1,),)  # for each case; of prompts without cases there is one list
    dataset: str | None = None
    data: str | None = None
    num_prompts: int = 32
    padding: bool = False
    prompts: Sequence[str] = ()
    output_len: int = 64
    ignore_eos: bool = False
    max_batch: tuple[int, int] | None = None
    latency_limit: float | None = None  # milliseconds
    repeat: int = 3
    seed: int = 0
    json: str | None = None
    csv: str | None = None
    html: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Test:
    """Requests to time together, `batch` in flight. Without `asks`, they are new random ones of `case` each time."""

    name: str
    kind: str  # "lengths", "dataset" or "prompt"
    batch: int
    case: Case | None = None
    asks: tuple[Ask, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        if self.case is not None and not self.asks:
            return sum(self.case)
        return max(len(ask.prompt) + ask.output_len for ask in self.asks)


@dataclass(slots=True)
class Plan:
    """All that is to be measured, and the options of the engine for it."""

    model: ModelConfig
    tests: list[Test]
    searches: list[Case]
    engine: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def check(options: RequestOptions) -> None:
    """Raises EightfoldError on options that contradict one another, before a file of the model is looked at."""
    check_outputs(options.json, options.csv, options.html)
    for name, value in (
        ("--repeat", options.repeat),
        ("--num-prompts", options.num_prompts),
        ("--output-len", options.output_len),
    ):
        if value < 1:
            raise EightfoldError(f"{name} is {value}; it must be at least 1")
    if options.dataset is not None:
        check_name(options.dataset)
        find_file(options.dataset, options.data)
    elif options.data is not None or options.padding:
        raise EightfoldError(f"{'--padding' if options.padding else '--data'} needs --dataset")
    if options.dataset is not None and options.prompts:
        raise EightfoldError("--dataset and --prompt do not go together: measure one after the other")
    if any(not prompt for prompt in options.prompts):
        raise EightfoldError("--prompt is empty; it needs some text")
    if (options.max_batch is None) != (options.latency_limit is None):
        raise EightfoldError("--max-batch and --latency-limit belong together: give both")
    if options.latency_limit is not None and not 0 < options.latency_limit < float("inf"):
        raise EightfoldError(f"--latency-limit is {options.latency_limit}; it must be a number of milliseconds above 0")
    if options.max_batch is not None and (options.dataset is not None or options.prompts):
        raise EightfoldError("--max-batch searches with random prompts of --cases, not with --dataset or --prompt")
    if options.prompts and options.cases:
        raise EightfoldError("--prompt and --cases do not go together: a prompt has the length that it has")
    if options.max_batch is not None and any(case.output_len < 2 for case in options.cases):
        raise EightfoldError("--max-batch needs answers of at least 2 tokens: the first one is no decoding")


def make_plan(options: RequestOptions) -> Plan:
    """Raises EightfoldError on a model, data set or length that won't do."""
    config = EngineConfig(**{name: value for name, value in options.engine.items() if value is not None})
    folder = resolve(config.model)
    model = load_model_config(folder)
    context = config.max_model_len or model.max_position_embeddings
    notes: list[str] = []
    cases = options.cases or ((DEFAULT_CASE,) if not (options.dataset or options.prompts) else ())
    for case in cases:
        if sum(case) > context:
            raise EightfoldError(
                f"the case [{case.input_len},{case.output_len}] makes sequences of {sum(case)} tokens and the context "
                f"holds {context}: shorten it" + (" or raise --max-model-len" if config.max_model_len else "")
            )
    searches = list(cases) if options.max_batch else []
    tests = [] if searches else list(_tests(options, cases, config, folder, model, context, notes))
    return Plan(model, tests, searches, _engine_fields(options, config, model, tests, searches), notes)


def _tests(
    options: RequestOptions,
    cases: Sequence[Case],
    config: EngineConfig,
    folder: Path,
    model: ModelConfig,
    context: int,
    notes: list[str],
) -> Iterator[Test]:
    pairs = list(zip(cases, options.batches, strict=True)) if cases else []
    if not options.dataset and not options.prompts:
        for case, batches in pairs:
            for batch in batches:
                yield Test(f"in {case.input_len} out {case.output_len} batch {batch}", "lengths", batch, case)
        return
    if config.skip_tokenizer_init:
        raise EightfoldError("--skip-tokenizer-init does not go with prompts of text: use --cases")
    tokenizer = load_tokenizer(config, folder, model)
    if options.prompts:
        for number, text in enumerate(options.prompts, 1):
            ids = tokenizer.encode(text)
            if len(ids) + options.output_len > context:
                raise EightfoldError(
                    f"prompt {number} has {len(ids)} tokens, its answer up to {options.output_len}, and the context "
                    f"holds {context}: shorten the prompt or lower --output-len"
                )
            for batch in options.batches[0]:
                asks = (Ask(ids, options.output_len, options.ignore_eos, text=True),) * batch
                yield Test(f"prompt {number} batch {batch}", "prompt", batch, None, asks)
        return
    groups: list[tuple[Case | None, Sequence[int]]] = [*pairs] or [(None, options.batches[0])]
    for wanted, batches in groups:
        asks = tuple(_dataset_asks(options, tokenizer, wanted, context, notes))
        named = f"in {wanted.input_len} out {wanted.output_len}" if wanted else f"out {options.output_len}"
        for batch in batches:
            yield Test(f"{options.dataset} {named} batch {batch}", "dataset", batch, wanted, asks)


def _dataset_asks(
    options: RequestOptions, tokenizer: Tokenizer, case: Case | None, context: int, notes: list[str]
) -> Iterator[Ask]:
    """The first prompts of the data set: cut to a case's length, repeated up to it with --padding; or as they are, and
    then those that are too long for the context are left out, with a note."""
    assert options.dataset is not None
    left_out = taken = 0
    for _, text in read_dataset(options.dataset, options.data):
        ids = tokenizer.encode(text)
        if case is not None:
            ids = ids * -(-case.input_len // len(ids)) if options.padding else ids
            ids = ids[: case.input_len]
        elif len(ids) + options.output_len > context:
            left_out += 1
            continue
        output_len = case.output_len if case else options.output_len
        yield Ask(ids, output_len, options.ignore_eos or case is not None, text=True)
        taken += 1
        if taken == options.num_prompts:
            break
    if left_out:
        notes.append(f"{left_out} prompts of {options.dataset} were left out: too long for the context of {context}")
    if not taken:
        raise EightfoldError(f"no prompt of {options.dataset} fits the context of {context}: lower --output-len")
    if taken < options.num_prompts:
        notes.append(f"{options.dataset} has {taken} prompts that can be used, fewer than --num-prompts")


def _engine_fields(
    options: RequestOptions, config: EngineConfig, model: ModelConfig, tests: Sequence[Test], searches: Sequence[Case]
) -> dict[str, Any]:
    """The engine's options, with room for the largest batch of the longest sequences unless they say otherwise."""
    high = options.max_batch[1] if options.max_batch else 0
    sizes = [(test.batch, test.longest) for test in tests] + [(high, sum(case)) for case in searches]
    context = config.max_model_len or max(length for _, length in sizes)
    pages = max(batch * -(-length // config.block_size) for batch, length in sizes)
    pages = max(pages, -(-context // config.block_size))
    given = {one.name: getattr(config, one.name) for one in fields(EngineConfig)}
    token_bytes = planned_token_bytes((config.kv_cache_dtype, config.dtype, model.torch_dtype), model)
    return {
        **given,
        "max_model_len": context,
        "max_num_seqs": options.engine.get("max_num_seqs") or max(batch for batch, _ in sizes),
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes or pages * config.block_size * token_bytes,
        "skip_tokenizer_init": all(test.kind == "lengths" for test in tests),
    }

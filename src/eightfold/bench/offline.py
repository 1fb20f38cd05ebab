"""`eightfold bench offline`: the engine from end to end, prefill and decode, against the machine's limits."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eightfold.bench.accounting import full_layer_operations
from eightfold.bench.first_token import first_token
from eightfold.bench.measure import Sample, Session
from eightfold.bench.offline_report import draw_offline, show
from eightfold.bench.probes import Prober, facts, memory
from eightfold.bench.report import Spread, check_outputs, write_json
from eightfold.config import EngineConfig, ModelConfig, load_model_config
from eightfold.loader import DTYPES, kv_bytes_per_token
from eightfold.random_checkpoint import SHAPES, random_checkpoint
from eightfold.types import EightfoldError

WARM_UP = (64, 4)  # tokens of a prompt that reaches all experts, and of its answer


@dataclass(frozen=True, slots=True)
class OfflineOptions:
    """The command's options, by the names that `eightfold bench offline --help` explains. Sizes are in tokens."""

    model: str | None = None
    shape: str | ModelConfig | None = None
    layers: int | None = None
    scheme: str = "w8a8"
    dtype: str | None = None
    kv_cache_dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    load_mode: str | None = None
    prefill: Sequence[int] = (64, 512, 2048)
    chunk: int = 512
    decode_batch: Sequence[int] = (1, 8, 32)
    depth: Sequence[int] = (0, 8192)
    output_len: int = 32
    distinct_prompts: bool = False
    repeat: int = 5
    startup: bool = True
    work_dir: str | None = None
    json: str | None = None
    png: str | None = None


@dataclass(frozen=True, slots=True)
class Test:
    """What one sample measures: a prompt of `tokens`, or `batch` sequences decoding at `depth`. `chunk` 0 is whole."""

    kind: str
    tokens: int = 0
    chunk: int = 0
    batch: int = 0
    depth: int = 0

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.tokens}" + (f" in chunks of {self.chunk}" if self.chunk else "")
        return f"decode batch {self.batch} at depth {self.depth}"


@dataclass(frozen=True, slots=True)
class Taken:
    """A sample, and the number of the probe before it."""

    sample: Sample
    reading: int


def run_offline(options: OfflineOptions) -> dict[str, Any]:
    """Measure, print the table, write JSON and picture → the JSON's content. Raises EightfoldError on bad options."""
    _check(options)
    with _folder(options) as folder:
        model = load_model_config(folder)
        tests = planned(options)
        startup = []
        if options.startup:
            wish = _engine_fields(options, str(folder), model, [t for t in tests if not t.chunk])
            longest = max([*options.prefill, WARM_UP[0]])
            startup = [first_token(wish, longest, options.output_len) for _ in _show(range(options.repeat), "Starts")]
        results: list[dict[str, Any]] = []
        readings: list[dict[str, float]] = []
        about: dict[str, Any] = {}
        for chunk in dict.fromkeys(test.chunk for test in tests):
            chosen = [test for test in tests if test.chunk == chunk]
            session = Session.open(_engine_fields(options, str(folder), model, chosen))
            prober = Prober(session.ops)
            results += _run(session, chosen, options, prober)
            readings += prober.as_json()
            about = facts(session.ops)
            del session
    report = {
        "kind": "offline",
        **about,
        "model": _described(options, model),
        "probes": readings,
        "startup": startup,
        "memory_at_end": memory(),
        "results": results,
    }
    show(report)
    if options.json:
        write_json(options.json, report)
    if options.png:
        draw_offline(options.png, report)
    return report


def planned(options: OfflineOptions) -> list[Test]:
    """Prompts whole, then decoding, then prompts that are longer than a chunk, in chunks."""
    tests = [Test("prefill", tokens=tokens) for tokens in options.prefill]
    tests += [Test("decode", batch=batch, depth=depth) for depth in options.depth for batch in options.decode_batch]
    if options.chunk:
        tests += [Test("prefill", tokens, options.chunk) for tokens in options.prefill if tokens > options.chunk]
    return tests


def _run(session: Session, tests: Sequence[Test], options: OfflineOptions, prober: Prober) -> list[dict[str, Any]]:
    """Every test once a round, a probe before and after each sample."""
    session.generate(session.random_prompt(min(WARM_UP[0], session.config.max_num_batched_tokens)), WARM_UP[1])
    for test in tests:  # untimed: fills the prefix cache, and each test's memory
        if test.kind == "decode":
            session.decode(test.batch, test.depth, 1, options.distinct_prompts)
    taken: dict[Test, list[Taken]] = {test: [] for test in tests}
    prober.take()
    for _ in _show(range(options.repeat), "Rounds"):
        for test in tests:
            reading = len(prober.readings) - 1
            taken[test].append(Taken(_sample(session, test, options), reading))
            prober.take()
    return [_result(session, test, samples, prober, options) for test, samples in taken.items()]


def _sample(session: Session, test: Test, options: OfflineOptions) -> Sample:
    if test.kind == "prefill":
        return session.prefill(test.tokens)
    return session.decode(test.batch, test.depth, options.output_len, options.distinct_prompts)


def _result(
    session: Session, test: Test, taken: Sequence[Taken], prober: Prober, options: OfflineOptions
) -> dict[str, Any]:
    samples = [_sample_json(one, prober) for one in taken]
    work, model = taken[0].sample.work, session.model
    whole_layers = work.layers.total_operations / full_layer_operations(model, taken[0].sample.tokens)
    return {
        "test": test.name,
        "kind": test.kind,
        "tokens": test.tokens,
        "chunk": test.chunk,
        "batch": test.batch,
        "depth": test.depth,
        "kv_shared": test.kind == "decode" and test.batch > 1 and test.depth > 0 and not options.distinct_prompts,
        "products": session.formats().matrices.products,
        "layer_operations": work.layers.total_operations,
        "whole_layers": whole_layers,
        "operations": work.total_operations,
        "bytes": work.bytes,
        "samples": samples,
        **{f"{key}_spread": Spread.of([sample[key] for sample in samples]) for key in SPREADS},
    }


SPREADS = ("tokens_per_second", "seconds", "share_of_peak", "share_of_bandwidth", "share_of_limit")


def _sample_json(one: Taken, prober: Prober) -> dict[str, Any]:
    """Shares are of the mean of the probes before and after."""
    sample, peaks = one.sample, prober.around(one.reading)
    return {
        "tokens_per_second": sample.tokens / sample.seconds,
        "seconds": sample.seconds,
        "major_faults": sample.faults,
        "experts_hit": sample.experts_hit,
        "share_of_peak": sample.work.layers.compute_seconds(peaks) / sample.seconds,
        "share_of_bandwidth": sample.work.bytes / peaks.read / sample.seconds,
        "share_of_limit": sample.work.limit_seconds(peaks) / sample.seconds,
        "probe_before": one.reading,
        "probe_moved": prober.moved(one.reading),
    }


@contextmanager
def _folder(options: OfflineOptions) -> Iterator[Path]:
    """The folder to run: the model's, or one of random weights that goes away afterwards unless it has a place."""
    if options.model is not None:
        from eightfold.checkpoint import resolve

        yield resolve(options.model)
        return
    wanted = _random_config(options)
    if options.work_dir is not None:
        name = options.shape if isinstance(options.shape, str) else "model"
        folder = Path(options.work_dir) / f"{name}-{wanted.num_layers}-{wanted.scheme}-{wanted.torch_dtype}"
        if not (folder / "config.json").is_file():
            _make(folder, wanted)
        if load_model_config(folder) != wanted:
            raise EightfoldError(f"{folder} holds another model than the one asked for; remove it, or choose another --work-dir")
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="eightfold-bench-") as place:
        folder = Path(place) / "model"
        _make(folder, wanted)
        yield folder


def _random_config(options: OfflineOptions) -> ModelConfig:
    shape = SHAPES[options.shape] if isinstance(options.shape, str) else options.shape
    assert shape is not None
    layers = options.layers or shape.num_layers
    return replace(shape, num_layers=layers, scheme=options.scheme, torch_dtype=options.dtype or "bfloat16")


def _make(folder: Path, config: ModelConfig) -> None:
    assert config.torch_dtype is not None
    with tqdm(desc="Writing", unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        random_checkpoint(folder, config, dtype=DTYPES[config.torch_dtype], scheme=config.scheme, progress=progress)


def _engine_fields(options: OfflineOptions, folder: str, model: ModelConfig, tests: Sequence[Test]) -> dict[str, Any]:
    """Fields of an EngineConfig that has room for these tests: a step for every prompt, pages for every prefix."""
    page, longest = EngineConfig.block_size if isinstance(EngineConfig.block_size, int) else 32, options.output_len + 3
    chunk = max((test.chunk for test in tests), default=0)
    most = max([WARM_UP[0], *(test.tokens for test in tests), *(test.batch * (page + 1) for test in tests)])
    tokens = sum(test.tokens for test in tests) + sum(WARM_UP)
    return _pages(options, folder, model, tests, page, longest, chunk or most, tokens)


def _check(options: OfflineOptions) -> None:
    """Raises EightfoldError on options that contradict one another, before anything is made."""
    check_outputs(options.json, options.png)
    if (options.model is None) == (options.shape is None):
        raise EightfoldError("bench offline needs a MODEL folder or --shape, and not both")
    if isinstance(options.shape, str) and options.shape not in SHAPES:
        raise EightfoldError(f"--shape {options.shape!r} is not known; there are {', '.join(SHAPES)}")

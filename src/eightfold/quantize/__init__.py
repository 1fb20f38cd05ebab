"""A model folder → a complete folder of quantized weights, a few rows at a time.

What is held in memory is a block of rows for each thread: the source is mapped, and what is computed goes straight to
its place in the file. Files that are finished stay when a run is interrupted, and the next run goes on after them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from eightfold.checkpoint import Checkpoint
from eightfold.config import load_model_config
from eightfold.data_files import read_text
from eightfold.machine import usable_cores
from eightfold.model import stored_tensors
from eightfold.quant import Scheme, get_scheme
from eightfold.quant_config import W4A16_GROUPS, schemes_by_key, w4a16_name
from eightfold.quantize.folder import PartialFolder, check_room, fingerprint, has_file, side_files, write_side_files
from eightfold.quantize.plan import File, Plan
from eightfold.quantize.rounding import round_rows
from eightfold.quantize.smooth import Smoothing, calibrate
from eightfold.quantize.source import Source
from eightfold.safetensors_file import SafetensorsWriter, TensorSpec
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError, Progress

DEFAULT_SHARD_BYTES = 4 * 10**9
_WEIGHTS_AHEAD = 4
_READERS = 2  # keep a disk busy
_AHEAD = 4  # blocks a thread may have waiting


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """Options of a run. `scheme` is a scheme's name or what config.json calls it; `group_size` is w4a16's: a number,
    "channel", or None for the usual one. `threads` None takes all cores.

    `calibrate` is a text whose first `calibration_tokens` tokens smoothing is fitted to; None is no smoothing.
    """

    scheme: str = "w8a8_dynamic"
    group_size: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    threads: int | None = None
    allow_pickle: bool = False
    calibrate: Path | None = None
    calibration_tokens: int = 2048


class Quantized(NamedTuple):
    """What came of a run: bytes of weights before and after, seconds, how many files an earlier run had finished."""

    folder: Path
    source_bytes: int
    bytes: int
    seconds: float
    resumed_files: int
    smoothing: Smoothing | None = None


def quantize(
    src: Path,
    dst: Path,
    config: QuantizeConfig,
    progress: Progress | None = None,
    calibrating: Progress | None = None,
) -> Quantized:
    """Writes `dst`, which must be absent or empty, from the model folder `src`.

    Everything is checked first. After an interruption `dst` is absent and `<dst>.partial` holds what is finished; the
    same call goes on from there, and its result is byte for byte that of an uninterrupted one. `progress` hears of
    bytes written, `calibrating` of layers before that. Raises EightfoldError on a source or option that won't do, a
    tensor with a NaN or an infinity, and a full disk.
    """
    start = time.perf_counter()
    scheme = check_options(src, dst, config)
    source = Source(src, config.allow_pickle)
    if source.config.scheme == scheme:
        raise EightfoldError(f"{src} is quantized to {scheme} already")
    _check_pair(source, scheme)
    plan = Plan(source, scheme, config.max_shard_bytes)
    ids = _calibration_ids(src, config)
    options = {"scheme": scheme, "max_shard_bytes": config.max_shard_bytes, "calibration": _digest(ids)}
    folder = PartialFolder(dst, fingerprint(source, options))
    folder.check()
    finished = [file.name for file in plan.files if has_file(folder.path, file)]
    copied = side_files(src)
    rest = sum(file.nbytes for file in plan.files if file.name not in finished)
    check_room(dst, rest + sum(path.stat().st_size for path in copied))
    with folder, _threads(config.threads) as pool:
        try:
            smoothing = _smoothing(source, scheme, ids, config.threads, folder, calibrating)
            source.factors = smoothing.factors if smoothing else source.factors
            _write_files(source, plan, folder, finished, pool, progress)
        except BaseException:
            folder.discard_if_empty()
            raise
        write_side_files(source, plan, folder.path, copied)
        _check_result(folder.path)
        folder.complete()
    return Quantized(
        dst, source.checkpoint.total_bytes, plan.nbytes, time.perf_counter() - start, len(finished), smoothing
    )


def check_options(src: Path, dst: Path, config: QuantizeConfig) -> str:
    """→ the scheme's own name. Raises EightfoldError on an option outside its range, and if the folders are one."""
    names = schemes_by_key()
    if config.scheme not in names:
        raise EightfoldError(f"--scheme is {config.scheme!r}; it must be one of {', '.join(names)}")
    if config.calibrate is not None and names[config.scheme] != "w8a8":
        raise EightfoldError(f"--calibrate smooths inputs that are rounded; those of {config.scheme} stay floats")
    if config.group_size is not None and names[config.scheme] != "w4a16":
        raise EightfoldError(f"--group-size is of w4a16; {config.scheme} has a scale a row")
    if config.max_shard_bytes < 1:
        raise EightfoldError(f"--max-shard-size is {config.max_shard_bytes}; it must be at least 1 byte")
    if config.threads is not None and config.threads < 1:
        raise EightfoldError(f"--threads is {config.threads}; it must be at least 1")
    if src.resolve() == dst.resolve():
        raise EightfoldError(f"source and destination are the same folder, {src}; give another destination")
    if not dst.name or dst.name == "..":
        raise EightfoldError(f"{dst} is no name for a new folder")
    return _grouped(config) if names[config.scheme] == "w4a16" else names[config.scheme]


def _grouped(config: QuantizeConfig) -> str:
    """The full name of w4a16 with the group that was asked for."""
    names = {str(group): w4a16_name(group) for group in W4A16_GROUPS} | {"channel": w4a16_name(None)}
    wanted = config.group_size or str(W4A16_GROUPS[0])
    if wanted not in names:
        raise EightfoldError(f"--group-size is {wanted!r}; it must be one of {', '.join(names)}")
    return names[wanted]


def _check_pair(source: Source, scheme: str) -> None:
    """Raises EightfoldError where weights of the source can't become those of a scheme."""
    have, int8 = source.config.scheme, ("w8a8", "w8a16")
    if have != "dense" and not (have in int8 and scheme in int8):
        raise EightfoldError(f"{source.folder} is quantized ({have}); {scheme} must be made of float weights")
    for name, spec in source.table.items():
        if spec.quantizable:
            rows, columns = source.shape(name)
            try:
                get_scheme(scheme).stored((rows, columns))
            except EightfoldError as error:
                raise EightfoldError(f"{name}: {error} (--group-size)") from None


def _calibration_ids(src: Path, config: QuantizeConfig) -> list[int]:
    """The first tokens of the calibration text; none without one."""
    if config.calibrate is None:
        return []
    text = read_text(config.calibrate)
    if config.calibration_tokens < 1:
        raise EightfoldError(f"--calibration-tokens is {config.calibration_tokens}; it must be at least 1")
    return Tokenizer.load(src).encode(text)[: config.calibration_tokens]


def _digest(ids: Sequence[int]) -> str | None:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest() if ids else None


def _smoothing(
    source: Source,
    scheme: str,
    ids: Sequence[int],
    threads: int | None,
    folder: PartialFolder,
    progress: Progress | None,
) -> Smoothing | None:
    """Factors for `ids`, those of an earlier run if it saved them; None without ids."""
    if not ids:
        return None
    if (saved := folder.saved()) is not None:
        return saved
    smoothing = calibrate(source, scheme, ids, threads, progress)
    folder.save(smoothing)
    return smoothing


@contextmanager
def _threads(count: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads that each run torch on one core; what waits is dropped when something fails."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count or usable_cores())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _write_files(
    source: Source,
    plan: Plan,
    folder: PartialFolder,
    finished: Collection[str],
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> None:
    done = sum(file.nbytes for file in plan.files if file.name in finished)
    for file in plan.files:
        if file.name in finished:
            continue
        with (
            _Reader(source, file.weights) as reader,
            SafetensorsWriter(folder.path / file.name, file.specs, durable=True) as writer,
        ):
            for written in _run(pool, _tasks(source, plan, file, writer, reader)):
                done += written
                if progress:
                    progress(done, plan.nbytes)


def _run(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], int]]) -> Iterator[int]:
    """Results as they come, a few tasks at a time. After an exception none is running any more."""
    waiting: set[Future[int]] = set()
    try:
        for task in tasks:
            waiting.add(pool.submit(task))
            if len(waiting) >= _AHEAD * pool._max_workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


class _Reader:
    """Reads weights from the disk a few ahead of those that are worked on."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self._source, self._names = source, iter(names)
        self._pool = ThreadPoolExecutor(_READERS)
        self._ahead = deque(self._next() for _ in range(_WEIGHTS_AHEAD))

    def _next(self) -> Future[None] | None:
        name = next(self._names, None)
        return self._pool.submit(self._source.read_ahead, name) if name is not None else None

    def wait(self) -> None:
        """Until the next weight is there."""
        self._ahead.append(self._next())
        if (first := self._ahead.popleft()) is not None:
            first.result()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _tasks(
    source: Source, plan: Plan, file: File, writer: SafetensorsWriter, reader: _Reader
) -> Iterator[Callable[[], int]]:
    """What there is to do for a file, in pieces that return the bytes that they have written."""
    for name in file.weights:
        reader.wait()
        rows, step = source.shape(name)[0], source.rows_of_block(name)
        for start in range(0, rows, step):
            yield partial(_write_rows, source, plan.scheme_of(name), writer, name, start, min(start + step, rows))
    if not file.weights:
        for full, spec in file.specs.items():
            yield partial(_write_zeros, writer, full, spec)


def _write_rows(source: Source, scheme: Scheme, writer: SafetensorsWriter, name: str, start: int, stop: int) -> int:
    rows = source.rows(name, start, stop)
    if rows.is_floating_point():
        made = round_rows(scheme, rows)
        if made is None:
            raise source.not_finite(name)
        parts = made
    else:  # int8 of another scheme: the numbers are the same
        scale = source.rows(name, start, stop, "weight_scale").float().reshape(-1, 1)
        parts = dict(scheme.wrap({"weight": rows, "weight_scale": scale}).parts)
    for part, tensor in parts.items():
        writer.write_rows(f"{name}.{part}", start, tensor)
    written = sum(tensor.nbytes for tensor in parts.values())
    if start == 0 and rows.ndim == 2:
        for part, tensor in scheme.constants((source.shape(name)[0], rows.shape[1])).items():
            writer.write(f"{name}.{part}", tensor)
            written += tensor.nbytes
    return written


def _write_zeros(writer: SafetensorsWriter, name: str, spec: TensorSpec) -> int:
    writer.write(name, torch.zeros(spec.shape, dtype=spec.dtype))
    return spec.nbytes


def _check_result(folder: Path) -> None:
    """Raises EightfoldError if what was written is not a model folder."""
    config = load_model_config(folder)
    Checkpoint.open(folder, config).check(stored_tensors(config))

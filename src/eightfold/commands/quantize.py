"""`eightfold quantize`: a model folder → a complete folder of quantized weights."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from eightfold.checkpoint import resolve
from eightfold.commands import console
from eightfold.commands.compare import bars
from eightfold.compare import short_lines, summary
from eightfold.quantize import QuantizeConfig, quantize

TERMINATED = 128 + signal.SIGTERM


class _Terminated(BaseException):
    """SIGTERM came."""


def main(args: argparse.Namespace) -> int:
    config = QuantizeConfig(
        args.scheme, args.group_size, args.max_shard_size, args.threads, args.allow_pickle, *_calibration(args)
    )
    dst = Path(args.destination)
    try:
        with (
            _sigterm_raises(),
            console.progress("Calibrating", "layer") as calibrating,
            console.progress("Quantizing", "B", scale=True) as update,
        ):
            result = quantize(resolve(args.source), dst, config, update, calibrating)
    except (KeyboardInterrupt, _Terminated) as interrupt:
        console.note(_left(dst))
        if isinstance(interrupt, KeyboardInterrupt):
            raise
        return TERMINATED
    for line in result.smoothing.lines() if result.smoothing else ():
        print(line)
    before, after = result.source_bytes / 1e9, result.bytes / 1e9
    resumed = f", {result.resumed_files} files were finished before" if result.resumed_files else ""
    print(
        f"{result.folder}: {before:.3f} GB → {after:.3f} GB of weights in {result.seconds:.1f} s "
        f"({before / result.seconds:.2f} GB/s read{resumed})"
    )
    if args.compare:
        _compare(args)
    return 0


def _compare(args: argparse.Namespace) -> None:
    """The short form of `eightfold compare`, of what was quantized and what came of it."""
    with bars() as progress:
        report = summary(
            str(resolve(args.source)),
            args.destination,
            threads=args.threads,
            allow_pickle=args.allow_pickle,
            progress=progress,
        )
    print("\n".join(short_lines(report)))


def _calibration(args: argparse.Namespace) -> tuple[Path | None, int]:
    return (Path(args.calibrate) if args.calibrate else None), args.calibration_tokens


def _left(dst: Path) -> str:
    partial = dst.with_name(f"{dst.name}.partial")
    if not partial.exists():
        return "nothing was written"
    return f"what is finished is in {partial}; the same command goes on from there"


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the run as ctrl-C does, so that a half-written file goes and what is finished stays."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Measures `eightfold quantize` against reading and writing the same bytes, in turn and in one run.

    eightfold make-random /big/src --shape 8x7b --layers 7
    python benchmarks/quantize.py /big/src /big/out --rounds 3

The source's pages are dropped from the system's cache before each piece, so both read from the disk (where another
process holds none of them), and both have their output on the disk before they end. Anonymous memory is what the
process holds of its own, sampled every 10 ms; mapped files are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from eightfold.machine import usable_cores
from eightfold.quantize import QuantizeConfig, quantize
from eightfold.weight_files import find_weights

CHUNK = 8 << 20


class AnonymousPeak:
    """The most anonymous memory of this process while the `with` runs, in bytes."""

    def __enter__(self) -> AnonymousPeak:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.bytes = max(self.bytes, int(line.split()[1]) * 1024)


def forget(files: list[Path]) -> None:
    """Drops files from the system's cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(files: list[Path], out: Path, share: float) -> None:
    """Reads all of `files` and writes `share` of each, on all cores, as plainly as it goes."""
    out.mkdir()

    def one(file: int, target: int, size: int, at: int) -> None:
        data = os.pread(file, min(CHUNK, size - at), at)
        os.pwrite(target, data[: int(len(data) * share)], int(at * share))

    for path in files:
        size = path.stat().st_size
        with (
            path.open("rb") as file,
            (out / path.name).open("wb") as target,
            ThreadPoolExecutor(usable_cores()) as pool,
        ):
            places = range(0, size, CHUNK)
            list(pool.map(partial(one, file.fileno(), target.fileno(), size), places))
            os.fsync(target.fileno())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, help="a folder to write and remove")
    parser.add_argument("--scheme", default="w8a8_dynamic")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("copy", "quantize"))
    args = parser.parse_args()
    weights = find_weights(args.source)
    files = list(weights.files) if weights else []
    read = sum(path.stat().st_size for path in files)
    times: dict[str, list[float]] = {"copy": [], "quantize": []}
    written, peak = 0, 0
    for _ in range(args.rounds):
        for kind in ("quantize", "copy"):
            if args.only not in (None, kind):
                continue
            forget(files)
            start = time.perf_counter()
            with AnonymousPeak() as memory:
                if kind == "quantize":
                    written = quantize(args.source, args.out, QuantizeConfig(args.scheme)).bytes
                    peak = max(peak, memory.bytes)
                else:
                    copy(files, args.out, (written or read / 2) / read)
            times[kind].append(time.perf_counter() - start)
            shutil.rmtree(args.out)
    medians = {kind: statistics.median(values) for kind, values in times.items() if values}
    print(json.dumps({"read": read, "written": written, "seconds": times, "median": medians, "peak_anonymous": peak}))
    if len(medians) == 2:
        print(f"quantize runs at {medians['copy'] / medians['quantize']:.2f} of the speed of reading and writing")


if __name__ == "__main__":
    main()

"""`eightfold bench loading`: what each --load-mode costs at the start, and gives afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eightfold.bench.first_token import first_token
from eightfold.bench.folders import model_folder
from eightfold.bench.plan import OfflineOptions, check, engine_fields, planned
from eightfold.bench.report import Spread, table, write_json
from eightfold.config import load_model_config
from eightfold.file_memory import LOAD_MODES
from eightfold.types import EightfoldError
from eightfold.weight_files import find_weights

PROMPT = 32  # tokens of the prompt after which memory is read


def run_loading(options: OfflineOptions, cold: bool) -> dict[str, Any]:
    """Start a process for each mode, `repeat` times in turn, print the table → the JSON's content.

    `cold` first drops the weights from the system's file cache. Raises EightfoldError on bad options, or if a process
    fails.
    """
    check(options)
    samples: dict[str, list[dict[str, Any]]] = {mode: [] for mode in LOAD_MODES}
    with model_folder(options) as folder:
        model = load_model_config(folder)
        fields = engine_fields(options, str(folder), model, planned(options))
        weights = find_weights(folder)
        files = weights.files if weights else ()
        for _ in tqdm(range(options.repeat), desc="Rounds", disable=not sys.stderr.isatty(), leave=False):
            for mode in LOAD_MODES:
                if cold:
                    drop(files)
                wish = {**fields, "load_mode": mode}
                samples[mode].append(first_token(wish, PROMPT, 1, options.output_len))
        size = sum(file.stat().st_size for file in files)
    report = {"kind": "loading", "bytes": size, "cold": cold, "modes": samples}
    _show(report)
    if options.json:
        write_json(options.json, report)
    return report


def drop(files: Sequence[Path]) -> None:
    """Let the system forget what it caches of these files. Raises EightfoldError where it can't be asked to."""
    if not hasattr(os, "posix_fadvise"):
        raise EightfoldError("--cold needs posix_fadvise, which this system has not")
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # a page that is not written yet is not dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _show(report: dict[str, Any]) -> None:
    state = "dropped from the file cache before each start" if report["cold"] else "in the file cache"
    print(f"{report['bytes'] / 1e9:.2f} GB of weights, {state}")
    header = ["load mode", "s to first token", "decode, GB/s", "of read rate", "faults to disk", "MB anonymous"]
    rows = []
    for mode, samples in report["modes"].items():
        rates = [one["decode_bytes"] / one["decode_seconds"] for one in samples]
        shares = [rate / one["read_rate"] for rate, one in zip(rates, samples, strict=True)]
        faults = [one["major_faults"] for one in samples]
        anonymous = [one["anonymous_beyond_kv_bytes"] for one in samples]
        rows.append(
            [
                mode,
                Spread.of([one["seconds"] for one in samples]).text(2),
                Spread.of(rates).text(1, 1e-9),
                Spread.of(shares).percent(),
                Spread.of(faults).text(0),
                Spread.of(anonymous).text(0, 1e-6),
            ]
        )
    print(table(header, rows))

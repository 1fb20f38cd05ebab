"""`eightfold bench loading`: every mode really starts a process, and the file cache is really emptied."""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
from pathlib import Path

import numpy as np
import pytest

from eightfold.bench.cli import main
from eightfold.bench.loading import drop
from eightfold.file_memory import LOAD_MODES
from eightfold.random_checkpoint import random_checkpoint
from eightfold.types import EightfoldError
from test_bench import TINY, parsed


def test_every_mode_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, target = random_checkpoint(tmp_path / "model", TINY, scheme="w8a8"), tmp_path / "loading.json"
    argv = ["loading", str(folder), "--repeat", "1", "--output-len", "3", "--json", str(target)]
    assert main(parsed(*argv)) == 0
    report = json.loads(target.read_text())
    assert tuple(report["modes"]) == LOAD_MODES and not report["cold"]
    assert report["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for (sample,) in report["modes"].values():
        assert sample["seconds"] > 0 and sample["decode_seconds"] > 0
        assert sample["decode_bytes"] > 0 and sample["read_rate"] > 0
    printed = capsys.readouterr().out
    assert "in the file cache" in printed and all(mode in printed for mode in LOAD_MODES)


def cached_pages(file: Path) -> int:
    """How many of the file's pages the system holds in memory."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        there = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        bytes_ = np.frombuffer(mapped, np.uint8)
        start = ctypes.c_void_p(bytes_.ctypes.data)
        assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(len(mapped)), there) == 0
        del bytes_
        return sum(page & 1 for page in there)


def test_dropping_empties_the_file_cache(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() == "tmpfs":
        pytest.skip("this file system is nothing but memory")
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    assert cached_pages(file) > 0
    drop([file])
    assert cached_pages(file) == 0


def test_bad_arguments() -> None:
    with pytest.raises(EightfoldError, match="--png does not go with bench loading"):
        main(parsed("loading", "demo", "--png", "a.png"))
    with pytest.raises(EightfoldError, match="--cold does not go with bench offline"):
        main(parsed("offline", "demo", "--cold"))

"""The folder in the making: `DST.partial` beside DST, which a later run with the same source and options goes on with.

It is renamed to DST when all of it is there, so DST is either complete or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eightfold.config import config_json
from eightfold.quant_config import DESCRIPTIONS, description, quantization_keys
from eightfold.quantize.plan import File, Plan
from eightfold.quantize.smooth import Place, Smoothing
from eightfold.quantize.source import Factors, Source
from eightfold.safetensors_file import SafetensorsWriter, TensorSpec, read_safetensors
from eightfold.types import EightfoldError
from eightfold.weight_files import read_json

STATE = ".eightfold-quantize.json"
_FACTORS, _PLACES = ".smoothing.safetensors", ".smoothing.json"
FORMAT = 1  # of what is written; a partial folder of another one is not gone on with
MODE = 0o640  # MindIE refuses a config.json that others may read, and weights that others may write
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".index"}
_NOT_COPIED = {"config.json", "params.json", *DESCRIPTIONS}


def fingerprint(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a partial folder was made from: the source's weight files (size and time of change), and the options."""
    paths = {source.checkpoint.file(name) for name in source.checkpoint.names()}
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)}
    return {"format": FORMAT, "source": files, "config": _digest(source), "options": dict(options)}


def _digest(source: Source) -> str:
    return hashlib.sha256(json.dumps(new_config(source, "w8a8"), sort_keys=True).encode()).hexdigest()


class PartialFolder:
    """Use it in a `with`: it holds a lock, so that no second run writes the same folder."""

    def __init__(self, dst: Path, made_from: Mapping[str, Any]) -> None:
        self.dst = dst
        self.path = dst.with_name(f"{dst.name}.partial")
        self._made_from = dict(made_from)
        self._lock = -1

    def check(self) -> None:
        """Raises EightfoldError if DST holds something, or the partial folder was made from something else."""
        if self.dst.exists() and (not self.dst.is_dir() or any(self.dst.iterdir())):
            raise EightfoldError(f"{self.dst} exists and is not an empty folder; nothing is overwritten")
        if not self.path.exists():
            return
        state = self.path / STATE
        if not state.is_file() or not state.stat().st_size:  # killed before it had anything to say
            if self.path.is_dir() and all(path == state for path in self.path.iterdir()):
                return
            raise EightfoldError(f"{self.path} exists and was not left by eightfold quantize; move it away")
        left = read_json(state)
        for what in ("format", "source", "config", "options"):
            if left.get(what) != self._made_from[what]:
                how = self._difference(what, left)
                raise EightfoldError(f"{self.path} was begun {how}; give the same to go on with it, or remove it")

    def _difference(self, what: str, left: Mapping[str, Any]) -> str:
        if what != "options":
            return (
                "by another version" if what == "format" else f"from another {what} than {self._made_from[what]!s:.80}"
            )
        old = left.get(what) or {}
        changed = [key for key, value in self._made_from[what].items() if old.get(key) != value]
        return "with " + ", ".join(f"{key} {old.get(key)}" for key in changed)

    def __enter__(self) -> PartialFolder:
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            state = self.path / STATE
            self._lock = os.open(state, os.O_RDWR | os.O_CREAT, MODE)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not state.stat().st_size:
                os.pwrite(self._lock, json.dumps(self._made_from, indent=2).encode(), 0)
        except BlockingIOError:
            self.close()
            raise EightfoldError(f"another eightfold quantize is writing {self.path}") from None
        except OSError as error:
            self.close()
            raise EightfoldError(f"cannot write into {self.path}: {error.strerror}") from None
        for stale in self.path.glob(".*.tmp"):  # of a run that was killed
            stale.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard_if_empty(self) -> None:
        """Leaves no trace of a run that has not finished a file."""
        if not any(entry.name != STATE for entry in self.path.iterdir()):
            (self.path / STATE).unlink(missing_ok=True)
            self.path.rmdir()

    def save(self, smoothing: Smoothing) -> None:
        """Keeps the factors, so that a later run has the same."""
        found = {"places": smoothing.places, "unseen": smoothing.unseen}
        (self.path / _PLACES).write_text(json.dumps(found))
        tensors = {f"rows {name}": tensor for name, tensor in smoothing.factors.rows.items()}
        tensors |= {f"columns {name}": tensor for name, tensor in smoothing.factors.columns.items()}
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with SafetensorsWriter(self.path / _FACTORS, specs, durable=True) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    def saved(self) -> Smoothing | None:
        """What an earlier run has saved."""
        if not (self.path / _FACTORS).is_file():
            return None
        found, tensors = read_json(self.path / _PLACES), read_safetensors(self.path / _FACTORS)
        parts = [
            {name.removeprefix(kind): tensors[name] for name in tensors if name.startswith(kind)}
            for kind in ("rows ", "columns ")
        ]
        return Smoothing(Factors(*parts), [Place(*place) for place in found["places"]], found["unseen"])

    def complete(self) -> None:
        """Gives the folder its name."""
        for name in (_FACTORS, _PLACES):
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.iterdir():
            path.chmod(MODE)
        self.path.chmod(0o750)
        if self.dst.is_dir():
            self.dst.rmdir()  # it is empty
        self.path.rename(self.dst)
        (self.dst / STATE).unlink()


def has_file(folder: Path, file: File) -> bool:
    """Whether `folder` holds a file of the plan, whole: it got its name when all was written."""
    path = folder / file.name
    if not path.is_file():
        return False
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read_safetensors(path).items()}
    return found == {name: tuple(spec) for name, spec in file.specs.items()}


def side_files(source: Path) -> list[Path]:
    """What is copied as it is: whatever lies beside the weights, but configs, indexes and hidden files."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _NOT_COPIED
        and path.suffix not in _WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
    ]


def check_room(dst: Path, needed: int) -> None:
    """Raises EightfoldError, saying how much is missing, if the disk that is to hold `dst` has no room for it."""
    folder = dst.absolute()
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise EightfoldError(
            f"{dst} needs {_size(needed)} and {folder} has {_size(free)} free: {_size(needed - free)} are missing"
        )


def new_config(source: Source, scheme: str) -> dict[str, Any]:
    """The new folder's config.json: the source's with its quantization replaced, or one made from params.json."""
    path = source.folder / "config.json"
    ours = source.stored_config.rope.interleaved or not path.is_file()
    raw = config_json(source.config) if ours else read_json(path)
    kept = {key: value for key, value in raw.items() if key not in ("quantize", "quantization_config")}
    return {**kept, **quantization_keys(scheme)}


def write_side_files(source: Source, plan: Plan, folder: Path, copied: Iterable[Path]) -> None:
    """Everything but the weights."""
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    plan.write_indexes(folder)
    floats, quantized = plan.names()
    for name, content in (
        (DESCRIPTIONS[0], description(plan.scheme, floats, quantized)),
        ("config.json", new_config(source, plan.scheme)),
    ):
        if content is None:
            continue
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

"""The safetensors format: files mapped into memory and read in place, and files written a tensor at a time.

A file is an 8-byte little-endian length, a JSON header of that length (tensor name → dtype, shape and byte range)
and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eightfold.file_memory import BytesDone, load_file
from eightfold.types import EightfoldError
from eightfold.weight_files import in_words, one_line, parse_object

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
_SIZE_LIMIT = 1 << 59  # elements, zeros counted as ones: what torch can have strides for
_FLUSH_BYTES = 64 << 20
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class TensorSpec(NamedTuple):
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_safetensors(path: Path, load_mode: str = "mmap", progress: BytesDone | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name: views of one memory, which lives as long as any of them.

    By default that is a read-only map of the file, of which nothing but the header is read; writing into the tensors
    ends the process. Raises EightfoldError, naming the file, when it is unreadable, truncated or malformed.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(path, file.read(8), file, size)
            specs = _read_specs(path, header, size - start)
            if size == start:
                return {name: torch.empty(spec.shape, dtype=spec.dtype) for name, (spec, _) in specs.items()}
            memory = load_file(file, size, load_mode, progress)
    except OSError as error:
        raise EightfoldError(f"cannot read {path}: {error.strerror or error}") from None
    with warnings.catch_warnings():  # torch has no read-only tensors and says so; ours are never written
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        begin = memory.offset + start
        return {name: _view(memory.buffer, spec, begin + offset) for name, (spec, offset) in specs.items()}


def _view(mapped: mmap.mmap, spec: TensorSpec, offset: int) -> Tensor:
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    flat = torch.frombuffer(mapped, dtype=spec.dtype, count=math.prod(spec.shape), offset=offset)
    return flat.view(spec.shape)


def _read_header(path: Path, prefix: bytes, file: Any, size: int) -> tuple[dict[str, Any], int]:
    """→ the header, and where the tensors' bytes start."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) == 8 and length > _HEADER_LIMIT:
        raise EightfoldError(f"{path} is not a safetensors file: its header would be {length} bytes long")
    missing = 8 + length - size if len(prefix) == 8 else 8 - size
    if missing > 0:
        raise EightfoldError(f"{path} is truncated: {missing} bytes of its header are missing")
    try:
        return parse_object(file.read(length)), 8 + length
    except (ValueError, RecursionError) as error:
        raise EightfoldError(f"{path} has a malformed safetensors header: {one_line(error)}") from None


def _read_specs(path: Path, header: dict[str, Any], available: int) -> dict[str, tuple[TensorSpec, int]]:
    """→ spec and offset by name. The tensors must fill the `available` bytes, one after the other."""
    header = {name: entry for name, entry in header.items() if name != "__metadata__"}
    specs = {name: _read_spec(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (spec, offset) in sorted(specs.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if offset != end:
            raise EightfoldError(
                f"{path} is malformed: tensor {name!r} starts at byte {offset}, the one before it ends at {end}"
            )
        end += spec.nbytes
    if end > available:
        raise EightfoldError(f"{path} is truncated: {end - available} of its {end} bytes of tensors are missing")
    if end < available:
        raise EightfoldError(f"{path} is malformed: {available - end} bytes at its end belong to no tensor")
    return specs


def _read_spec(path: Path, name: str, entry: object) -> tuple[TensorSpec, int]:
    fields = entry if isinstance(entry, dict) else {}
    code, shape, span = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if shape is None or span is None or len(span) != 2 or math.prod(max(x, 1) for x in shape) >= _SIZE_LIMIT:
        raise EightfoldError(f"{path} is malformed: its entry for tensor {name!r} is {in_words(entry)}")
    if not isinstance(code, str) or code not in DTYPES:
        raise EightfoldError(f"{path}: tensor {name!r} is stored as {in_words(code)}, which is not read here")
    spec = TensorSpec(DTYPES[code], tuple(shape))
    if span[1] - span[0] != spec.nbytes:
        raise EightfoldError(
            f"{path} is malformed: tensor {name!r} {shape} of {code} takes {spec.nbytes} bytes, "
            f"not the {span[1] - span[0]} that its offsets span"
        )
    return spec, span[0]


def _counts(value: object) -> list[int] | None:
    """`value` if it is a list of whole numbers from 0."""
    return value if isinstance(value, list) and all(type(x) is int and x >= 0 for x in value) else None


class SafetensorsWriter:
    """Writes one file, tensor by tensor in any order, under a temporary name until all are there.

    The data start at a multiple of 64 bytes, and so does every tensor whose size is one. A `durable` file gets its
    name when its bytes are on the disk. Use it in a `with`; after an exception nothing is left. Raises EightfoldError
    when the file can't be written.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], durable: bool = False) -> None:
        self.path = path
        self._durable = durable
        self._specs = dict(specs)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        # The format allows no gaps: tensors of odd sizes go last, widest elements first, so that each stays aligned.
        order = sorted(specs, key=lambda name: (specs[name].nbytes % _ALIGNMENT != 0, -specs[name].dtype.itemsize))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name in order:
            spec, self._offsets[name] = specs[name], end
            end += spec.nbytes
            span = [self._offsets[name], end]
            entries[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        self._start = 8 + len(header)
        self._missing = {name: spec.nbytes for name, spec in specs.items()}
        self._lock = threading.Lock()
        self._unflushed = 0
        try:
            self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise EightfoldError(f"cannot write {path}: {error.strerror}") from None
        self._write_at(0, len(header).to_bytes(8, "little") + header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Stores a tensor, which must be as its spec says."""
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {spec}")
        self._write_part(name, 0, tensor)

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Stores some rows of a tensor, from row `first`; each row once, in any order and from any thread."""
        spec = self._specs[name]
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:] or first + len(rows) > spec.shape[0]:
            raise ValueError(f"rows {first} … of {name} are {rows.dtype} {list(rows.shape)}, announced as {spec}")
        self._write_part(name, first * (spec.nbytes // max(spec.shape[0], 1)), rows)

    def _write_part(self, name: str, offset: int, tensor: Tensor) -> None:
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._write_at(self._start + self._offsets[name] + offset, data.numpy().data)
        with self._lock:
            self._missing[name] -= tensor.nbytes
            self._unflushed += tensor.nbytes
            flush = self._durable and self._unflushed >= _FLUSH_BYTES
            self._unflushed = 0 if flush else self._unflushed
        if flush:  # starts to write to the disk, so that there is little to wait for at the end
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        try:
            while rest:
                written = os.pwrite(self._file, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise EightfoldError(f"cannot write {self.path}: {error.strerror}") from None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()

    def finish(self) -> None:
        """Gives the file its name. All tensors must have been written."""
        if missing := sorted(name for name, count in self._missing.items() if count):
            raise ValueError(f"{self.path} lacks {missing}, or has some of it twice")
        try:
            if self._durable:
                os.fsync(self._file)
            self._temporary.replace(self.path)
        except OSError as error:
            raise EightfoldError(f"cannot write {self.path}: {error.strerror}") from None

    def discard(self) -> None:
        """Closes the file, and removes what has no name yet."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._temporary.unlink(missing_ok=True)


class CheckpointWriter:
    """Writes a folder's weights as Hugging Face does: model.safetensors, or shards and their index.

    Tensors are announced with their specs, and can then be written in any order, one at a time; in the order of the
    announcement the disk is written from front to back. Use it in a `with`; after an exception nothing is left.
    Raises EightfoldError when the disk has no room or can't be written.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = 5 * 10**9) -> None:
        self.folder = folder
        self.total_bytes = sum(spec.nbytes for spec in specs.values())
        _check_room(folder, self.total_bytes)
        shards: list[dict[str, TensorSpec]] = [{}]
        filled = 0
        for name, spec in specs.items():
            if shards[-1] and filled + spec.nbytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = spec
            filled += spec.nbytes
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        self._writers: list[SafetensorsWriter] = []
        self._by_tensor: dict[str, SafetensorsWriter] = {}
        try:
            for name, shard in zip(names, shards, strict=True):
                self._writers.append(SafetensorsWriter(folder / name, shard))
                self._by_tensor.update(dict.fromkeys(shard, self._writers[-1]))
        except EightfoldError:
            self._discard()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Stores a tensor, which must be as its spec says."""
        self._by_tensor[name].write(name, tensor)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        for writer in self._writers:
            writer.finish()
        if len(self._writers) > 1:
            weight_map = {name: writer.path.name for name, writer in sorted(self._by_tensor.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _discard(self) -> None:
        for writer in self._writers:
            writer.discard()


def _check_room(folder: Path, needed: int) -> None:
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        raise EightfoldError(f"cannot write into {folder}: {error.strerror}") from None
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise EightfoldError(f"{folder} has {free / 1e9:.1f} GB free; the weights need {needed / 1e9:.1f} GB")

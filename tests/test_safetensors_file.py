"""Our reader and writer of safetensors against the real one, and against damaged files."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from eightfold.safetensors_file import (
    DTYPES,
    CheckpointWriter,
    SafetensorsWriter,
    TensorSpec,
    read_safetensors,
)
from eightfold.types import EightfoldError


def make_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = TensorSpec(dtype, shape).nbytes
    raw = torch.tensor([i % 2 for i in range(size)], dtype=torch.uint8)
    return (raw.view(dtype) if size else torch.empty(0, dtype=dtype)).reshape(shape)


def same(a: Tensor, b: Tensor) -> bool:
    raw = (a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    with SafetensorsWriter(path, specs_of(tensors)) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)


EVERYTHING = {
    f"{code}{len(shape)}": make_tensor(dtype, shape) for code, dtype in DTYPES.items() for shape in [(3, 5), (7,)]
}
EVERYTHING |= {
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    'ünïcode "name"': torch.ones(64, dtype=torch.int8),
}


def test_reads_what_the_real_one_writes(tmp_path: Path) -> None:
    save_file(EVERYTHING, tmp_path / "a.safetensors", metadata={"format": "pt", "x": "y"})
    read = read_safetensors(tmp_path / "a.safetensors")
    assert read.keys() == EVERYTHING.keys()
    assert all(same(read[name], EVERYTHING[name]) for name in read)


def test_the_real_one_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, EVERYTHING)
    for read in (load_file(path), read_safetensors(path)):
        assert read.keys() == EVERYTHING.keys()
        assert all(same(read[name], EVERYTHING[name]) for name in read)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_alignment(tmp_path: Path) -> None:
    odd = {
        f"odd{i}": torch.ones(i, dtype=dtype) for i, dtype in enumerate([torch.int8, torch.float32, torch.bfloat16] * 5)
    }
    even = {f"even{i}": torch.ones(32 * i, dtype=torch.bfloat16) for i in range(1, 9)}
    write(tmp_path / "a.safetensors", {**odd, **even})
    read = read_safetensors(tmp_path / "a.safetensors")
    assert all(read[name].data_ptr() % 64 == 0 for name in even)
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in read.values() if tensor.numel())


def test_tensors_at_odd_addresses_are_read(tmp_path: Path) -> None:
    entries = {"a": ("I8", [3], [0, 3]), "b": ("F32", [2], [3, 11])}
    header = {
        name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for name, entry in entries.items()
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(join(header, b"\1\2\3" + torch.tensor([1.5, -2.0]).numpy().tobytes()))
    read = read_safetensors(path)
    assert read["a"].tolist() == [1, 2, 3]
    assert read["b"].tolist() == [1.5, -2.0]


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    for tensors in ({}, {"a": torch.empty(3, 0)}):
        write(tmp_path / "a.safetensors", tensors)
        assert {name: tuple(t.shape) for name, t in read_safetensors(tmp_path / "a.safetensors").items()} == {
            name: tuple(t.shape) for name, t in tensors.items()
        }


def join(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "I8", shape: object = (4,), span: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated: 8 bytes of its header are missing"),
        (b"\1\2\3", "truncated: 5 bytes of its header"),
        (join(b"x" * 50)[:40], "truncated: 18 bytes of its header"),
        (b"PK\3\4zipfile!" + b"x" * 50, "not a safetensors file"),
        (join(b"{nope"), "malformed safetensors header"),
        (join(b"\xff\xfe"), "malformed safetensors header"),
        (join([]), "malformed safetensors header: it holds a list"),
        (join(b'{"a": 1, "a": 2}'), "given twice"),
        (join(b"[" * 200_000), "malformed safetensors header"),
        (join({"a": 3}), "its entry for tensor 'a' is 3"),
        (join({"a": entry(shape=[-4])}, b"1234"), "its entry for tensor 'a'"),
        (join({"a": entry(shape=[True])}, b"1"), "its entry for tensor 'a'"),
        (join({"a": entry(shape=[4.0])}, b"1234"), "its entry for tensor 'a'"),
        (join({"a": entry(shape=[0, 2**40, 2**40], span=[0, 0])}), "its entry for tensor 'a'"),
        (join({"a": entry(span=[0])}, b"1234"), "its entry for tensor 'a'"),
        (join({"a": entry(span=[4, 0])}, b"1234"), "takes 4 bytes, not the -4"),
        (join({"a": entry(span=[0, 5])}, b"12345"), "takes 4 bytes, not the 5"),
        (join({"a": entry(dtype="F4")}, b"1234"), 'stored as "F4"'),
        (join({"a": entry(dtype=["I8"])}, b"1234"), "is stored as"),
        (join({"a": entry()}, b"12"), "truncated: 2 of its 4 bytes"),
        (join({"a": entry()}, b"123456"), "2 bytes at its end belong to no tensor"),
        (
            join({"a": entry(), "b": entry(span=[3, 7])}, b"1234567"),
            "'b' starts at byte 3, the one before it ends at 4",
        ),
        (
            join({"a": entry(), "b": entry(span=[5, 9])}, b"123456789"),
            "'b' starts at byte 5, the one before it ends at 4",
        ),
        (join({"a": entry(), "b": entry()}, b"1234"), "'b' starts at byte 0"),
    ],
)
def test_damaged_files_name_the_file_and_the_damage(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(EightfoldError, match=f"model.safetensors.*{re.escape(words)}") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(EightfoldError, match=f"cannot read {path}"):
            read_safetensors(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 400), flips=st.integers(0, 3), text=st.binary(max_size=4))
def test_any_damage_is_one_clear_error_or_harmless(
    tmp_path: Path, seed: int, cut: int, flips: int, text: bytes
) -> None:
    data = bytearray(save({"a": torch.ones(3, 5), "b": torch.ones(4, dtype=torch.int8)}, metadata={"format": "pt"}))
    rng = random.Random(seed)
    for _ in range(flips):
        data[rng.randrange(len(data))] = rng.randrange(256)
    at = rng.randrange(len(data))
    data[at : at + len(text)] = text
    path = tmp_path / "a.safetensors"
    path.write_bytes(data[: max(0, len(data) - cut)] if cut < 200 else data)
    try:
        for tensor in read_safetensors(path).values():
            tensor.clone()
    except EightfoldError as error:
        assert path.name in str(error)
        assert "\n" not in str(error)


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (2,))}
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, specs, max_shard_bytes=8) as writer:
        writer.write("a", torch.ones(2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"lacks \['b'\]"), SafetensorsWriter(tmp_path / "x", specs) as single:
        single.write("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="announced"), SafetensorsWriter(tmp_path / "x", specs) as single:
        single.write("a", torch.ones(2).half())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_stays_whole_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"a": torch.ones(2)})
    old = path.read_bytes()
    with SafetensorsWriter(path, {"a": TensorSpec(torch.float32, (4,))}) as writer:
        writer.write("a", torch.zeros(4))
        assert path.read_bytes() == old
    assert load_file(path)["a"].tolist() == [0] * 4


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    with CheckpointWriter(tmp_path, specs_of(tensors), max_shard_bytes=100) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 280}
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with CheckpointWriter(tmp_path, specs_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_no_room_is_found_out_before_writing(tmp_path: Path) -> None:
    with pytest.raises(EightfoldError, match="GB free; the weights need"):
        CheckpointWriter(tmp_path, {"a": TensorSpec(torch.float32, (1 << 50,))})
    with pytest.raises(EightfoldError, match="cannot write into"):
        CheckpointWriter(tmp_path / "absent", {})
    assert list(tmp_path.iterdir()) == []

"""A folder's weights under one set of names, whatever the layout of its files. They stay where they are.

Canonical names are Hugging Face's with one tensor an expert: `model.layers.N.block_sparse_moe.experts.E.w1.weight`.
Other layouts are renamed, and fused tensors cut into views.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.file_memory import BytesDone
from eightfold.hub import resolve as resolve
from eightfold.quant_config import Description, read_description
from eightfold.safetensors_file import read_safetensors
from eightfold.types import EightfoldError, Progress
from eightfold.weight_files import WeightFiles, check_complete, find_weights, one_line, read_index

_LAYER = re.compile(r"(model\.)?layers\.(\d+)\.(.+)")
_SINGLE_EXPERT = re.compile(r"(block_sparse_moe\.experts\.\d+\.)(gate_proj|up_proj|down_proj)\.")
_EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # as some compressed-tensors folders name them
_TOUCH_BYTES = 32 << 20
_READERS = 4  # enough requests to keep a disk busy

# Mistral's names → ours; those of a layer, then those outside.
_MISTRAL_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}
_MISTRAL_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class Expected(Protocol):
    """What a stored tensor may be: any of these shapes and dtypes; absent only if optional."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Sequence[torch.dtype]: ...

    @property
    def optional(self) -> bool: ...


class Checkpoint:
    """The tensors of a model folder by canonical name; opening one reads headers only."""

    def __init__(self, tensors: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
        self._tensors = dict(tensors)
        self._files = dict(files)

    @classmethod
    def open(
        cls,
        folder: Path,
        config: ModelConfig,
        allow_pickle: bool = False,
        load_mode: str = "mmap",
        progress: Progress | None = None,
    ) -> Checkpoint:
        """The weights in `folder`: safetensors in Hugging Face's or Mistral's layout, or pickles where allowed.

        They are mapped unless `load_mode` is "copy" or "lock" (pickles are mapped always); `progress` hears of the
        bytes that these bring into memory.
        Raises EightfoldError, naming the file, when there are none, or one is absent, unreadable or truncated.
        """
        weights = find_weights(folder)
        if weights is None:
            raise EightfoldError(
                f"{folder} holds no weights: no model.safetensors, model-*.safetensors or consolidated*.safetensors"
            )
        if weights.pickled and not allow_pickle:
            raise EightfoldError(
                f"{weights.files[0] if weights.files else weights.index} is a pickle, a format that can carry code; "
                "--allow-pickle reads it nevertheless (tensors only, never code), or convert it to safetensors"
            )
        tensors: dict[str, Tensor] = {}
        files: dict[str, Path] = {}
        dtypes: dict[str, torch.dtype] = {}
        for stored_name, stored, path in _stored_tensors(weights, load_mode, _counter(weights, progress)):
            dtypes[stored_name] = stored.dtype
            for name, tensor in _canonical(stored_name, stored, config, path):
                if name in tensors:
                    raise EightfoldError(f"tensor {name!r} is stored twice, in {files[name]} and in {path}")
                tensors[name], files[name] = tensor, path
        if (description := read_description(folder)) is not None:
            _check_description(description, dtypes)
        if config.tie_word_embeddings:
            _tie(tensors, files)
        return cls(tensors, files)

    def file(self, name: str) -> Path:
        """Where a tensor is stored."""
        return self._files[name]

    def names(self) -> Sequence[str]:
        """Canonical names of all tensors."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> Tensor:
        """A view of the file, as it is stored; never to be written into. Raises EightfoldError if there is none."""
        if name not in self._tensors:
            raise EightfoldError(f"the checkpoint has no tensor {name!r}")
        return self._tensors[name]

    def check(self, expected: Mapping[str, Expected]) -> None:
        """Raises EightfoldError unless the tensors are exactly those expected, each of an expected shape and dtype."""
        missing = [name for name, what in expected.items() if name not in self._tensors and not what.optional]
        surplus = [name for name in self._tensors if name not in expected]
        if missing:
            found = f"; it holds {_first(surplus)}, which this model has not" if surplus else ""
            wanted = _shapes(expected[missing[0]].shapes)
            raise EightfoldError(f"the checkpoint lacks {_first(missing)}, expected shape {wanted}{found}")
        if surplus:
            where, shape = self._files[surplus[0]], list(self._tensors[surplus[0]].shape)
            raise EightfoldError(
                f"{where} holds {_first(surplus)}, shape {shape}, which a model of this config has not"
            )
        for name, tensor in self._tensors.items():
            what, where = expected[name], self._files[name]
            if tuple(tensor.shape) not in what.shapes:
                raise EightfoldError(
                    f"tensor {name!r} in {where} has shape {list(tensor.shape)}, expected {_shapes(what.shapes)}"
                )
            if tensor.dtype not in what.dtypes:
                dtypes = " or ".join(_dtype_name(dtype) for dtype in what.dtypes)
                raise EightfoldError(f"tensor {name!r} in {where} is {_dtype_name(tensor.dtype)}, expected {dtypes}")

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def bytes_by_dtype(self) -> dict[torch.dtype, int]:
        """How much is stored in which dtype, most first."""
        counts: Counter[torch.dtype] = Counter()
        for tensor in self._tensors.values():
            counts[tensor.dtype] += tensor.nbytes
        return dict(counts.most_common())

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype that most bytes are stored in; float32 where there is none."""
        floats = (dtype for dtype in self.bytes_by_dtype() if dtype.is_floating_point and dtype.itemsize >= 2)
        return next(floats, torch.float32)


def read_ahead(tensors: Iterable[Tensor], progress: Progress | None = None) -> None:
    """Waits until all of these, views of mapped files, are in memory; `progress` hears of their bytes.

    Pages are touched through the map: asking the system to read the file (fadvise) would fill its cache with
    small pages, which are slower to compute from. Of columns of a matrix only the pages that hold them are touched.
    """
    chunks = [chunk for tensor in tensors for chunk in _chunks(tensor)]
    done, total = 0, sum(chunk.nbytes for chunk in chunks)
    with ThreadPoolExecutor(_READERS) as pool:
        for chunk, _ in zip(chunks, pool.map(_touch, chunks), strict=True):
            done += chunk.nbytes
            if progress:
                progress(done, total)


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Its bytes as [rows, bytes of a row], some rows at a time; as one row where nothing lies between the rows."""
    if not tensor.numel():
        return ()
    if tensor.is_contiguous():
        return [part[None] for part in torch.split(tensor.reshape(-1).view(torch.uint8), _TOUCH_BYTES)]
    rows = tensor.flatten(0, -2).view(torch.uint8)
    return torch.split(rows, max(1, _TOUCH_BYTES // rows.shape[1]))


def _touch(chunk: Tensor) -> None:
    chunk[:, :: os.sysconf("SC_PAGE_SIZE")].max()
    chunk[:, -1].max()  # on a page of its own where a row does not begin with one


def _counter(weights: WeightFiles, progress: Progress | None) -> BytesDone:
    """Sums up bytes, over all files, for `progress`."""
    total, done = sum(path.stat().st_size for path in weights.files if path.is_file()), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, total)

    return count


def _stored_tensors(weights: WeightFiles, mode: str, count: BytesDone) -> Iterator[tuple[str, Tensor, Path]]:
    """Name, tensor and file of everything that is stored, under the names that the files use."""

    def read(path: Path) -> dict[str, Tensor]:
        return _read_pickle(path) if weights.pickled else read_safetensors(path, mode, count)

    if weights.index is None:
        check_complete(weights.files)
        for path in weights.files:
            yield from ((name, tensor, path) for name, tensor in read(path).items())
        return
    places = read_index(weights.index)
    for path in sorted(set(places.values())):
        tensors = read(path)
        for name, place in places.items():
            if place == path and name not in tensors:
                raise EightfoldError(f"{path} lacks tensor {name!r}, though {weights.index.name} lists it there")
        yield from ((name, tensor, path) for name, tensor in tensors.items() if places.get(name, path) == path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, mapped and without running any code from it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise EightfoldError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise EightfoldError(f"{path} holds something other than tensors by name")
    return state


def _check_description(description: Description, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raises EightfoldError unless MindIE's description is of these tensors (dtypes by the names that files use)."""
    file = description.file
    for name, quantized in description.quantized.items():
        if name not in dtypes:
            raise EightfoldError(f"{file} describes tensor {name!r}, which no weight file holds")
        is_int8 = dtypes[name] == torch.int8
        if is_int8 and not quantized:
            raise EightfoldError(f"{file} says that tensor {name!r} is FLOAT, but it is stored as int8")
        if quantized and name.endswith(".weight") and not is_int8:
            found = _dtype_name(dtypes[name])
            raise EightfoldError(f"{file} says that tensor {name!r} is quantized, but it is stored as {found}")
    for name, dtype in dtypes.items():
        if (
            description.quantized
            and dtype == torch.int8
            and name.endswith(".weight")
            and name not in description.quantized
        ):
            raise EightfoldError(f"{file} does not describe tensor {name!r}, which is stored as int8")


def _canonical(name: str, tensor: Tensor, config: ModelConfig, path: Path) -> Iterator[tuple[str, Tensor]]:
    """A stored tensor under its canonical name, or the views that a fused one consists of."""
    in_layer = _LAYER.fullmatch(name)
    if name.endswith("rotary_emb.inv_freq"):
        return  # written by early versions of transformers; computed from the config here
    if in_layer is None:
        yield _MISTRAL_TOP.get(name, name), tensor
    elif in_layer[1] is None:
        yield f"model.layers.{in_layer[2]}.{_mistral_layer_name(in_layer[3], config, path)}", tensor
    else:
        rest = re.sub(r"^mlp\.", "block_sparse_moe.", in_layer[3])
        if rest.startswith("self_attn.q_proj.") and config.rope.interleaved:
            raise EightfoldError(
                f"{path} names tensors as Hugging Face does ({name}) in a folder of Mistral's own layout"
            )
        for part, view in _experts(rest, tensor, config, path):
            yield f"model.layers.{in_layer[2]}.{part}", view


def _mistral_layer_name(rest: str, config: ModelConfig, path: Path) -> str:
    if re.fullmatch(r"block_sparse_moe\.w[123]", rest):
        raise EightfoldError(
            f"{path} stacks all experts in one tensor ({rest}), as only the very first release did; "
            "use the same model as Hugging Face has it (mistralai/Mixtral-8x7B-v0.1)"
        )
    if not config.rope.interleaved:
        raise EightfoldError(f"{path} names tensors as Mistral does ({rest}) in a folder of Hugging Face's layout")
    module, _, part = rest.rpartition(".")
    module = re.sub(r"^feed_forward\.experts\.(\d+)\.", r"block_sparse_moe.experts.\1.", module)
    return f"{_MISTRAL_LAYER.get(module, module)}.{part}"


def _experts(rest: str, tensor: Tensor, config: ModelConfig, path: Path) -> Iterator[tuple[str, Tensor]]:
    """The experts of a fused tensor as views: gate_up_proj holds w1 above w3; anything else comes out as it is."""
    rest = _SINGLE_EXPERT.sub(lambda match: f"{match[1]}{_EXPERT_PARTS[match[2]]}.", rest)
    prefix, _, last = rest.rpartition(".")
    if last not in ("gate_up_proj", "down_proj") or prefix != "block_sparse_moe.experts":
        yield rest, tensor
        return
    hidden, width = config.hidden_size, config.intermediate_size
    matrix = (2 * width, hidden) if last == "gate_up_proj" else (hidden, width)
    expected = (config.num_experts, *matrix)
    if tuple(tensor.shape) != expected:
        raise EightfoldError(f"{rest} in {path} has shape {list(tensor.shape)}, expected {list(expected)}")
    for number, expert in enumerate(tensor):
        if last == "down_proj":
            yield f"{prefix}.{number}.w2.weight", expert
        else:
            yield f"{prefix}.{number}.w1.weight", expert[:width]
            yield f"{prefix}.{number}.w3.weight", expert[width:]


def _tie(tensors: dict[str, Tensor], files: dict[str, Path]) -> None:
    """Leaves one of the two tensors that tied embeddings share; it may be stored under either name, or under both."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if head not in tensors:
        return
    shared, where = tensors.pop(head), files.pop(head)
    if embedding not in tensors:
        tensors[embedding], files[embedding] = shared, where
    elif not torch.equal(tensors[embedding], shared):
        raise EightfoldError(
            f"{where} holds a {head} that differs from {embedding}, though config.json says tie_word_embeddings: true"
        )


def _first(names: Sequence[str]) -> str:
    """The first of several tensors by name, and how many there are."""
    return f"tensor {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Which file of the new folder holds which tensors.

MindIE wants a `weight_offset` beside each scale, and reads every file of the folder. vLLM refuses tensors that it does
not know, and reads the files that model.safetensors.index.json names, as transformers does. So the offsets, all
zeros, lie in a last file of their own, which that index leaves out. A scheme without offsets, which MindIE does not
read either, has no such file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from eightfold.model import weight_table
from eightfold.quant import Part, Scheme, get_scheme
from eightfold.quant_config import quantize_key
from eightfold.quantize.source import Source
from eightfold.safetensors_file import TensorSpec

OFFSET = "weight_offset"
HUGGING_FACE_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class File:
    """A file to write: the names of its weights without ".weight", and all of its tensors."""

    name: str
    weights: tuple[str, ...]
    specs: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


class Plan:
    """The weight files of the new folder. The same source and options always give the same plan."""

    def __init__(self, source: Source, scheme: str, max_shard_bytes: int) -> None:
        self.scheme = scheme
        self._target, self._dense = get_scheme(scheme), get_scheme("dense")
        groups: list[dict[str, dict[str, TensorSpec]]] = [{}]
        filled = 0
        offsets: dict[str, TensorSpec] = {}
        self._quantized: set[str] = set()
        self._table = weight_table(source.config)
        for name in self._table:
            specs = self._specs(source, name)
            if (offset := specs.pop(f"{name}.{OFFSET}", None)) is not None:
                offsets[f"{name}.{OFFSET}"] = offset
            size = sum(spec.nbytes for spec in specs.values())
            if groups[-1] and filled + size > max_shard_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = specs
            filled += size
        # Without offsets there is nothing for MindIE, and files are named as everybody's.
        stem = f"quant_model_weight_{quantize_key(scheme)}" if offsets else "model"
        count = len(groups) + bool(offsets)
        self._stem = stem
        self.files = [
            File(
                f"{stem}-{number:05}-of-{count:05}.safetensors",
                tuple(group),
                {full: spec for specs in group.values() for full, spec in specs.items()},
            )
            for number, group in enumerate(groups, 1)
        ]
        if offsets:
            self.files.append(File(f"{stem}-{count:05}-of-{count:05}.safetensors", (), offsets))

    def scheme_of(self, name: str) -> Scheme:
        """What a weight is stored in."""
        return self._target if self._table[name].quantizable else self._dense

    def _specs(self, source: Source, name: str) -> dict[str, TensorSpec]:
        shape = source.shape(name)
        if not self._table[name].quantizable:
            full = f"{name}.weight"
            return {full: TensorSpec(source.checkpoint.tensor(full).dtype, shape)}
        parts: dict[str, Part] = self._target.stored(shape)  # type: ignore[arg-type]
        specs = {f"{name}.{part}": TensorSpec(kind.dtypes[0], kind.shapes[0]) for part, kind in parts.items()}
        self._quantized.update(specs)
        return specs

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def names(self) -> tuple[list[str], list[str]]:
        """All tensors: those that are floats, and the parts of quantized ones."""
        full = [name for file in self.files for name in file.specs]
        return [x for x in full if x not in self._quantized], [x for x in full if x in self._quantized]

    def write_indexes(self, folder: Path) -> None:
        """MindIE's index of all files, and the one for readers that must not see the offsets; only that where there are
        none."""
        indexes = [(folder / HUGGING_FACE_INDEX, [file for file in self.files if file.weights])]
        if len(indexes[0][1]) < len(self.files):
            indexes.append((folder / f"{self._stem}.safetensors.index.json", self.files))
        for path, files in indexes:
            weight_map = {name: file.name for file in files for name in file.specs}
            index = {
                "metadata": {"total_size": sum(file.nbytes for file in files)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            path.write_text(json.dumps(index, indent=2) + "\n")

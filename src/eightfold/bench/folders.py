"""The folder that `bench offline` runs: a model's own, or one of random weights made for it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from eightfold.bench.plan import OfflineOptions
from eightfold.checkpoint import resolve
from eightfold.config import ModelConfig, load_model_config
from eightfold.loader import DTYPES
from eightfold.quant import get_scheme
from eightfold.random_checkpoint import SHAPES, random_checkpoint
from eightfold.types import EightfoldError

LAYERS = 4  # of a named shape, unless told otherwise: enough to see what a layer costs


@contextmanager
def model_folder(options: OfflineOptions) -> Iterator[Path]:
    """The model's folder; or one of random weights, kept in `work_dir` if that is given and else removed afterwards.

    Raises EightfoldError if there is no such model or shape, or the work folder holds something else.
    """
    if options.model is not None:
        yield resolve(options.model)
    elif options.work_dir is not None:
        wanted = random_config(options)
        name = options.shape if isinstance(options.shape, str) else "model"
        folder = Path(options.work_dir) / f"{name}-{wanted.num_layers}-{wanted.scheme}-{wanted.torch_dtype}"
        if not (folder / "config.json").is_file():
            _make(folder, wanted)
        elif load_model_config(folder) != wanted:
            raise EightfoldError(f"{folder} holds another model than its name says: remove it, or change --work-dir")
        yield folder
    else:
        wanted = random_config(options)
        with tempfile.TemporaryDirectory(prefix="eightfold-bench-") as place:
            yield _make(Path(place) / "model", wanted)


def random_config(options: OfflineOptions) -> ModelConfig:
    """The model that `--shape`, `--layers`, `--scheme` and `--dtype` describe. Raises EightfoldError if they don't."""
    shape, dtype = options.shape, options.dtype or "bfloat16"
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise EightfoldError(f"--shape {shape!r} is not known; there are {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    assert shape is not None  # `plan.check` has seen to it
    if dtype not in DTYPES:
        raise EightfoldError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    layers = LAYERS if options.layers is None else options.layers
    return replace(
        shape,
        num_layers=layers,
        scheme=get_scheme(options.scheme).name,
        torch_dtype=str(DTYPES[dtype]).removeprefix("torch."),
    )


def _make(folder: Path, config: ModelConfig) -> Path:
    assert config.torch_dtype is not None
    bar = tqdm(desc="Writing", unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        return random_checkpoint(folder, config, None, DTYPES[config.torch_dtype], config.scheme, 0, progress)

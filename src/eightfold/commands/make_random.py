"""`eightfold make-random`: a folder of random weights in Mixtral's true shapes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eightfold.commands import console
from eightfold.config import ModelConfig, load_model_config
from eightfold.loader import DTYPES
from eightfold.random_checkpoint import SHAPES, random_checkpoint
from eightfold.types import EightfoldError


def main(args: argparse.Namespace) -> int:
    if args.dtype not in DTYPES:
        raise EightfoldError(f"--dtype is {args.dtype!r}; it must be one of {', '.join(DTYPES)}")
    shape = _shape(args.shape)
    with console.progress("Writing", "B", scale=True) as update:
        folder = random_checkpoint(
            Path(args.destination), shape, args.layers, DTYPES[args.dtype], args.scheme, args.seed, update
        )
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e9:.2f} GB of random weights, no tokenizer (--skip-tokenizer-init)", file=sys.stderr)
    return 0


def _shape(name: str) -> str | ModelConfig:
    if name in SHAPES:
        return name
    if not Path(name).is_dir():
        raise EightfoldError(f"--shape {name!r} is neither one of {', '.join(SHAPES)} nor a folder with a config.json")
    return load_model_config(Path(name))

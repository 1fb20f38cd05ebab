"""`convert_quant_weights.py`: a float folder → a complete W8A8 folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from eightfold.compat.console import note
from eightfold.compat.dialogue import say_ineffective
from eightfold.compat.dialogue_grammar import Parser, normal_flags
from eightfold.compat.environment import has_npu, read_environment
from eightfold.types import EightfoldError

SCHEME = "w8a8_dynamic"
OPTIONS = ("--model_path", "--save_directory", "--trust_remote_code")


def main(argv: Sequence[str]) -> int:
    """→ 0. Raises EightfoldError on what can't be converted, before anything is written."""
    source, destination, trusts = parse(argv[1:])
    environment = read_environment(os.environ, has_npu())
    if trusts:
        note("--trust_remote_code has no effect: no code from a checkpoint is ever executed here")
    say_ineffective(environment)
    from tqdm import tqdm

    from eightfold.hub import resolve
    from eightfold.quantize import QuantizeConfig, quantize

    with tqdm(desc="Quantizing", unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = quantize(resolve(source), Path(destination), QuantizeConfig(SCHEME), progress)
    print(
        f"{result.folder}: {result.source_bytes / 1e9:.3f} GB → {result.bytes / 1e9:.3f} GB of weights in "
        f"{result.seconds:.1f} s; the folder is complete, nothing need be copied or added"
    )
    return 0


def parse(words: Sequence[str]) -> tuple[str, str, bool]:
    """Source, destination, and whether remote code is trusted. Raises EightfoldError on other words."""
    parser = Parser(
        prog="convert_quant_weights.py",
        usage="python convert_quant_weights.py --model_path FLOAT --save_directory W8A8 [--trust_remote_code]",
        description="Write a folder of W8A8 weights (int8 weights per channel, int8 activations per token).",
        allow_abbrev=False,
    )
    parser.add_argument("--model_path", metavar="FLOAT", help="folder of float weights")
    parser.add_argument("--save_directory", metavar="W8A8", help="folder to write; it must be absent or empty")
    parser.add_argument("--trust_remote_code", action="store_true", help="accepted, and without effect")
    args, unknown = parser.parse_known_args(normal_flags(words, OPTIONS))
    if unknown:
        near = get_close_matches("--" + unknown[0].lstrip("-"), OPTIONS, 1)
        hint = f"did you mean {near[0]}?" if near else "eightfold quantize has more options"
        raise EightfoldError(f"{unknown[0]!r} is not known to convert_quant_weights.py; {hint}")
    for name in OPTIONS[:2]:
        if not getattr(args, name.removeprefix("--")):
            raise EightfoldError(f"{name} is missing: --model_path FLOAT --save_directory W8A8")
    return args.model_path, args.save_directory, args.trust_remote_code

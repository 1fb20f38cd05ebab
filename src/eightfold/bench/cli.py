"""The arguments of `eightfold bench`, and what runs. No torch until something is measured."""

from __future__ import annotations

import argparse
import os
from typing import Any

from eightfold.types import EightfoldError

EPILOG = """\
kernels measures each operation of a backend at Mixtral 8x7B's shapes; offline the whole engine, on a MODEL folder or
on random weights of a --shape. Both print what share of the machine's limits was reached, as probed in the same run.
loading starts a process for each --load-mode in turn: time to first token, then the rate at which decoding reads.
all-reduce measures what it costs that ranks of this machine add up numbers, through shared memory and through gloo.
requests measures what users wait for, compare sets results side by side: eightfold bench requests --help,
eightfold bench compare --help.

  eightfold bench kernels --only moe/w8a8 --png roofline.png
  eightfold bench offline --shape 8x7b --layers 4 --scheme w8a8 --json out.json
  eightfold bench loading --shape 8x7b --layers 4 --cold
  eightfold bench all-reduce --ranks 2
  eightfold bench requests MODEL --cases "[[512,128]]" --batch 1,8 --html out.html
  eightfold bench compare before.json after.json"""

_OFFLINE = {"model", "layers", "scheme", "dtype", "kv_cache_dtype", "load_mode", "prefill", "chunk", "decode_batch"}
_OFFLINE |= {"depth", "output_len", "distinct_prompts", "startup", "work_dir"}
_LOADING = {"model", "layers", "scheme", "dtype", "kv_cache_dtype", "output_len", "work_dir", "cold"}
_ELSEWHERE = ("requests", "compare")  # have parsers of their own
_COMMON = {"shape", "threads", "device", "repeat", "json", "png"}
_OPTIONS = {
    "kernels": _COMMON | {"only"},
    "offline": _COMMON | _OFFLINE,
    "loading": (_COMMON - {"png"}) | _LOADING,
    "all-reduce": {"ranks", "repeat", "json"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments. An absent one is None, so that what belongs to the other measurement can be refused."""
    parser.add_argument("what", choices=(*_OPTIONS, *_ELSEWHERE), help="what to measure")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="offline, loading: a folder, demo, or a name on the hub"
    )
    _add_common(parser.add_argument_group("all"))
    group = parser.add_argument_group("kernels")
    group.add_argument(
        "--only", metavar="PATTERN", help="kernels whose names match or hold this, as in moe/w8a8 or */T1"
    )
    _add_offline(parser.add_argument_group("offline (and loading, as far as it applies)"))
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--cold", action="store_true", default=None, help="drop the weights from the file cache before each start"
    )
    group = parser.add_argument_group("all-reduce")
    group.add_argument("--ranks", type=int, metavar="N", help="processes on this machine (default: 2)")


def main(args: argparse.Namespace) -> int:
    """Run what was asked for. Raises EightfoldError on options that don't go with it."""
    if args.what in _ELSEWHERE:
        raise EightfoldError(f"write eightfold bench {args.what} first, and its options after")
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen = _OPTIONS[args.what]
    for name in sorted(set().union(*_OPTIONS.values()) - chosen):
        if name in given:
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise EightfoldError(f"{option} does not go with bench {args.what}")
    options = {name: given[name] for name in chosen if name in given}
    if args.isa is not None:
        # The way that all rooms know, and that the process which measures loading inherits.
        os.environ["EIGHTFOLD_CPU_ISA"] = args.isa
    return {"kernels": _kernels, "offline": _offline, "loading": _loading, "all-reduce": _all_reduce}[args.what](
        options
    )


def sizes(text: str) -> tuple[int, ...]:
    """Numbers with commas between; "" is none."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of numbers such as "64,512,2048"')
    return tuple(dict.fromkeys(int(word) for word in words))


def _kernels(options: dict[str, Any]) -> int:
    from eightfold.bench.kernels import KernelOptions, run_kernels

    run_kernels(KernelOptions(**options))
    return 0


def _offline(options: dict[str, Any]) -> int:
    from eightfold.bench.offline import run_offline
    from eightfold.bench.plan import OfflineOptions

    run_offline(OfflineOptions(**options))
    return 0


def _loading(options: dict[str, Any]) -> int:
    from eightfold.bench.loading import run_loading
    from eightfold.bench.plan import OfflineOptions

    cold = options.pop("cold", False)
    run_loading(OfflineOptions(**{"prefill": (64,), "decode_batch": (1,), "depth": (0,), "repeat": 3, **options}), cold)
    return 0


def _all_reduce(options: dict[str, Any]) -> int:
    from eightfold.bench.all_reduce import AllReduceOptions, run_all_reduce

    run_all_reduce(AllReduceOptions(**options))
    return 0


def _add_common(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--shape", help="8x7b or 8x22b: whose shapes (kernels: default 8x7b)")
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")
    group.add_argument("--device", help="cpu (native kernels, default) or torch (the reference)")
    group.add_argument(
        "--isa", metavar="NAME", help="instruction set of the native kernels (default: the best there is)"
    )
    group.add_argument("--repeat", type=int, metavar="N", help="samples of each (default: 7, 5 and 3)")
    group.add_argument("--json", metavar="FILE", help="write all samples, with machine and versions")
    group.add_argument("--png", metavar="FILE", help="draw the roofline (needs matplotlib)")


def _add_offline(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--layers", type=int, metavar="N", help="layers of a --shape (default: 4)")
    group.add_argument("--scheme", help="quantization of a --shape: w8a8 (default), w8a16, w4a16 or dense")
    group.add_argument(
        "--dtype", help="of a --shape's floats (default: bfloat16), or to run a MODEL in (default: its own)"
    )
    group.add_argument("--kv-cache-dtype", metavar="DTYPE", help="of keys and values (default: the compute dtype)")
    group.add_argument("--load-mode", metavar="MODE", help="as for eightfold run")
    group.add_argument("--prefill", type=sizes, metavar="N,…", help="prompt lengths (default: 64,512,2048)")
    group.add_argument(
        "--chunk", type=int, metavar="N", help="longer prompts also run in chunks of this (default: 512; 0: they don't)"
    )
    group.add_argument("--decode-batch", type=sizes, metavar="N,…", help="batch sizes (default: 1,8,32)")
    group.add_argument("--depth", type=sizes, metavar="N,…", help="tokens before the decoded ones (default: 0,8192)")
    group.add_argument("--output-len", type=int, metavar="N", help="tokens decoded a sample (default: 32)")
    group.add_argument(
        "--distinct-prompts",
        action="store_true",
        default=None,
        help="at depth, each sequence of a batch has a prompt of its own instead of a shared one: slower to prepare",
    )
    group.add_argument(
        "--no-startup",
        dest="startup",
        action="store_false",
        default=None,
        help="leave out time to first token and memory",
    )
    group.add_argument("--work-dir", metavar="DIR", help="keep a --shape's random weights here, for the next time")

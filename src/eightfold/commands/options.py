"""The options of all commands, each defined once, and what they become: `EngineConfig` and `SamplingParams`.

An option has the name of its field in kebab case, and vLLM's name where vLLM has it. No torch here: `--help` needs
this file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from eightfold.bench.requests import cli as bench_requests
from eightfold.config import EngineConfig
from eightfold.eval import cli as evaluation
from eightfold.types import SamplingParams

QUESTION = "Who is the CEO of Google?"
MAX_TOKENS = 512  # for `run`: enough for an answer, and a base model that never stops ends within minutes

RUN_EPILOG = f"""\
prompts:
  PROMPT words in quotes, each a prompt of its own; or --prompt-file; or --prompt-token-ids. Without any of them,
  what is piped in is one prompt (- says so, and waits for it), and without a pipe it is "{QUESTION}".
  One prompt streams. Several run together as a batch, and are printed as they finish.

chat or text:
  Where the folder ships a chat template (instruct models and the demo do), a prompt is put to the model as a user's
  message in that template; else it is text to continue. --chat and --no-chat decide otherwise.

The answer goes to standard output, everything else to standard error."""

CHAT_EPILOG = """\
in the chat:
  /reset        forget the conversation (and keep the system prompt)
  /system TEXT  set the system prompt and start anew; without TEXT there is none
  /help         list these
  /quit         end; so does ctrl-D
  ctrl-C stops an answer; what was said so far stays in the conversation.
  Text that begins with a space is never a command."""

COMPARE_EPILOG = """\
A is what B is measured against: a float model and one quantized from it, two quantizations, or the same folder twice
with --kv-cache-dtype-b. Both run over the same text, each with its own hidden states, side by side and layer by layer,
so neither has to fit in memory.

  eightfold compare MODEL MODEL-w8a8 --html compare.html
  eightfold compare demo demo --kv-cache-dtype-b bfloat16"""


QUANTIZE_EPILOG = """\
interrupted:
  What is finished stays in DST.partial. The same command goes on from there; DST appears when all of it is written."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)", re.IGNORECASE)
_EXPONENTS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold run`."""
    _add_model(parser)
    parser.add_argument("prompts", nargs="*", default=[], metavar="PROMPT", help="see below")
    group = parser.add_argument_group("prompts and output")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a prompt a line (- is standard input); in a .jsonl file each line is an object with prompt, "
        "prompt_token_ids or messages",
    )
    group.add_argument(
        "--prompt-token-ids",
        metavar="IDS",
        action="append",
        type=token_ids,
        default=[],
        help='a prompt as token ids, "1,2,3"; may be repeated',
    )
    group.add_argument("--system", metavar="TEXT", help="a system prompt before each user's message")
    group.add_argument("--chat", action=argparse.BooleanOptionalAction, help="use the chat template, or don't")
    group.add_argument("--json", action="store_true", help="one JSON object a request, with token ids and timings")
    add_sampling(parser, MAX_TOKENS)
    add_engine(parser)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold chat`."""
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    add_sampling(parser, None, single=True)
    add_engine(parser, text_only=True)


def add_info(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold info`."""
    _add_model(parser, "; a folder with only a config.json will do")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default=_default("device"), help="whose kernels to list (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="compute dtype of these (default: the checkpoint's)")
    parser.add_argument(
        "--kv-cache-dtype", default="auto", metavar="NAME", help="of keys and values in the sizes shown"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold eval`."""
    _add_model(parser)
    evaluation.add_options(parser)
    add_engine(parser)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold doctor`."""
    parser.add_argument("--device", default=_default("device"), help="the device to check (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="compute dtypes, with commas between (default: all it has)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")


def add_make_random(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold make-random`."""
    parser.add_argument("destination", metavar="DST", help="the folder to write; it must be absent or empty")
    parser.add_argument(
        "--shape", default="8x7b", help="8x7b (default), 8x22b, or a folder whose config.json to follow"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="how many layers (default: the shape's own)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16 (default: bfloat16)")
    parser.add_argument("--scheme", default="dense", help="quantization: dense, w8a8, w8a16 or w4a16 (default: dense)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")


def add_compare(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold compare`."""
    for name, text in (
        ("a", "the reference: a folder, demo, or a name on the hub"),
        ("b", "what is measured against it"),
    ):
        parser.add_argument(name, metavar=name.upper(), help=text)
    group = parser.add_argument_group("text")
    group.add_argument("--text", metavar="FILE", help="UTF-8 text to run both on (default: a built-in one)")
    group.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="use at most the text's first N (default: %(default)s)"
    )
    group.add_argument(
        "--window", type=int, metavar="N", help="run it in pieces of N tokens (default: 2048, or the models' context)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write all numbers")
    group.add_argument("--html", metavar="FILE", help="write a page with pictures, complete in itself")
    group.add_argument("--no-weights", dest="weights", action="store_false", help="do not compare the weights")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype",
        default="float32",
        metavar="NAME",
        help="compute both in float32 (default: what differs is then the models' own), bfloat16 or float16",
    )
    group.add_argument("--kv-cache-dtype", default="auto", metavar="NAME", help="of keys and values (default: --dtype)")
    group.add_argument("--kv-cache-dtype-b", metavar="NAME", help="of B's keys and values (default: the same as A's)")
    group.add_argument(
        "--device", default=_default("device"), metavar="NAME", help="cpu (default), npu (npu:1 is the second) or torch"
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")
    group.add_argument("--allow-pickle", action="store_true", help="read .bin weights (no code in them is run)")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold quantize`."""
    parser.add_argument("source", metavar="SRC", help="a folder, demo, or a name on the Hugging Face hub")
    parser.add_argument("destination", metavar="DST", help="the folder to write; it must be absent or empty")
    parser.add_argument(
        "--scheme",
        default="w8a8_dynamic",
        help="w8a8_dynamic (w8a8), int8 weights and activations; w8a16, int8 weights only; or w4a16, int4 weights, "
        "scaled by groups (default: %(default)s)",
    )
    parser.add_argument("--group-size", metavar="N", help="w4a16: 128 (default), 64, 32, or channel: one scale a row")
    parser.add_argument(
        "--max-shard-size", type=size, default="4GB", metavar="SIZE", help="the largest file (default: %(default)s)"
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="w8a8_dynamic: a text to fit outlier smoothing to; kept where it lowers the error",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=2048, metavar="N", help="how much of it (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin and .pth files, tensors only")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="at the end, run both models on a short text and say how far apart they are (default: yes)",
    )


def add_bench_requests(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eightfold bench requests`. What its tests decide is None unless it is given."""
    _add_model(parser)
    bench_requests.add_options(parser)
    add_engine(parser)
    parser.set_defaults(max_num_seqs=None, enable_prefix_caching=False)


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int | None, single: bool = False) -> None:
    """The fields of SamplingParams; `single` leaves out those that make no sense for one streamed answer."""
    group = parser.add_argument_group("sampling")

    def add(name: str, kind: Any, text: str, default: Any = None, **more: Any) -> None:
        group.add_argument(f"--{name}", type=kind, default=default, help=text, metavar=more.pop("metavar", "X"), **more)

    limit = "as many as the context holds" if max_tokens is None else str(max_tokens)
    add("max-tokens", int, f"the most tokens of an answer (default: {limit})", max_tokens, metavar="N")
    add("min-tokens", int, "the fewest, before which nothing stops it (default: 0)", 0, metavar="N")
    add("temperature", float, "0 always takes the likeliest token, so answers repeat (default: 0)", 0.0)
    add("top-k", int, "draw from the K likeliest tokens (default: 0, all)", 0, metavar="K")
    add("top-p", float, "draw from the likeliest tokens that make up this probability (default: 1)", 1.0, metavar="P")
    add("min-p", float, "drop tokens below this share of the likeliest's probability (default: 0)", 0.0, metavar="P")
    add("seed", int, "makes the draw repeatable, whatever runs beside it", metavar="N")
    add("repetition-penalty", float, "above 1 discourages tokens seen before (default: 1)", 1.0)
    add("presence-penalty", float, "-2 to 2, off each token already in the answer (default: 0)", 0.0)
    add("frequency-penalty", float, "-2 to 2, off a token for each time it is in the answer (default: 0)", 0.0)
    add("stop", str, "end before this text; may be repeated", action="append", metavar="TEXT")
    add("stop-token-ids", token_ids, 'end at any of these tokens, "2,13"', metavar="IDS")
    for name, text in (
        ("ignore-eos", "go on after the end-of-sequence token"),
        ("include-stop-str-in-output", "keep the stop text in the answer"),
    ):
        group.add_argument(f"--{name}", action="store_true", help=text)
    group.add_argument(
        "--skip-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave control tokens such as </s> out of the text (default: yes)",
    )
    if not single:
        add("n", int, "answers for each prompt (default: 1)", 1, metavar="N")
        add("logprobs", int, "with --json: log-probabilities of the N likeliest tokens, -1 for all", metavar="N")
        add("prompt-logprobs", int, "with --json: the same for the prompt", metavar="N")
        add("prompt-logprobs-start", int, "of the prompt, only from this token on (default: 0)", 0, metavar="N")
        add("logprob-token-ids", token_ids, 'with --json: log-probabilities of these tokens, "2,13"', metavar="IDS")


def add_engine(parser: argparse.ArgumentParser, text_only: bool = False) -> None:
    """The fields of EngineConfig but for `model` and `seed`, and what is accepted for compatibility.

    A `text_only` command can't do without a tokenizer.
    """
    group = parser.add_argument_group("engine")

    def add(name: str, kind: Any, text: str, metavar: str) -> None:
        default = _default(name.replace("-", "_"))
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", type=kind, default=default, help=text + shown, metavar=metavar)

    add("device", str, "cpu (native kernels), npu (Ascend; npu:1 is the second) or torch (the reference)", "NAME")
    add("dtype", str, "compute in float32, bfloat16, float16, or as the checkpoint is stored", "NAME")
    add("threads", int, "threads that each rank computes with (default: its share of the cores)", "N")
    add("max-model-len", int, "the most tokens of prompt and answer together (default: the model's)", "N")
    add("max-num-seqs", int, "the most sequences that run at once", "N")
    add("max-num-batched-tokens", int, "the most tokens of one step; longer prompts go in chunks", "N")
    add("block-size", int, "tokens in a page of keys and values; a device may round it up", "N")
    add("kv-cache-dtype", str, "how keys and values are kept: float32, bfloat16, float16, int8, or as --dtype", "NAME")
    add("kv-cache-memory-bytes", size, "memory for keys and values, 4GiB or 512M (default: what is free)", "SIZE")
    add("load-mode", str, "weights as mapped files (mmap), in huge pages (copy), or locked there (lock)", "NAME")
    add("tokenizer", str, "folder of another tokenizer (default: the model's)", "FOLDER")
    group.add_argument("--chat-template", metavar="FILE", help="Jinja file, or the template itself, to use instead")
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=_default("enable_prefix_caching"),
        help="reuse keys and values of a beginning seen before (default: yes)",
    )
    group.add_argument(
        "--exact-ranks",
        action=argparse.BooleanOptionalAction,
        default=_default("exact_ranks"),
        help="with int8 weights, several ranks answer bitwise as one does, by larger messages (default: yes)",
    )
    group.add_argument(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=_default("enforce_eager"),
        help="launch operations one by one; --no-enforce-eager captures decoding steps as graphs on devices that can "
        "(default: yes)",
    )
    if not text_only:
        group.add_argument("--skip-tokenizer-init", action="store_true", help="work on token ids alone")
    for name, text in (
        ("strict-kernels", "refuse to run where an operation would fall back to plain torch"),
        ("allow-pickle", "read .bin weights (with weights_only: no code in them is run)"),
        ("trust-remote-code", "accepted, and without effect: no code from a checkpoint is ever executed"),
    ):
        group.add_argument(f"--{name}", action="store_true", help=text)
    _add_ranks(parser)


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    """The fields of EngineConfig that share a model out among several processes."""
    group = parser.add_argument_group("several ranks (see docs/scaling.md)")

    def add(name: str, kind: Any, text: str, metavar: str = "N") -> None:
        group.add_argument(f"--{name}", type=kind, default=_default(name.replace("-", "_")), help=text, metavar=metavar)

    add(
        "tensor-parallel-size",
        int,
        "ranks that compute the model together (default: 1, or as many as torchrun started)",
    )
    add("moe-tensor-parallel-size", int, "ranks among which each expert is cut up (default: those that are left)")
    add("moe-expert-parallel-size", int, "groups of ranks among which the experts are shared out (default: 1)")
    group.add_argument("--enable-expert-parallel", action="store_true", help="share whole experts out among all ranks")
    add("nnodes", int, "machines, each with the same number of the ranks; start this command on every one (default: 1)")
    add("node-rank", int, "which of the machines this is, from 0, where the answers come out (default: 0)")
    add("master-addr", str, "machine 0's address (default: MASTER_ADDR)", "HOST")
    add("master-port", int, "a free port there (default: MASTER_PORT; on one machine any, else 20030)")
    add(
        "distributed-timeout-seconds",
        int,
        "a rank without a sign of life, or that stands still within a step, for so long is a failure (default: 8)",
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EngineConfig that were parsed."""
    names = [field.name for field in fields(EngineConfig) if field.name != "seed"]  # --seed is the requests'
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def is_follower(args: argparse.Namespace, environ: Mapping[str, str]) -> bool:
    """Whether this process is to be another rank than rank 0, by torchrun's environment or --node-rank."""
    if not hasattr(args, "node_rank"):
        return False
    by_torchrun = "WORLD_SIZE" in environ and environ.get("RANK", "0") != "0"
    return by_torchrun or args.node_rank > 0


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Raises EightfoldError on values outside their range."""
    names = [field.name for field in fields(SamplingParams)]
    params = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return SamplingParams(**params, detokenize=not getattr(args, "skip_tokenizer_init", False))


def size(text: str) -> int:
    """Bytes: 1048576, 512M, 1.5GiB. As with most tools K, M, G and T count in 1024s; with a B (GB) in 1000s."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2] and match[3].upper() != "B"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4GiB, 512M or 1073741824")
    base = 1000 if match[2] and match[3].upper() == "B" else 1024
    return int(float(match[1]) * base ** _EXPONENTS[match[2].upper()])


def token_ids(text: str) -> list[int]:
    """Numbers with commas or spaces between."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of token ids such as "1,2,3"')
    return [int(word) for word in words]


def _add_model(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("model", metavar="MODEL", help=f"a folder, demo, or a name on the Hugging Face hub{more}")


def _default(name: str) -> Any:
    return next(field.default for field in fields(EngineConfig) if field.name == name)

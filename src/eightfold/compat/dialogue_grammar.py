"""The words of `run_pa.sh` and `run_pa.py` → a `Dialogue`. No torch here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from eightfold.compat.environment import Environment
from eightfold.compat.layout import DEGREES, Layout, make_layout
from eightfold.data_files import numbered_lines, parse_json, read_text
from eightfold.types import EightfoldError

SCRIPT_QUESTION, SCRIPT_OUTPUT_LENGTH = "Who is the CEO of Google?", 10
QUESTION = "What's deep learning?"
_SCRIPT_DEGREES = ("dp", "tp", "moe_tp", "moe_ep")

Conversation = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a dialogue test is to do. Of `conversations`, `ids` and `texts` one is not empty. Lengths are in tokens."""

    model: str
    layout: Layout
    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    conversations: tuple[Conversation, ...] = ()
    chat: bool = False
    chat_template: str | None = None
    ignore_eos: bool = False
    load_tokenizer: bool = True
    batch: int = 1
    input_length: int = 1024
    output_length: int = 20
    context: int | None = None
    prefill_tokens: int | None = None
    block_size: int = 128
    notes: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """Mistakes become EightfoldError."""

    def error(self, message: str) -> NoReturn:
        raise EightfoldError(message)


def parse_script(words: Sequence[str], environment: Environment) -> Dialogue:
    """`run_pa.sh [-trust_remote_code] WEIGHTS [dp tp moe_tp moe_ep]`, and after these any option of run_pa.py.

    The visible devices are the ranks. Raises EightfoldError on words that don't make sense.
    """
    parser = _parser("run_pa.sh", "bash run_pa.sh [--trust_remote_code] WEIGHTS [dp tp moe_tp moe_ep] [options]")
    parser.add_argument("positional", nargs="*", metavar="WEIGHTS [dp tp moe_tp moe_ep]")
    parser.set_defaults(max_output_length=SCRIPT_OUTPUT_LENGTH)
    args = _parse(parser, words)
    weights, *degrees = [*([args.model_path] if args.model_path else []), *args.positional] or [""]
    if not weights:
        raise EightfoldError("run_pa.sh needs the folder of the weights: bash run_pa.sh WEIGHTS")
    if len(degrees) > len(_SCRIPT_DEGREES):
        raise EightfoldError(
            f"{degrees[len(_SCRIPT_DEGREES)]!r} is one word too many after WEIGHTS dp tp moe_tp moe_ep"
        )
    for name, word in zip(_SCRIPT_DEGREES, degrees, strict=False):
        if not word.lstrip("-").isdigit() or not word.isascii():
            raise EightfoldError(
                f"{name} is {word!r}; it must be a whole number (after WEIGHTS come dp tp moe_tp moe_ep)"
            )
        if getattr(args, name) != -1:
            raise EightfoldError(f"{name} is given twice, as {word} and by --{name}")
        setattr(args, name, int(word))
    args.model_path = weights
    return _dialogue(args, SCRIPT_QUESTION, environment, environment.devices, environment.devices_variable)


def parse_python(words: Sequence[str], environment: Environment) -> Dialogue:
    """`run_pa.py --model_path WEIGHTS …`, by itself (tp says the ranks) or under torchrun (which started them)."""
    args = _parse(_parser("run_pa.py", "python run_pa.py --model_path WEIGHTS [options]"), words)
    if not args.model_path:
        raise EightfoldError("--model_path is missing: the folder of the weights")
    return _dialogue(args, QUESTION, environment, None, "")


def normal_flags(words: Sequence[str], known: Sequence[str]) -> list[str]:
    """The words, with options as they are known: -trust_remote_code and --trust-remote-code are --trust_remote_code."""
    made = []
    for word in words:
        name, equals, value = word.partition("=")
        plain = "--" + name.lstrip("-").replace("-", "_")
        made.append(plain + equals + value if name.startswith("-") and plain in known else word)
    return made


def _parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    known = [option for action in parser._actions for option in action.option_strings]
    args, unknown = parser.parse_known_args(normal_flags(words, known))
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise EightfoldError(f"{word!r} is one word too many for {parser.prog}")
        near = get_close_matches("--" + word.lstrip("-").replace("-", "_"), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists the options"
        raise EightfoldError(f"option {word} is not known; {hint}")
    return args


def _parser(name: str, usage: str) -> Parser:
    parser = Parser(prog=name, usage=usage, allow_abbrev=False, description="MindIE-LLM's dialogue test, on Eightfold.")
    add = parser.add_argument
    add("--model_path", metavar="WEIGHTS", help="folder of weights and tokenizer")
    group = parser.add_argument_group("inputs (dict before ids before texts; a file of conversations before all)")
    add = group.add_argument
    add("--input_texts", nargs="+", metavar="TEXT", help="prompts, or a file of one prompt a line")
    add("--input_ids", nargs="+", metavar="IDS", help="prompts as token ids: 1,2,3 4,5")
    add("--input_file", metavar="FILE", help="with --is_chat_model: a conversation a line, [{role, content}, …]")
    add("--input_dict", metavar="JSON", help='[{"prompt": …, "adapter": …}]; adapters other than "base" are refused')
    group = parser.add_argument_group("limits")
    add = group.add_argument
    add("--max_prefill_batch_size", type=int, metavar="N", help="prompts computed at once, of full length")
    add("--max_batch_size", type=int, default=1, metavar="N", help="requests at once; a single prompt is put N times")
    add("--max_input_length", type=int, default=1024, metavar="N", help="a longer prompt is refused")
    add("--max_output_length", type=int, default=20, metavar="N", help="the most tokens of an answer")
    add("--max_position_embeddings", type=int, metavar="N", help="the most tokens of prompt and answer")
    add("--max_prefill_tokens", type=int, default=-1, metavar="N", help="prompt tokens computed at once")
    add("--block_size", type=int, default=128, metavar="N", help="tokens in a page of keys and values")
    group = parser.add_argument_group("mode")
    add = group.add_argument
    add("--chat_template", metavar="FILE", help="a Jinja template, or its file")
    add("--load_tokenizer", type=_boolean, default=True, metavar="BOOL", help="false: token ids in, token ids out")
    for flag in ("ignore_eos", "is_chat_model", "is_embedding_model", "trust_remote_code", "distributed_enable"):
        add(f"--{flag}", action="store_true")
    add("--enable_atb_torch", action="store_true")
    add("--kw_args", default="", metavar="JSON")
    add("--lora_modules", metavar="JSON")
    add("--max_loras", type=int, default=0, metavar="N")
    add("--max_lora_rank", type=int, default=0, metavar="N")
    group = parser.add_argument_group("ranks")
    for degree in DEGREES:
        group.add_argument(f"--{degree}", type=int, default=-1, metavar="N")
    return parser


def _dialogue(
    args: argparse.Namespace, question: str, environment: Environment, ranks: int | None, named: str
) -> Dialogue:
    _refuse(args)
    degrees = {name: getattr(args, name) for name in DEGREES}
    if environment.torchrun_ranks is not None:
        ranks, named = environment.torchrun_ranks, "torchrun's WORLD_SIZE"
    layout = make_layout(degrees, ranks, named)
    inputs, notes = _inputs(args, question)
    if args.max_prefill_batch_size is not None and args.max_prefill_tokens != -1:
        notes.append("--max_prefill_batch_size has no effect beside --max_prefill_tokens")
    if args.trust_remote_code:
        notes.append("--trust_remote_code has no effect: no code from a checkpoint is ever executed here")
    if args.enable_atb_torch:
        notes.append("--enable_atb_torch has no effect: it chooses among the reference's own graph engines")
    if args.chat_template is not None and not args.is_chat_model:
        raise EightfoldError("--chat_template is for chat; add --is_chat_model, or take it away")
    return Dialogue(
        model=args.model_path,
        layout=layout,
        chat=args.is_chat_model,
        chat_template=args.chat_template,
        ignore_eos=args.ignore_eos,
        load_tokenizer=args.load_tokenizer,
        batch=args.max_batch_size,
        input_length=args.max_input_length,
        output_length=args.max_output_length,
        context=args.max_position_embeddings,
        prefill_tokens=_prefill_tokens(args),
        block_size=args.block_size,
        notes=tuple(notes),
        **inputs,
    )


def _refuse(args: argparse.Namespace) -> None:
    """Raises EightfoldError on what this engine does not do, and on numbers out of range."""
    least = {"max_batch_size": 1, "max_input_length": 1, "max_output_length": 1, "max_position_embeddings": 2}
    for name, low in {**least, "max_prefill_batch_size": 1, "block_size": 1}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise EightfoldError(f"--{name} is {value}; it must be at least {low}")
    if args.max_prefill_tokens < 1 and args.max_prefill_tokens != -1:
        raise EightfoldError(f"--max_prefill_tokens is {args.max_prefill_tokens}; it must be at least 1, or -1")
    if args.is_embedding_model:
        raise EightfoldError("--is_embedding_model is refused: Mixtral generates text, and has no embedding output")
    if args.distributed_enable:
        raise EightfoldError(
            "--distributed_enable is refused: it hands requests to data-parallel copies; there is one engine here"
        )
    if args.lora_modules is not None or args.max_loras or args.max_lora_rank:
        raise EightfoldError(
            "--lora_modules, --max_loras, --max_lora_rank are refused: there is no LoRA here; merge the adapter first"
        )
    if args.kw_args.strip() not in ("", "{}"):
        raise EightfoldError(
            f"--kw_args {args.kw_args} is refused: there are no further arguments here (encrypted weights are not read)"
        )


def _prefill_tokens(args: argparse.Namespace) -> int | None:
    """As the reference counts: what is given, or the prefill batch times input and output; None where neither is."""
    if args.max_prefill_tokens != -1:
        return int(args.max_prefill_tokens)
    if args.max_prefill_batch_size is not None:
        return int(args.max_prefill_batch_size * (args.max_input_length + args.max_output_length))
    return None


def _inputs(args: argparse.Namespace, question: str) -> tuple[dict[str, Any], list[str]]:
    """The inputs that win (`question` where none are given), and notes on those that lose."""
    order = ("--input_file", "--input_dict", "--input_ids", "--input_texts")
    given = [name for name in order if getattr(args, name.removeprefix("--")) is not None]
    notes = [f"{name} has no effect beside {given[0]}" for name in given[1:]]
    if args.input_file is not None:
        if not args.is_chat_model:
            raise EightfoldError("--input_file holds conversations: add --is_chat_model")
        return {"conversations": tuple(_conversations(args.input_file))}, notes
    if args.input_dict is not None:
        return {"texts": tuple(_dict_prompts(args.input_dict))}, notes
    if args.input_ids is not None:
        if args.is_chat_model:
            raise EightfoldError("--input_ids are put to the model as they are: take --is_chat_model away")
        return {"ids": tuple(map(_ids, args.input_ids))}, notes
    if not args.load_tokenizer:
        raise EightfoldError("--load_tokenizer false leaves token ids only: give --input_ids")
    return {"texts": tuple(_texts(args.input_texts if args.input_texts is not None else [question]))}, notes


def _texts(words: Sequence[str]) -> list[str]:
    if len(words) == 1 and len(words[0]) < 4096 and "\n" not in words[0] and Path(words[0]).is_file():
        lines = [line for _, line in numbered_lines(read_text(Path(words[0])))]
        if not lines:
            raise EightfoldError(f"{words[0]} holds no prompt")
        return lines
    if "" in words:
        raise EightfoldError("--input_texts holds an empty text")
    return list(words)


def _ids(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        raise EightfoldError(f"--input_ids: {text!r} is not a list of token ids such as 1,2,3")
    return tuple(int(word) for word in words)


def _dict_prompts(text: str) -> list[str]:
    right = '[{"prompt": "…", "adapter": "base"}]'
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise EightfoldError(f"--input_dict is not valid JSON; it must be {right}") from None
    if not isinstance(value, list) or not value:
        raise EightfoldError(f"--input_dict must be a list such as {right}")
    for number, one in enumerate(value, 1):
        if not isinstance(one, dict) or not isinstance(one.get("prompt"), str) or not one["prompt"]:
            raise EightfoldError(f"--input_dict: entry {number} needs a prompt, as in {right}")
        if one.keys() - {"prompt", "adapter"}:
            raise EightfoldError(
                f"--input_dict: entry {number} has the key {min(one.keys() - {'prompt', 'adapter'})!r}; {right}"
            )
        if one.get("adapter") not in (None, "", "base"):
            raise EightfoldError(
                f"--input_dict: entry {number} asks for adapter {one['adapter']!r}; there is no LoRA here"
            )
    return [one["prompt"] for one in value]


def _conversations(name: str) -> list[Conversation]:
    found = []
    for number, line in numbered_lines(read_text(Path(name))):
        value = parse_json(line, f"{name}:{number}")
        good = isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
        if not good or any(not isinstance(one.get(key), str) for one in value for key in ("role", "content")):
            raise EightfoldError(f"{name}:{number} must be a list of messages with role and content")
        found.append(value)
    if not found:
        raise EightfoldError(f"{name} holds no conversation")
    return found


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]

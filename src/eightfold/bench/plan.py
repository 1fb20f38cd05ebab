"""What `bench offline` is asked to do, checked, and the engine that has room for it. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eightfold.bench.report import check_outputs
from eightfold.config import ModelConfig
from eightfold.types import EightfoldError

PAGE_SIZE = 32
WARM_UP = (64, 4)  # tokens of a prompt that reaches all experts, and of its answer
STARTUP_PROMPT = 512  # tokens that the process which measures loading runs, to see its memory at work
_ITEM_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class OfflineOptions:
    """The command's options, as `eightfold bench offline --help` explains them. Sizes are in tokens."""

    model: str | None = None
    shape: str | ModelConfig | None = None
    layers: int | None = None
    scheme: str = "w8a8"
    dtype: str | None = None
    kv_cache_dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    load_mode: str = "mmap"
    prefill: Sequence[int] = (64, 512, 2048)
    chunk: int = 512
    decode_batch: Sequence[int] = (1, 8, 32)
    depth: Sequence[int] = (0, 8192)
    output_len: int = 32
    distinct_prompts: bool = False
    repeat: int = 5
    startup: bool = True
    work_dir: str | None = None
    json: str | None = None
    png: str | None = None


@dataclass(frozen=True, slots=True)
class Test:
    """What one sample measures: a prompt of `tokens`, whole or in chunks, or `batch` sequences decoding at `depth`."""

    kind: str  # "prefill" or "decode"
    tokens: int = 0
    chunk: int = 0
    batch: int = 0
    depth: int = 0

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.tokens}" + (f" in {self.chunk}s" if self.chunk else "")
        return f"decode batch {self.batch} depth {self.depth}"


def check(options: OfflineOptions) -> None:
    """Raises EightfoldError on options that contradict one another, before anything is made or measured."""
    check_outputs(options.json, options.png)
    if (options.model is None) == (options.shape is None):
        raise EightfoldError("bench offline measures either a MODEL or random weights of a --shape: give one of them")
    least = {"--prefill": 1, "--decode-batch": 1, "--depth": 0}
    for name, sizes in (
        ("--prefill", options.prefill),
        ("--decode-batch", options.decode_batch),
        ("--depth", options.depth),
    ):
        for size in sizes:
            if size < least[name]:
                raise EightfoldError(f"{name} has {size}; it must be at least {least[name]}")
    numbers = (("--repeat", options.repeat, 1), ("--output-len", options.output_len, 1), ("--chunk", options.chunk, 0))
    for name, value, low in numbers:
        if value < low:
            raise EightfoldError(f"{name} is {value}; it must be at least {low}")
    if not planned(options):
        raise EightfoldError("nothing to measure: --prefill and --decode-batch are both empty")


def planned(options: OfflineOptions) -> list[Test]:
    """Prompts whole, then decoding, then the prompts that are longer than a chunk, in chunks."""
    tests = [Test("prefill", tokens=tokens) for tokens in options.prefill]
    tests += [Test("decode", batch=batch, depth=depth) for depth in options.depth for batch in options.decode_batch]
    if options.chunk:
        tests += [Test("prefill", tokens, options.chunk) for tokens in options.prefill if tokens > options.chunk]
    return tests


def engine_fields(options: OfflineOptions, folder: str, model: ModelConfig, tests: Sequence[Test]) -> dict[str, Any]:
    """Fields of an EngineConfig with room for these tests: steps that hold a whole prompt (or a chunk), pages for all.

    Raises EightfoldError if the model's context is too short for them.
    """
    longest = max([sum(WARM_UP), *(_length(test, options) for test in tests)])
    if longest > model.max_position_embeddings:
        raise EightfoldError(
            f"the longest sequence to measure has {longest} tokens and the model's context "
            f"{model.max_position_embeddings}: lower --prefill, --depth or --output-len"
        )
    pages = max(_pages(options, tests), -(-longest // PAGE_SIZE))
    token_bytes = planned_token_bytes((options.kv_cache_dtype, options.dtype, model.torch_dtype), model)
    return {
        "model": folder,
        "dtype": options.dtype or "auto",
        "kv_cache_dtype": options.kv_cache_dtype,
        "device": options.device,
        "threads": options.threads,
        "block_size": PAGE_SIZE,
        "max_model_len": longest,
        # As many sequences as all pages would serve, so that the loader takes them all.
        "max_num_seqs": max([1 + pages * PAGE_SIZE // longest, *(test.batch for test in tests)]),
        "max_num_batched_tokens": _step_tokens(tests),
        "kv_cache_memory_bytes": pages * PAGE_SIZE * token_bytes,
        "load_mode": options.load_mode,
        "skip_tokenizer_init": True,
    }


def _length(test: Test, options: OfflineOptions) -> int:
    """Tokens that a sequence of the test comes to."""
    return test.tokens + 1 if test.kind == "prefill" else test.depth + options.output_len + 3


def _step_tokens(tests: Sequence[Test]) -> int:
    """A chunk; or a whole prompt, and for decoding all that the prefix cache doesn't hold of a batch's prompts."""
    chunk = max((test.chunk for test in tests), default=0)
    return chunk or max([WARM_UP[0], *(max(test.tokens, test.batch * (PAGE_SIZE + 1)) for test in tests)])


def _pages(options: OfflineOptions, tests: Sequence[Test]) -> int:
    """Every prefix, and twice what a round uses up: then no prefix is ever the longest unused, to be given away."""
    prefixes: dict[int, int] = {}
    for test in tests:
        count = test.batch if options.distinct_prompts else 1
        prefixes[test.depth] = max(prefixes.get(test.depth, 0), count * (test.depth // PAGE_SIZE + 1))
    each = -(-(options.output_len + 3) // PAGE_SIZE) + 2
    used = sum(test.batch * each + test.tokens // PAGE_SIZE + 2 for test in tests)
    return sum(prefixes.values()) + 2 * used + sum(WARM_UP) // PAGE_SIZE + 2


def planned_token_bytes(dtypes: Sequence[str | None], model: ModelConfig) -> int:
    """Bytes of a token's keys and values in all layers, by the first of the dtypes that says something; or more, where
    the dtype is not known before loading."""
    known = next((name for name in dtypes if name not in (None, "auto")), "float32")
    item: int = _ITEM_BYTES.get(str(known), 4)
    scale = 4 if known == "int8" else 0  # for each token and head
    return 2 * model.num_layers * model.num_kv_heads * (model.head_dim * item + scale)

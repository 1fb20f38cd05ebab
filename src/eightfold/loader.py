"""From an EngineConfig to a running Engine: find the folder, check all of it, then load.

Where several ranks run one model, rank 0 has the engine (`load_engine`) and the others follow it (`follow`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eightfold.checkpoint import Checkpoint, read_ahead, resolve
from eightfold.config import EngineConfig, ModelConfig, load_model_config
from eightfold.engine import Engine
from eightfold.file_memory import LOAD_MODES
from eightfold.kv_cache import PagePool
from eightfold.machine import available_memory
from eightfold.model import Loader, Mixtral, stored_tensors
from eightfold.ops import Ops, get_ops
from eightfold.parallel import Group, Ranks, alone
from eightfold.parallel.place import Place
from eightfold.runner import Runner
from eightfold.scheduler import Scheduler
from eightfold.sharding import check_sizes, shard_of
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError, Progress

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
KV_DTYPES = {**DTYPES, "int8": torch.int8}
SCALE_BYTES = 4  # int8 keys and values have an fp32 scale for each token and head
LOG = logging.getLogger("eightfold")
FINGERPRINT_ELEMENTS = 256
DEFAULT_KV_SHARE = 8  # without a wish, keys and values may take this part of the free memory, or one full context


def load_engine(config: EngineConfig, progress: Progress | None = None, ranks: Ranks | None = None) -> Engine:
    """The engine of a rank that works alone, or of rank 0 of several.

    Raises EightfoldError, before anything large is loaded, if the folder, an option or the memory won't do, or the
    model can't be shared out so. `progress` hears of the bytes of weights that have come into memory.
    """
    check_options(config)
    folder = resolve(config.model)
    model_config = load_model_config(folder)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, folder, model_config)
    max_model_len = _context(config, model_config)
    runner = _load_runner(config, folder, model_config, ranks or alone(), progress)
    pool = PagePool(runner.num_pages, runner.page_size, config.enable_prefix_caching)
    scheduler = Scheduler(pool, config.max_num_seqs, config.max_num_batched_tokens)
    return Engine(
        runner,
        scheduler,
        tokenizer,
        model_config.eos_token_ids,
        max_model_len,
        config.seed,
        model_config.eos_sequences,
    )


def check_place(config: EngineConfig, place: Place) -> None:
    """What can be told from the options and the model's config before any rank is started.

    Raises EightfoldError if an option won't do, or `place.size` ranks can't share the model.
    """
    check_options(config)
    model_config = load_model_config(resolve(config.model))
    check_sizes(model_config, place.size, place.moe_tp, place.moe_ep)
    _context(config, model_config)
    _check_copies(config, place.local_size)


def follow(config: EngineConfig, ranks: Ranks) -> None:
    """What every rank but rank 0 does: load its part of the model, and run what rank 0 says until it closes its engine.

    Raises EightfoldError as `load_engine` does, and if its model, its weights or its kernels are not those of rank 0.
    """
    check_options(config)
    folder = resolve(config.model)
    _load_runner(config, folder, load_model_config(folder), ranks, None).follow()


def _load_runner(
    config: EngineConfig, folder: Path, model_config: ModelConfig, ranks: Ranks, progress: Progress | None
) -> Runner:
    ranks = replace(ranks, exact=config.exact_ranks)
    shard = shard_of(model_config, ranks)
    checkpoint = Checkpoint.open(folder, model_config, config.allow_pickle)
    checkpoint.check(stored_tensors(model_config))
    dtype = named_dtype("dtype", config.dtype, checkpoint.main_dtype)
    kv_dtype = kv_cache_dtype(config.kv_cache_dtype, dtype)
    ops = get_ops(config.device, dtype, config.threads, config.strict_kernels, graphs=not config.enforce_eager)
    if ranks.world.size > 1:
        _compare(ranks.world, model_config, checkpoint, ops)
        ranks = ranks.on(ops.device)
        shard = shard_of(model_config, ranks)
    loader = Loader(model_config, checkpoint, ops, shard)
    held = list(loader.held())
    ops.expect_weights(sum(tensor.nbytes for tensor in held))
    config = replace(config, block_size=ops.page_size(config.block_size))
    max_model_len = _context(config, model_config)
    mine = replace(model_config, num_kv_heads=shard.kv_heads)
    num_pages = _least(ranks.world, kv_pages(config, mine, max_model_len, kv_dtype, ops, ranks.local_size))
    loaded = _into_memory(checkpoint, held, folder, model_config, config, progress, ranks.local_size)
    if loaded is not checkpoint:
        loader = Loader(model_config, loaded, ops, shard)
    model = Mixtral(model_config, ops, loader, max_model_len)
    return Runner(model, num_pages, config.block_size, kv_dtype, ranks.world, ranks.watch)


def _compare(world: Group, model_config: ModelConfig, checkpoint: Checkpoint, ops: Ops) -> None:
    """Raises EightfoldError where this rank would not compute what rank 0 computes. That both run the same version with
    the same options is known already."""
    mine = {
        "the model's config": str(model_config),
        "the checkpoint": f"one of digest {_fingerprint(checkpoint)}",
        # Others round otherwise, and ranks that each route for themselves would drift apart.
        "the kind of kernels": ops.kernel("moe", model_config.scheme),
    }
    first = json.loads(world.broadcast(json.dumps(mine).encode() if world.rank == 0 else None))
    for what, value in mine.items():
        if first[what] != value:
            raise EightfoldError(
                f"rank {world.rank} differs from rank 0: {what} is {value} here, and {first[what]} there; all ranks "
                "need the same"
            )


def _fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of all names, shapes and dtypes, and of the beginning of each tensor: other weights, other digest."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        tensor = checkpoint.tensor(name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1)[:FINGERPRINT_ELEMENTS].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _least(world: Group, pages: int) -> int:
    """The smallest of the ranks' numbers of pages; the sum of vectors that are zero elsewhere shows all of them."""
    everyone = torch.zeros(world.size, dtype=torch.int32)
    everyone[world.rank] = min(pages, torch.iinfo(torch.int32).max)
    return int(world.all_reduce_sum(everyone).min())


def _into_memory(
    checkpoint: Checkpoint,
    held: Sequence[Tensor],
    folder: Path,
    model_config: ModelConfig,
    config: EngineConfig,
    progress: Progress | None,
    local_size: int,
) -> Checkpoint:
    """The checkpoint brought into memory as `--load-mode` says, as far as it fits: what this rank has `held` of it
    where it is mapped, all of it where it is copied or locked."""
    _check_copies(config, local_size)
    need, free = checkpoint.total_bytes, available_memory()
    if config.load_mode == "mmap":  # the ranks of a machine hold what they share once
        need = min(need, local_size * sum(tensor.nbytes for tensor in held))
    if need <= free:
        if config.load_mode == "mmap":
            read_ahead(held, progress)
            return checkpoint
        return Checkpoint.open(folder, model_config, config.allow_pickle, config.load_mode, progress)
    sizes = f"the weights take {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free"
    if config.load_mode != "mmap":
        raise EightfoldError(f"{sizes}, too little for --load-mode {config.load_mode}: use mmap, which reads from disk")
    LOG.warning("%s: what doesn't stay in memory is read from disk again at each use", sizes)
    return checkpoint


def _check_copies(config: EngineConfig, local_size: int) -> None:
    if config.load_mode == "copy" and local_size > 1:
        raise EightfoldError(
            f"--load-mode copy would copy the weights {local_size} times: use mmap or lock, which all ranks share"
        )


def load_tokenizer(config: EngineConfig, folder: Path, model_config: ModelConfig) -> Tokenizer:
    """The model's tokenizer, or the one that `config.tokenizer` names. Raises EightfoldError if it doesn't fit."""
    tokenizer = Tokenizer.load(resolve(config.tokenizer, weights=False) if config.tokenizer else folder)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise EightfoldError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model_config.vocab_size}; they "
            "do not belong together: give the model's own with --tokenizer"
        )
    return tokenizer


def check_options(config: EngineConfig) -> None:
    """Raises EightfoldError on an option outside its range."""
    for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise EightfoldError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if config.load_mode not in LOAD_MODES:
        raise EightfoldError(f"--load-mode is {config.load_mode!r}; it must be one of {', '.join(LOAD_MODES)}")


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values, and of their scales, that one token takes in all layers."""
    scale = SCALE_BYTES if dtype == torch.int8 else 0
    return 2 * config.num_layers * config.num_kv_heads * (config.head_dim * dtype.itemsize + scale)


def kv_pages(
    config: EngineConfig,
    model_config: ModelConfig,
    max_model_len: int,
    kv_dtype: torch.dtype,
    ops: Ops,
    local_size: int = 1,
) -> int:
    """How many pages to hold: `--kv-cache-memory-bytes`, or what serves the options without filling the memory, of
    which each of `local_size` ranks has its share.

    Raises EightfoldError, saying how many tokens fit, if that is less than one sequence of `max_model_len`.
    """
    page = config.block_size * kv_bytes_per_token(model_config, kv_dtype)
    needed = -(-max_model_len // config.block_size)
    useful = config.max_num_seqs * needed
    available = ops.available_memory() // local_size
    if config.kv_cache_memory_bytes is None:
        pages = min(useful, max(needed, available // DEFAULT_KV_SHARE // page))
    else:
        pages = min(useful, config.kv_cache_memory_bytes // page)
    if pages < needed:
        raise EightfoldError(
            f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes} holds {pages * config.block_size} tokens, fewer "
            f"than the context of {max_model_len}: raise it to {needed * page} or lower --max-model-len"
        )
    if pages * page > available:
        raise EightfoldError(
            f"keys and values of {pages * config.block_size} tokens need {pages * page / 2**30:.1f} GiB but "
            f"{available / 2**30:.1f} GiB are free, which hold {available // page * config.block_size} tokens: lower "
            "--max-model-len, or --kv-cache-memory-bytes where it is given"
        )
    return pages


def _context(config: EngineConfig, model_config: ModelConfig) -> int:
    limit = model_config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise EightfoldError(
            f"--max-model-len is {config.max_model_len}; this model was made for at most {limit} tokens"
        )
    return config.max_model_len or limit


def kv_cache_dtype(name: str, auto: torch.dtype, option: str = "kv-cache-dtype") -> torch.dtype:
    """What `--kv-cache-dtype` names; `auto` is the compute dtype. Raises EightfoldError on another name."""
    return named_dtype(option, name, auto, KV_DTYPES)


def named_dtype(option: str, name: str, auto: torch.dtype, known: Mapping[str, torch.dtype] = DTYPES) -> torch.dtype:
    """The dtype that an option names, of those `known`; "auto" is `auto`. Raises EightfoldError on any other name."""
    if name == "auto":
        return auto
    if name not in known:
        raise EightfoldError(f"--{option} is {name!r}; it must be auto or one of {', '.join(known)}")
    return known[name]

"""What decides about a run's answers, written into its records so that results of different runs never mix."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightfold.hub import resolve

# Options that change how fast an answer comes, and not what it is.
SPEED_ONLY = {
    *("model", "threads", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes"),
    *("load_mode", "enable_prefix_caching", "strict_kernels", "allow_pickle", "skip_tokenizer_init", "seed"),
    "enforce_eager",
}
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_SAMPLE = 1 << 16  # bytes of a weight file's beginning and end that are looked at


def run_settings(engine_options: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The model's fingerprint, the engine options that matter, and what the caller adds."""
    kept = {name: value for name, value in engine_options.items() if name not in SPEED_ONLY}
    return {"model": model_fingerprint(resolve(str(engine_options["model"]))), **kept, **more}


def model_fingerprint(folder: Path) -> str:
    """A number that changes with the model: its JSON files, and names, sizes, beginnings and ends of its weights."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.glob("*.json") if path.is_file()):
        total.update(path.name.encode() + path.read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()):
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            total.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            total.update(file.read(_SAMPLE))
    return total.hexdigest()[:16]

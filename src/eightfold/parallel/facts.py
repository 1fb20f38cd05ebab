"""What must be the same on all ranks before they talk, and the line that says what is not.

That they hold the same checkpoint is found later, by the loader, which opens it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import eightfold
from eightfold.config import EngineConfig

# Of each rank's own: where things lie on its machine, its threads, and what only rank 0 uses.
OWN = {"model", "tokenizer", "threads", "load_mode", "node_rank", "master_addr", "master_port", "skip_tokenizer_init"}
OWN |= {"seed", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "tensor_parallel_size"}
Facts = dict[str, Any]


def facts_of(config: EngineConfig, cores: Sequence[int]) -> Facts:
    """This rank's: version, options, and the cores it may use."""
    return {
        "version": eightfold.__version__,
        "build": _build(),
        "options": {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OWN},
        "cores": list(cores),
    }


def difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What of `other` contradicts rank 0's facts, in words for "rank N …"; None if nothing does."""
    if other["version"] != first["version"]:
        return f"runs eightfold {other['version']} where rank 0 runs {first['version']}: install the same everywhere"
    if other["build"] != first["build"]:
        return f"runs another build of eightfold {first['version']} than rank 0: install the same everywhere"
    for name, value in first["options"].items():
        if other["options"].get(name) != value:
            option = "--" + name.replace("_", "-")
            return f"was started with {option} {other['options'].get(name)} where rank 0 has {value}"
    return None


def _build() -> str:
    """A digest of the installed package, so that two states of one version are told apart."""
    home = Path(eightfold.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in home.rglob("*") if p.suffix in (".py", ".so")):
        digest.update(str(path.relative_to(home)).encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()

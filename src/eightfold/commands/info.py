"""`eightfold info`: what a model is and what it needs here. No weight is read, only the headers of its files."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eightfold.checkpoint import Checkpoint
from eightfold.commands import footprint
from eightfold.commands.footprint import Format, formats_of
from eightfold.config import ModelConfig, load_model_config
from eightfold.hub import resolve
from eightfold.loader import DTYPES, kv_cache_dtype
from eightfold.machine import available_memory, total_memory, usable_cores
from eightfold.ops import get_ops
from eightfold.quant import SCHEMES
from eightfold.types import EightfoldError
from eightfold.weight_files import find_weights

CONTEXTS = (4096, 16384, 32768, 65536)
BY_SCHEME = ("linear", "moe")
OTHERS = ("embed", "rms_norm", "rope_write_kv", "attention", "route")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def main(args: argparse.Namespace) -> int:
    folder = resolve(args.model, weights=False)  # 90 GB are not to be fetched for a question about them
    facts = gather(args, folder, load_model_config(folder))
    print(json.dumps(facts) if args.json else render(facts))
    return 0


def gather(args: argparse.Namespace, folder: Path, config: ModelConfig) -> dict[str, Any]:
    """All that is printed, as `--json` prints it. Sizes are bytes."""
    total, active = footprint.parameters(config)
    stored = _stored(folder, config)
    dtype = _dtype(args.dtype, stored, config)
    ops = get_ops(args.device, dtype, args.threads)
    usable = total_memory()
    return {
        "model": args.model,
        "architecture": {
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "query_heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "experts": config.num_experts,
            "experts_per_token": config.experts_per_token,
            "expert_width": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "context": config.max_position_embeddings,
            "sliding_window": config.sliding_window,
            "rope": config.rope.kind,
            "scheme": config.scheme,
        },
        "parameters": total,
        "active_parameters": active,
        "stored": stored,
        "machine": {"memory": usable, "free": available_memory(), "cores": usable_cores()},
        "formats": [_needs(config, _with_kv(form, args.kv_cache_dtype), usable, dtype) for form in formats_of(config)],
        "backend": {
            "device": args.device,
            "dtype": _name(dtype),
            "threads": ops.threads,
            "kernels": {op: {scheme: ops.kernel(op, scheme) for scheme in SCHEMES} for op in BY_SCHEME}
            | {op: {"any": ops.kernel(op, "dense")} for op in OTHERS},
        },
    }


def render(facts: dict[str, Any]) -> str:
    """`gather`'s facts for people."""
    a, machine, backend = facts["architecture"], facts["machine"], facts["backend"]
    window = f", sliding window of {a['sliding_window']:,}" if a["sliding_window"] else ""
    rows = [
        ("model", facts["model"]),
        ("layers", f"{a['layers']} of hidden size {a['hidden_size']:,}"),
        ("attention", f"{a['query_heads']} query and {a['kv_heads']} KV heads of size {a['head_dim']}{window}"),
        ("experts", f"{a['experts']} of width {a['expert_width']:,}, {a['experts_per_token']} for each token"),
        ("vocabulary", f"{a['vocabulary']:,} tokens"),
        ("context", f"{a['context']:,} tokens"),
        ("parameters", f"{_count(facts['parameters'])}, of which {_count(facts['active_parameters'])} for each token"),
        ("on disk", _stored_text(facts["stored"], a["scheme"])),
        (
            "machine",
            f"{_bytes(machine['memory'])} of memory ({_bytes(machine['free'])} free), {machine['cores']} cores",
        ),
    ]
    lines = [f"{name:<12}{value}" for name, value in rows]
    lines += ["", *_memory_table(facts["formats"]), ""]
    lines.append(f"kernels on {backend['device']}, computing in {backend['dtype']} on {backend['threads']} threads:")
    for operation, kernels in backend["kernels"].items():
        for scheme, kernel in kernels.items():
            what = operation if scheme == "any" else f"{operation} {scheme}"
            lines.append(f"  {what:<16}{kernel}")
    return "\n".join(lines)


def _stored(folder: Path, config: ModelConfig) -> dict[str, Any] | None:
    """What lies in the folder; None where it has no weights. Pickles are not opened."""
    weights = find_weights(folder)
    if weights is None or not weights.files:  # an index alone is what a description from the hub comes with
        return None
    dtypes = {}
    if not weights.pickled:
        dtypes = {_name(dtype): size for dtype, size in Checkpoint.open(folder, config).bytes_by_dtype().items()}
    size = sum(path.stat().st_size for path in weights.files)
    return {"bytes": size, "files": len(weights.files), "layout": weights.layout, "dtypes": dtypes}


def _dtype(wish: str, stored: dict[str, Any] | None, config: ModelConfig) -> torch.dtype:
    """The compute dtype, as the engine would choose it."""
    if wish != "auto":
        if wish not in DTYPES:
            raise EightfoldError(f"--dtype is {wish!r}; it must be auto or one of {', '.join(DTYPES)}")
        return DTYPES[wish]
    names = [*(stored["dtypes"] if stored else ()), config.torch_dtype, "bfloat16"]
    return next(DTYPES[name] for name in names if name in DTYPES)


def _with_kv(form: Format, name: str) -> Format:
    """The format with keys and values as `--kv-cache-dtype` names them."""
    return replace(form, kv_dtype=kv_cache_dtype(name, form.dtype))


def _needs(config: ModelConfig, form: Format, available: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a format takes, and for each context what is missing here and how many such machines would do."""
    longest = config.max_position_embeddings
    contexts = []
    for tokens in sorted({min(tokens, longest) for tokens in CONTEXTS} | {longest}):
        need = footprint.memory(config, form, tokens)
        contexts.append(
            {
                "tokens": tokens,
                "bytes": need,
                "short": max(0, need - available),
                "ranks": footprint.ranks_needed(config, form, tokens, available),
            }
        )
    return {
        "format": form.name,
        "own": form.scheme == config.scheme and (form.scheme != "dense" or form.dtype == dtype),
        "weights": footprint.weight_bytes(config, form),
        "kv_per_token": footprint.kv_bytes(config, form, 1),
        "contexts": contexts,
    }


def _memory_table(formats: list[dict[str, Any]]) -> list[str]:
    head = ["format", "weights", "KV a token"] + [f"{c['tokens']:,} tokens" for c in formats[0]["contexts"]]
    table = [head]
    for form in formats:
        cells = [form["format"] + " *" * form["own"], _bytes(form["weights"]), _bytes(form["kv_per_token"])]
        for context in form["contexts"]:
            ranks = f"{context['ranks']} ranks" if context["ranks"] else "no ranks do"
            cells.append(f"{_bytes(context['short'])} short, {ranks}" if context["short"] else "fits")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    reserve = _bytes(footprint.RESERVE)
    return [
        *lines,
        f"* this model's own. Counted: weights, one context, {reserve} for the rest; ranks are such machines.",
    ]


def _stored_text(stored: dict[str, Any] | None, scheme: str) -> str:
    if stored is None:
        return f"no weights (scheme {scheme})"
    dtypes = ", ".join(f"{name} {_bytes(size)}" for name, size in stored["dtypes"].items())
    files = "1 file" if stored["files"] == 1 else f"{stored['files']} files"
    return f"{_bytes(stored['bytes'])} in {files}, scheme {scheme}" + (f" ({dtypes})" if dtypes else " (pickled)")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _bytes(number: float) -> str:
    unit = 0
    while number >= 1024 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {UNITS[unit]}" if unit else f"{number:.0f} B"

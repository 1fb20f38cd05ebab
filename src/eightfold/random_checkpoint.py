"""Folders of random weights in the true shapes of Mixtral, to measure on: the real ones take hours to download."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eightfold.config import ModelConfig, RopeConfig, config_json
from eightfold.quant import Scheme, get_scheme
from eightfold.safetensors_file import CheckpointWriter, TensorSpec
from eightfold.types import EightfoldError

_MIXTRAL_8X7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    experts_per_token=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    rope=RopeConfig(1e6),
    bos_token_id=1,
    eos_token_ids=(2,),
)
SHAPES = {
    "8x7b": _MIXTRAL_8X7B,
    "8x22b": replace(
        _MIXTRAL_8X7B,
        vocab_size=32768,
        hidden_size=6144,
        intermediate_size=16384,
        num_layers=56,
        num_heads=48,
        max_position_embeddings=65536,
    ),
}
_STD = 0.02
_POOL = 1 << 24  # random numbers drawn for each width; a larger matrix has some rows several times


def random_checkpoint(
    dst: Path,
    shape: str | ModelConfig,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    scheme: str = "dense",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes an ordinary Hugging Face folder, without a tokenizer, and returns it.

    `shape` is a name in SHAPES or a config; `layers` overrides its number of layers. Matrices are normal with
    standard deviation 0.02, norms are 1. `progress` gets (bytes written, bytes in all). Raises EightfoldError on an
    unknown shape, a folder that holds something already, and a full disk.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        raise EightfoldError(f"shape {shape!r} is not known; there are {', '.join(SHAPES)}")
    config = SHAPES[shape] if isinstance(shape, str) else shape
    config = replace(
        config,
        num_layers=config.num_layers if layers is None else layers,
        scheme=get_scheme(scheme).name,
        torch_dtype=str(dtype).removeprefix("torch."),
    )
    if config.num_layers < 1:
        raise EightfoldError(f"a model of {config.num_layers} layers can't be made; it must have at least 1")
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise EightfoldError(f"{dst} exists and is not an empty folder; nothing is overwritten")
    maker = _Maker(config, dtype, seed)
    try:
        dst.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EightfoldError(f"cannot make folder {dst}: {error.strerror}") from None
    done = 0
    with CheckpointWriter(dst, maker.specs()) as writer:
        for name, tensor in maker.tensors():
            writer.write(name, tensor)
            done += tensor.nbytes
            if progress:
                progress(done, writer.total_bytes)
    (dst / "config.json").write_text(json.dumps(config_json(config), indent=2) + "\n")
    return dst


class _Maker:
    """The tensors of a model: rows drawn at random from a pool that is made and quantized once for each width."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, seed: int) -> None:
        self._config = config
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)
        self._dense, self._quantized = get_scheme("dense"), get_scheme(config.scheme)
        self._pools: dict[tuple[str, int], dict[str, Tensor]] = {}

    def specs(self) -> dict[str, TensorSpec]:
        """What `tensors` will make, in its order."""
        specs: dict[str, TensorSpec] = {}
        for name, shape, scheme in self._weights():
            if len(shape) == 1:
                specs[f"{name}.weight"] = TensorSpec(self._dtype, shape)
                continue
            for part, tensor in self._pool(shape[1], scheme).items():
                specs[f"{name}.{part}"] = TensorSpec(tensor.dtype, (shape[0], *tensor.shape[1:]))
            for part, tensor in scheme.constants((shape[0], shape[1])).items():
                specs[f"{name}.{part}"] = TensorSpec(tensor.dtype, tuple(tensor.shape))
        return specs

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape, scheme in self._weights():
            if len(shape) == 1:
                yield f"{name}.weight", torch.ones(shape, dtype=self._dtype)
                continue
            pool = self._pool(shape[1], scheme)
            rows = torch.randint(len(next(iter(pool.values()))), (shape[0],), generator=self._generator)
            for part, tensor in pool.items():
                yield f"{name}.{part}", tensor[rows]
            for part, tensor in scheme.constants((shape[0], shape[1])).items():
                yield f"{name}.{part}", tensor

    def _pool(self, width: int, scheme: Scheme) -> dict[str, Tensor]:
        """Stored parts of a matrix [rows, width]; every scheme keeps what belongs to a row in that row of its parts."""
        key = (scheme.name, width)
        if key not in self._pools:
            matrix = torch.randn(max(1, _POOL // width), width, generator=self._generator) * _STD
            self._pools[key] = scheme.quantize(matrix.to(self._dtype))
        return self._pools[key]

    def _weights(self) -> Iterator[tuple[str, tuple[int, ...], Scheme]]:
        """Name without ".weight", shape and scheme of every weight."""
        config, dense, quantized = self._config, self._dense, self._quantized
        hidden, width, size = config.hidden_size, config.intermediate_size, config.head_dim
        query, key = config.num_heads * size, config.num_kv_heads * size
        yield "model.embed_tokens", (config.vocab_size, hidden), dense
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm", (hidden,), dense
            for name, rows in (("q", query), ("k", key), ("v", key)):
                yield f"{prefix}.self_attn.{name}_proj", (rows, hidden), quantized
            yield f"{prefix}.self_attn.o_proj", (hidden, query), quantized
            yield f"{prefix}.post_attention_layernorm", (hidden,), dense
            yield f"{prefix}.block_sparse_moe.gate", (config.num_experts, hidden), dense
            for expert in range(config.num_experts):
                for name, shape in (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden))):
                    yield f"{prefix}.block_sparse_moe.experts.{expert}.{name}", shape, quantized
        yield "model.norm", (hidden,), dense
        if not config.tie_word_embeddings:
            yield "lm_head", (config.vocab_size, hidden), dense

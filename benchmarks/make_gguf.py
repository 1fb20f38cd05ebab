#!/usr/bin/env python3
"""A GGUF file of random weights in the true shapes of Mixtral 8x7B, for llama.cpp's benchmarks. Needs `gguf`.

Speed does not depend on the values, so quantized blocks are random bytes with small scales: drawn once, and written
again and again from another place of the pool, so that every tensor has memory of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HIDDEN, WIDTH, EXPERTS, CHOSEN, HEADS, KV_HEADS, HEAD, VOCABULARY = 4096, 14336, 8, 2, 32, 8, 128, 32000
CONTEXT = 32768
POOL = 1 << 26  # bytes of random blocks
WRITE = 1 << 24  # bytes written at a time


class Kind(NamedTuple):
    """A quantization: weights and bytes of a block, and where in it there are half-precision scales of what size."""

    name: str
    weights: int
    bytes: int
    scales: dict[int, float]


KINDS = {
    "q8_0": Kind("Q8_0", 32, 34, {0: 2.7e-4}),
    "q6_k": Kind("Q6_K", 256, 210, {208: 1.5e-5}),
    "q4_k": Kind("Q4_K", 256, 144, {0: 1.4e-4, 2: 1.05e-3}),
}


class Tensor(NamedTuple):
    """A name, its shape with the rows first, and whether it is "quantized", "ones" or a "router"."""

    name: str
    shape: tuple[int, ...]
    fill: str


def tensors(layers: int) -> Iterator[Tensor]:
    """All of the model's, by the names that llama.cpp gives them."""
    yield Tensor("token_embd.weight", (VOCABULARY, HIDDEN), "quantized")
    yield Tensor("output.weight", (VOCABULARY, HIDDEN), "quantized")
    yield Tensor("output_norm.weight", (HIDDEN,), "ones")
    for layer in range(layers):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            yield Tensor(f"{prefix}{name}.weight", (HIDDEN,), "ones")
        for name, rows in (("q", HEADS * HEAD), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD)):
            yield Tensor(f"{prefix}attn_{name}.weight", (rows, HIDDEN), "quantized")
        yield Tensor(f"{prefix}attn_output.weight", (HIDDEN, HEADS * HEAD), "quantized")
        yield Tensor(f"{prefix}ffn_gate_inp.weight", (EXPERTS, HIDDEN), "router")
        for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            yield Tensor(f"{prefix}ffn_{name}_exps.weight", (EXPERTS, *shape), "quantized")


def random_blocks(kind: Kind, generator: np.random.Generator) -> Any:
    """[blocks · bytes] uint8: random, with the scales in their places."""
    blocks = generator.integers(0, 256, (POOL // kind.bytes, kind.bytes), dtype=np.uint8)
    for place, scale in kind.scales.items():
        blocks[:, place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(-1)


def from_pool(pool: Any, start: int, size: int) -> Any:
    """`size` bytes of the pool from `start` on, and from its beginning again when it ends."""
    out = np.empty(size, np.uint8)
    done = 0
    while done < size:
        piece = pool[start : start + min(WRITE, size - done)]
        out[done : done + len(piece)] = piece
        done += len(piece)
        start = (start + len(piece)) % len(pool)
    return out


def describe(writer: Any, layers: int, file_type: Any) -> None:
    """The keys that llama.cpp needs, and a vocabulary without meaning: the benchmarks draw token ids."""
    writer.add_name(f"random-mixtral-{layers}-layers")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CHOSEN)
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]  # kinds: 1 a piece of text, 2 unknown, 3 control, 6 a byte
    single = [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    pieces = [(f"▁{number}", 1) for number in range(VOCABULARY - len(special) - len(single))]
    words = [*special, *single, *pieces]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word.encode() for word, _ in words])
    writer.add_token_types([kind for _, kind in words])
    writer.add_token_scores([-float(number) for number in range(VOCABULARY)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write(path: Path, layers: int, kind: Kind) -> None:
    """The file."""
    gguf: Any = import_module("gguf")
    quantization = gguf.GGMLQuantizationType[kind.name]
    generator = np.random.default_rng(0)
    pool = random_blocks(kind, generator)
    writer = gguf.GGUFWriter(str(path), "llama")
    file_types = {"Q8_0": "MOSTLY_Q8_0", "Q6_K": "MOSTLY_Q6_K", "Q4_K": "MOSTLY_Q4_K_S"}
    describe(writer, layers, gguf.LlamaFileType[file_types[kind.name]])
    for tensor in tensors(layers):
        if tensor.fill == "quantized":
            row = tensor.shape[-1] // kind.weights * kind.bytes
            shape = (*tensor.shape[:-1], row)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), quantization)
        else:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * int(np.prod(tensor.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors(layers):
        if tensor.fill == "quantized":
            size = int(np.prod(tensor.shape)) // kind.weights * kind.bytes
            start = int(generator.integers(len(pool) // kind.bytes)) * kind.bytes
            writer.write_tensor_data(from_pool(pool, start, size))
        elif tensor.fill == "ones":
            writer.write_tensor_data(np.ones(tensor.shape, np.float32))
        else:
            writer.write_tensor_data(generator.standard_normal(tensor.shape, np.float32) * np.float32(0.02))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--type", choices=tuple(KINDS), default="q8_0")
    args = parser.parse_args()
    write(args.path, args.layers, KINDS[args.type])
    print(f"{args.path}: {args.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

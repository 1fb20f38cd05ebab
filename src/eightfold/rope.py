"""Tables of the rotary position embedding, for every kind of scaling that `config.ROPE_KINDS` lists."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eightfold.config import RopeConfig
from eightfold.types import EightfoldError


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """→ (cos, sin), fp32 [positions, head_dim / 2] each: column i turns the i-th pair of a head.

    The arithmetic is transformers' own, operation by operation, so that the tables are bitwise those that a model
    was trained with. Raises EightfoldError on a kind of scaling that is not implemented.
    """
    frequencies, amplitude = _frequencies(rope, head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies  # [positions, head_dim / 2]
    return angles.cos() * amplitude, angles.sin() * amplitude


def _frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """→ angle per position [head_dim / 2] fp32, and what cosine and sine are multiplied by."""
    periods: Tensor = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaling = dict(rope.scaling)
    if rope.kind == "default":
        return 1.0 / periods, 1.0
    if rope.kind == "linear":
        return (1.0 / periods) / scaling["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(1.0 / periods, scaling), 1.0
    if rope.kind == "yarn":
        return _yarn(periods, rope.theta, head_dim, scaling), _yarn_amplitude(scaling)
    raise EightfoldError(f"rope scaling {rope.kind!r} is not implemented; there are default, linear, llama3 and yarn")


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, and those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    long, short = wavelengths > context / low, wavelengths < context / high
    stretched = torch.where(long, frequencies / factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    return torch.where(long | short, stretched, blended)


def _yarn(periods: Tensor, theta: float, head_dim: int, scaling: dict[str, Any]) -> Tensor:
    """Between two columns of the table the frequencies go over, linearly, from kept to divided by the factor."""
    context = scaling["original_max_position_embeddings"]

    def column(rotations: float) -> float:
        """Where a pair turns `rotations` times over the original context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = column(scaling.get("beta_fast", 32)), column(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp; the division below needs a width
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    frequencies: Tensor = 1.0 / (scaling["factor"] * periods) * (1 - kept) + 1.0 / periods * kept
    return frequencies


def _yarn_amplitude(scaling: dict[str, Any]) -> float:
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def grown(by: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * by * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown(1)

"""The numbers that compare two models, each from tensors alone. A is what B is measured against.

Everything is summed in fp64, and equal inputs give exactly 0, 1 and 1: the same products in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def relative(difference: Tensor, size: Tensor) -> Tensor:
    """|b − a| and |a| → |b − a| / |a|: 0 where both are 0, and 1 where only |a| is, for want of something better."""
    return torch.where(size > 0, difference / size, (difference > 0).to(difference.dtype))


def similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states a, b [T, H] → each token's relative error |b − a| / |a| and its cosine, [T] fp64 each.

    Of two zero vectors the cosine is 1, of a zero vector and another 0.
    """
    a, b = a.double(), b.double()
    aa, bb, ab = (a * a).sum(-1), (b * b).sum(-1), (a * b).sum(-1)
    sizes = (aa * bb).sqrt()
    cosines = torch.where(sizes > 0, ab / sizes, ((aa == 0) & (bb == 0)).double())
    return relative((b - a).square().sum(-1).sqrt(), aa.sqrt()), cosines


class Routing(NamedTuple):
    """Which tokens went the same way in a layer, [T] bool each."""

    same_set: Tensor  # all K experts are the same, in any order
    same_first: Tensor  # the expert with the largest weight is


def routing(a: Tensor, b: Tensor) -> Routing:
    """The experts chosen by A and B, [T, K] each with the best first."""
    return Routing((a.sort(-1).values == b.sort(-1).values).all(-1), a[:, 0] == b[:, 0])


class Outcomes(NamedTuple):
    """What two models say at each of T positions, [T] each; probabilities and logarithms are fp64, natural."""

    kl: Tensor  # KL(A ‖ B) of the next token's distribution
    best_a: Tensor  # int64, A's likeliest token; the lowest id of equals
    best_b: Tensor
    prob_a: Tensor  # A's probability of its likeliest token
    prob_b: Tensor  # B's probability of its own likeliest token
    loss_a: Tensor  # −log of the probability that A gives the token that does follow
    loss_b: Tensor


def outcomes(a: Tensor, b: Tensor, following: Tensor) -> Outcomes:
    """Logits a, b [T, V] and the tokens that follow [T] (−1: none does, and the losses are NaN)."""
    log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    # Rounding can leave a sum of nearly equal terms just below zero, where no divergence can be.
    kl = (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0)
    (top_a, best_a), (top_b, best_b) = log_a.max(-1), log_b.max(-1)
    known, at = following >= 0, following.clamp(min=0)[:, None]
    loss_a, loss_b = (torch.where(known, -log.gather(-1, at)[:, 0], torch.nan) for log in (log_a, log_b))
    return Outcomes(kl, best_a, best_b, top_a.exp(), top_b.exp(), loss_a, loss_b)

"""Logits → tokens and log-probabilities. Each sequence draws from a generator of its own, one number a token, so its
tokens do not depend on what runs beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eightfold.types import SamplingParams

TOP_P_FIRST = 512  # a nucleus is nearly always within this many tokens: sorting the vocabulary is the exception

TokenLogprobs = list[tuple[int, float, int]]  # (token, log-probability, rank from 1), the chosen token first


@dataclass(slots=True)
class SamplerState:
    """What sampling remembers of a sequence. `banned` tokens can't be chosen before `min_tokens` are out."""

    params: SamplingParams
    generator: random.Random
    prompt: frozenset[int]  # tokens of the prompt, for the repetition penalty
    banned: Collection[int] = ()
    counts: dict[int, int] = field(default_factory=dict)  # of tokens put out


@dataclass(frozen=True, slots=True)
class Sample:
    """A chosen token; None where the logits hold no number to choose by."""

    token: int | None
    logprobs: TokenLogprobs | None = None


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sample]:
    """logits [n, V] fp32, one state a row → one Sample a row."""
    best, greedy = logits.max(-1)  # NaN counts as the largest, so it shows here
    tokens = greedy.tolist()
    samples = []
    for row, state, token, high in zip(logits, states, tokens, best.tolist(), strict=True):
        if not math.isfinite(high):
            samples.append(Sample(None))
            continue
        params = state.params
        adjusted = _adjust(row, state)
        if params.temperature == 0:
            chosen = token if adjusted is row else int(adjusted.argmax())
        else:
            chosen = _draw(adjusted / params.temperature, params, state.generator.random())
        logprobs = None
        if params.logprobs is not None or params.logprob_token_ids:
            logprobs = token_logprobs(row, chosen, params.logprobs or 0, params.logprob_token_ids or ())
        state.counts[chosen] = state.counts.get(chosen, 0) + 1
        samples.append(Sample(chosen, logprobs))
    return samples


def token_logprobs(row: Tensor, token: int, count: int, also: Sequence[int] = ()) -> TokenLogprobs:
    """row [V] logits → log-probability and rank of the token, of the `count` best (-1: all), and of those in `also`;
    each token once."""
    logprobs = row.log_softmax(-1)

    def entry(one: int) -> tuple[int, float, int]:
        own = logprobs[one]
        return one, float(own), int((logprobs > own).sum()) + 1

    result = [entry(token)]
    values, ids = logprobs.topk(len(row) if count == -1 else min(count, len(row)))
    ranked = enumerate(zip(ids.tolist(), values.tolist(), strict=True), 1)
    result += [(i, value, rank) for rank, (i, value) in ranked if i != token]
    known = {i for i, _, _ in result}
    return result + [entry(one) for one in dict.fromkeys(also) if one not in known]


def _adjust(row: Tensor, state: SamplerState) -> Tensor:
    """Penalties, biases and bans; the row itself where there are none."""
    params, counts = state.params, state.counts
    early = sum(counts.values()) < params.min_tokens and state.banned
    penalized = params.repetition_penalty != 1 or (counts and (params.presence_penalty or params.frequency_penalty))
    if not (early or penalized or params.logit_bias):
        return row
    row = row.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(state.prompt | counts.keys()), dtype=torch.long, device=row.device)
        value = row[seen]
        row[seen] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
    for token, count in counts.items():
        row[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    if early:
        row[list(state.banned)] = -math.inf
    return row


def _draw(row: Tensor, params: SamplingParams, uniform: float) -> int:
    """row [V], already divided by the temperature → the token at `uniform` of the kept tokens' distribution.

    Tokens are kept in this order: top_k, then of their distribution top_p, then min_p relative to the best.
    """
    size = len(row)
    values, ids = row, torch.arange(size, device=row.device)
    total = row.logsumexp(-1)
    if 0 < params.top_k < size:
        values, ids = row.topk(params.top_k)
        total = values.logsumexp(-1)
    elif params.top_p < 1:
        values, ids = row.topk(min(TOP_P_FIRST, size))
        if (values - total).exp().double().sum() < params.top_p:
            values, ids = row.sort(descending=True, stable=True)
    probs = (values - total).double().exp()
    if params.top_p < 1:
        probs[probs.cumsum(-1) - probs >= params.top_p] = 0  # the token that crosses the limit is kept
    if params.min_p:
        probs[probs < params.min_p * probs.max()] = 0
    cumulative = probs.cumsum(-1)
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return int(ids[min(index, int(probs.nonzero()[-1]))])

"""Sampling against the definitions, and its independence from what runs beside it."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from eightfold.sampling import SamplerState, sample, token_logprobs
from eightfold.types import EightfoldError, SamplingParams


def state(prompt: frozenset[int] = frozenset(), banned: tuple[int, ...] = (), **params: Any) -> SamplerState:
    return SamplerState(SamplingParams(**params), random.Random(params.get("seed") or 0), prompt, banned)


def draws(logits: Tensor, count: int = 4000, **params: Any) -> Counter[int]:
    one = state(max_tokens=None, **params)
    return Counter(int(sample(logits[None], [one])[0].token or 0) for _ in range(count))


def test_greedy_takes_the_first_of_the_best() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 3.0]]), [state(temperature=0)])[0].token == 1


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        probs = (logits / temperature).softmax(-1)
        seen = draws(logits, temperature=temperature)
        for token, prob in enumerate(probs.tolist()):
            assert abs(seen[token] / 4000 - prob) < 4 * math.sqrt(prob * (1 - prob) / 4000)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {0, 1}),  # 0.5 alone is too little
        ({"top_p": 0.49}, {0}),
        ({"min_p": 0.45}, {0, 1}),
        ({"top_k": 3, "top_p": 0.9}, {0, 1, 2}),
        ({"top_k": 2, "min_p": 0.7}, {0}),
    ],
)
def test_which_tokens_are_kept(params: dict[str, Any], kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, 2000, **params)) == kept


def test_top_p_beyond_the_first_tokens_sorts_them_all() -> None:
    logits = torch.zeros(5000)
    logits[0] = 1.0
    seen = draws(logits, 3000, top_p=0.95)
    assert len(seen) > 1500


def test_penalties_and_bias() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    assert sample(logits, [state(frozenset({0}), temperature=0, repetition_penalty=1.2)])[0].token == 1
    assert sample(logits, [state(temperature=0, logit_bias={2: 5.0})])[0].token == 2
    for name in ("presence_penalty", "frequency_penalty"):
        one = state(temperature=0, max_tokens=None, **{name: 0.15})
        assert [sample(logits, [one])[0].token for _ in range(2)] == [0, 1]
    one = state(temperature=0, frequency_penalty=0.06, max_tokens=None)
    assert [sample(logits, [one])[0].token for _ in range(4)] == [0, 0, 1, 0]
    assert torch.equal(logits, torch.tensor([[2.0, 1.9, -1.0]])), "the model's logits are left alone"


def test_banned_until_min_tokens() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    one = state(banned=(0,), temperature=0, min_tokens=2)
    assert [sample(logits, [one])[0].token for _ in range(3)] == [1, 1, 0]


def test_logprobs_are_the_models_own() -> None:
    row = torch.tensor([1.0, 3.0, 2.0, 0.0])
    logprobs = row.log_softmax(-1).tolist()
    got = sample(row[None], [state(temperature=0, logit_bias={3: 9.0}, logprobs=2)])[0]
    assert got.token == 3
    assert got.logprobs is not None
    assert [(token, rank) for token, _, rank in got.logprobs] == [(3, 4), (1, 1), (2, 2)]
    assert [value for _, value, _ in got.logprobs] == pytest.approx([logprobs[3], logprobs[1], logprobs[2]])
    assert len(token_logprobs(row, 1, -1)) == 4
    asked = sample(row[None], [state(temperature=0, logprob_token_ids=[3, 1, 2])])[0].logprobs
    assert asked == [
        (1, pytest.approx(logprobs[1]), 1),
        (3, pytest.approx(logprobs[3]), 4),
        (2, pytest.approx(logprobs[2]), 2),
    ]
    assert [token for token, _, _ in token_logprobs(row, 1, 2, (3, 2, 3))] == [1, 2, 3]
    assert token_logprobs(row, 2, 0) == [(2, pytest.approx(logprobs[2]), 2)]


def test_neighbours_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator)
    options: list[dict[str, Any]] = [{"temperature": 0.8, "seed": i, "top_p": 0.9} for i in range(6)]
    alone = [sample(logits[i : i + 1], [state(**options[i])])[0].token for i in range(6)]
    together = [one.token for one in sample(logits, [state(**option) for option in options])]
    assert alone == together


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_numbers_fail_alone(bad: float) -> None:
    logits = torch.zeros(2, 4)
    logits[0, 2] = bad
    first, second = sample(logits, [state(temperature=0), state(temperature=0)])
    assert first.token is None and second.token == 0


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"n": 0}, "n is 0"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x", "detokenize": False}, "detokenize"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"logprobs": -2}, "logprobs"),
        ({"prompt_logprobs_start": -1}, "prompt_logprobs_start"),
        ({"logprob_token_ids": [1.5]}, "logprob_token_ids"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], word: str) -> None:
    with pytest.raises(EightfoldError, match=word):
        SamplingParams(**params)

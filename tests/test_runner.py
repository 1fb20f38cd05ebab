"""A step's batch, and what the last layer needs of it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from eightfold import LLM
from eightfold.ops import Batch, TailedBatch
from eightfold.runner import make_batch, with_tail
from eightfold.types import Plan

PAGE = 32


def batch(logit_rows: list[int]) -> Batch:
    """Rows of 5, 1, 3 and 40 tokens, at the ends of 9, 30, 3 and 70."""
    counts, lens = [5, 1, 3, 40], [9, 30, 3, 70]
    starts = [sum(counts[:row]) for row in range(5)]
    plan = Plan(list(range(100, 149)), starts, lens, [[3], [1], [2], [6, 4, 5]], logit_rows)
    return make_batch(plan, PAGE, torch.device("cpu"))


@pytest.mark.parametrize("logit_rows", [[4, 5, 8, 48], [5, 48], [2, 3, 4, 8], [20, 21, 22], [6, 47, 48], []])
def test_a_tail_is_each_rows_tokens_from_the_first_wanted_on(logit_rows: list[int]) -> None:
    whole = with_tail(batch(logit_rows))
    assert isinstance(whole, TailedBatch) and whole.logit_rows.tolist() == logit_rows
    row_of = lambda t: next(row for row, start in reversed(list(enumerate([0, 5, 6, 9]))) if t >= start)  # noqa: E731
    first = {row_of(t): t for t in reversed(logit_rows)}
    ends = [5, 6, 9, 49]
    kept = [t for row in sorted(first) for t in range(first[row], ends[row])]
    assert whole.of_tail.tolist() == kept
    tail = whole.tail
    assert tail.query_starts.diff().tolist() == [ends[row] - first[row] for row in sorted(first)]
    assert [kept[index] for index in tail.logit_rows.tolist()] == logit_rows
    for name in ("ids", "positions", "slots"):
        assert getattr(tail, name).tolist() == [getattr(whole, name)[t].item() for t in kept]
    for name in ("kv_lens", "page_table"):
        assert getattr(tail, name).tolist() == [getattr(whole, name)[row].tolist() for row in sorted(first)]
    for field in fields(Batch):
        assert getattr(tail, field.name).dtype == getattr(whole, field.name).dtype


def test_a_tail_that_would_be_everything_is_left_out() -> None:
    assert type(with_tail(batch([0, 5, 6, 9]))) is Batch
    assert type(with_tail(batch([*range(49)]))) is Batch


def test_devices_get_a_plain_batch() -> None:
    assert type(with_tail(batch([48])).to("cpu")) is Batch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "torch"])
@pytest.mark.parametrize("logit_rows", [[4, 5, 8, 48], [2, 3, 4, 30, 31, 48], []])
@torch.inference_mode()
def test_logits_do_not_depend_on_the_tail(dtype: str, device: str, logit_rows: list[int]) -> None:
    llm = LLM("demo", dtype=dtype, device=device, max_model_len=256, max_num_seqs=4, threads=1)  # 32 pages
    runner = llm.engine._runner
    for kv in runner._pages:  # of what came before these tokens
        kv.k.normal_()
        kv.v.normal_()
    whole = batch(logit_rows)
    without, using = (runner._model.forward(one, runner._pages) for one in (whole, with_tail(whole)))
    assert without.shape == (len(logit_rows), 2048)
    if device == "cpu":
        assert torch.equal(without, using)
    else:
        torch.testing.assert_close(without, using, rtol=0, atol=1e-4 if dtype == "float32" else 0.1)

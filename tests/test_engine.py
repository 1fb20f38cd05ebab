"""The engine by invariance: a request's answer is the same alone, in any batch, chunked, cached, preempted."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eightfold import LLM, EightfoldError, RequestOutput, RequestOutputKind, SamplingParams
from eightfold.types import Request
from tiny import save_hf

VOCAB = 320
BITWISE = {"torch": False, "cpu": True}  # torch's matrix products sum in an order that depends on the batch
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_hf(path, vocab_size=VOCAB)
    return path


def make(folder: Path, device: str, **options: Any) -> LLM:
    options = {"max_model_len": 128, "skip_tokenizer_init": True, **options}
    return LLM(str(folder), device=device, **options)


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Prompts of 1 to 70 tokens, the first `shared` of them the same for all."""
    rng = random.Random(seed)
    start = [rng.randrange(VOCAB) for _ in range(shared)]
    return [start + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 71 - shared))] for _ in range(count)]


def same(a: RequestOutput, b: RequestOutput, bitwise: bool) -> None:
    assert a.prompt_token_ids == b.prompt_token_ids
    for one, other in zip(a.outputs, b.outputs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        for mine, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            if bitwise:
                assert mine == theirs
            else:
                shared = mine.keys() & theirs.keys()
                assert all(abs(mine[t].logprob - theirs[t].logprob) < 1e-4 for t in shared)


@pytest.mark.parametrize("device", BITWISE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"block_size": 4},
        {"block_size": 64},
        {"max_num_seqs": 2},
        {"enable_prefix_caching": False},
        {"threads": 1},
        {"block_size": 8, "kv_cache_memory_bytes": 8 * 16 * 2 * 3 * 4 * 8 * 4},  # 128 tokens in all: preempts
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_batched_is_as_alone(folder: Path, device: str, options: dict[str, Any]) -> None:
    requests = prompts(9, shared=20)
    alone = make(folder, device, enable_prefix_caching=False)
    expected = [alone.generate(ids, GREEDY)[0] for ids in requests]
    llm = make(folder, device, **options)
    for a, b in zip(expected, llm.generate(requests, GREEDY), strict=True):
        same(a, b, BITWISE[device])
    if "kv_cache_memory_bytes" in options:
        assert llm.engine.scheduler.num_preemptions > 0
    for a, b in zip(expected, llm.generate(requests, GREEDY), strict=True):  # now from the prefix cache
        same(a, b, BITWISE[device])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"block_size": 4},
        {"threads": 1},
        {"block_size": 8, "kv_cache_memory_bytes": 128 * 3 * 2 * 4 * (8 + 4)},  # 128 tokens in all: preempts
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_int8_keys_and_values_batched_are_as_alone(folder: Path, dtype: str, options: dict[str, Any]) -> None:
    requests, common = prompts(9, shared=20), {"dtype": dtype, "kv_cache_dtype": "int8"}
    alone = make(folder, "cpu", enable_prefix_caching=False, **common)
    expected = [alone.generate(ids, GREEDY)[0] for ids in requests]
    llm = make(folder, "cpu", **common, **options)
    for _ in range(2):  # the second time from the prefix cache
        for a, b in zip(expected, llm.generate(requests, GREEDY), strict=True):
            same(a, b, bitwise=True)
    if "kv_cache_memory_bytes" in options:
        assert llm.engine.scheduler.num_preemptions > 0


def test_int8_keys_and_values_are_close_to_those_kept_whole(folder: Path) -> None:
    """The same first logits to int8's precision, and not the same bits: the option does something."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=-1)
    apart = []
    for ids in prompts(6):
        whole, narrow = (make(folder, "cpu", kv_cache_dtype=kind).generate(ids, params)[0] for kind in ("auto", "int8"))
        (mine,), (theirs,) = whole.outputs[0].logprobs or [], narrow.outputs[0].logprobs or []
        apart.append(max(abs(mine[token].logprob - theirs[token].logprob) for token in mine))
    assert 0 < max(apart) < 0.1


@pytest.mark.parametrize("device", BITWISE)
def test_sampled_with_a_seed_is_as_alone(folder: Path, device: str) -> None:
    requests = prompts(6)
    params = [SamplingParams(temperature=0.9, top_p=0.95, seed=i, max_tokens=16, ignore_eos=True) for i in range(6)]
    llm = make(folder, device)
    expected = [llm.generate(ids, p)[0] for ids, p in zip(requests, params, strict=True)]
    for a, b in zip(expected, make(folder, device, max_num_batched_tokens=16).generate(requests, params), strict=True):
        same(a, b, BITWISE[device])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(6)),
    pauses=st.lists(st.integers(0, 8), min_size=6, max_size=6),
    aborted=st.sets(st.integers(0, 5), max_size=2),
)
def test_any_arrival_order(folder: Path, order: list[int], pauses: list[int], aborted: set[int]) -> None:
    """Requests that join and leave at any time, with aborts between, answer as alone."""
    requests = prompts(6, seed=3, shared=8)
    expected = reference(folder)
    engine = running(folder).engine
    done: dict[int, RequestOutput] = {}
    for number, pause in zip(order, pauses, strict=True):
        engine.add(Request(f"r{number}", requests[number], GREEDY))
        for _ in range(pause):
            done.update({int(out.request_id[1:]): out for out in engine.step() if out.finished})
        if number in aborted and number not in done:
            ended = engine.abort(f"r{number}")
            assert ended is not None and ended.outputs[0].finish_reason == "abort"
    while engine.has_unfinished_requests:
        done.update({int(out.request_id[1:]): out for out in engine.step() if out.finished})
    for number, out in done.items():
        same(expected[number], out, bitwise=True)
    assert set(range(6)) - aborted <= done.keys()


_CACHE: dict[str, Any] = {}


def reference(folder: Path) -> list[RequestOutput]:
    if "expected" not in _CACHE:
        alone = make(folder, "cpu", enable_prefix_caching=False)
        _CACHE["expected"] = [alone.generate(ids, GREEDY)[0] for ids in prompts(6, seed=3, shared=8)]
    return _CACHE["expected"]


def running(folder: Path) -> LLM:
    if "llm" not in _CACHE:
        _CACHE["llm"] = make(folder, "cpu", max_num_batched_tokens=32, block_size=8, kv_cache_memory_bytes=1 << 20)
    return _CACHE["llm"]


def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(folder: Path) -> None:
    ids = prompts(1, seed=5)[0] + list(range(40))
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    llm = make(folder, "cpu")
    whole, cached = llm.generate(ids, params)[0], llm.generate(ids, params)[0]
    chunked = make(folder, "cpu", max_num_batched_tokens=5).generate(ids, params)[0]
    assert whole.prompt_logprobs == chunked.prompt_logprobs == cached.prompt_logprobs
    assert whole.prompt_logprobs is not None
    assert whole.prompt_logprobs[0] is None and len(whole.prompt_logprobs) == len(ids)
    llm = make(folder, "cpu", block_size=4)
    llm.generate(ids[:30], GREEDY)
    for start in (1, 2, 17, len(ids)):
        late = llm.generate(ids, replace(params, prompt_logprobs_start=start))[0]
        assert late.prompt_logprobs == [None] * start + whole.prompt_logprobs[start:]
        assert late.metrics is not None and late.metrics.num_cached_tokens >= min(28, (start - 1) // 4 * 4)
    for token, entry in zip(ids[1:], whole.prompt_logprobs[1:], strict=True):
        assert entry is not None and token in entry and 2 <= len(entry) <= 3


def test_n_outputs_share_their_prompt_and_differ(folder: Path) -> None:
    ids = prompts(1, seed=6)[0] + list(range(50))
    llm = make(folder, "cpu", block_size=8)
    many = llm.generate(ids, SamplingParams(n=4, temperature=1.5, seed=1, max_tokens=8, ignore_eos=True))[0]
    texts = {tuple(out.token_ids) for out in many.outputs}
    assert [out.index for out in many.outputs] == [0, 1, 2, 3] and len(texts) == 4
    one = llm.generate(ids, SamplingParams(temperature=1.5, seed=1, max_tokens=8, ignore_eos=True))[0]
    assert one.outputs[0].token_ids == many.outputs[0].token_ids


def test_runs_repeat_without_a_seed_of_their_own(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12)
    ids = prompts(1)[0]
    runs = [make(folder, "cpu").generate([ids, ids], params) for _ in range(2)]
    first, again = ([out.outputs[0].token_ids for out in run] for run in runs)
    assert first == again and first[0] != first[1]


def test_prefix_cache_is_used_and_counted(folder: Path) -> None:
    llm = make(folder, "cpu", block_size=16)
    ids = list(range(100))
    first, second = (llm.generate(ids, replace(GREEDY, max_tokens=2))[0] for _ in range(2))
    assert first.metrics is not None and second.metrics is not None
    assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens) == (0, 96)


def test_streamed_deltas_add_up(folder: Path) -> None:
    llm = make(folder, "cpu")
    ids = prompts(1)[0]
    whole = llm.generate(ids, GREEDY)[0].outputs[0]
    parts = list(llm.stream(ids, replace(GREEDY, output_kind=RequestOutputKind.DELTA)))
    assert [t for part in parts for t in part.outputs[0].token_ids] == whole.token_ids
    assert [e for part in parts for e in part.outputs[0].logprobs or []] == whole.logprobs
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]


def test_an_open_stream_is_not_mixed_up_with_another_request(folder: Path) -> None:
    llm = make(folder, "cpu")
    stream = llm.stream([1, 2, 3], GREEDY)
    next(stream)
    with pytest.raises(EightfoldError, match="still being streamed"):
        llm.generate([1, 2, 3], GREEDY)
    stream.close()
    assert llm.generate([1, 2, 3], GREEDY)[0].finished


def test_length_eos_and_stop_tokens_end_a_request(folder: Path) -> None:
    llm = make(folder, "cpu", max_model_len=40)
    ids = prompts(1, seed=2)[0][:30]
    free = llm.generate(ids, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert len(ids) + len(free.token_ids) == 40 and free.finish_reason == "length"
    third = free.token_ids[2]
    at = free.token_ids.index(third)
    stopped = llm.generate(ids, SamplingParams(temperature=0, stop_token_ids=[third], ignore_eos=True))[0].outputs[0]
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    held = SamplingParams(temperature=0, stop_token_ids=[third], ignore_eos=True, min_tokens=at + 2, max_tokens=10)
    assert third not in llm.generate(ids, held)[0].outputs[0].token_ids[: at + 1]


def test_several_tokens_in_a_row_may_end_an_answer(folder: Path, tmp_path: Path) -> None:
    ids = prompts(1, seed=2)[0][:30]
    free = make(folder, "cpu").generate(ids, GREEDY)[0].outputs[0].token_ids
    end = free[4:7]
    first = next(at for at in range(3, len(free)) if free[at - 3 : at] == end)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [[ids[-1], free[0]], end]}))
    llm = make(tmp_path / "model", "cpu")
    answer = llm.generate(ids, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (free[:first], "stop", None)
    assert llm.generate(ids, GREEDY)[0].outputs[0].token_ids == free


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_poisoned_request_fails_alone(tmp_path: Path, kv_cache_dtype: str) -> None:
    model = save_hf(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    model.save_pretrained(tmp_path)
    llm = make(tmp_path, "cpu", block_size=4, kv_cache_dtype=kv_cache_dtype)
    good = [1, 2, 3, 4, 5, 6]
    expected = llm.generate(good, GREEDY)[0]
    bad, fine = llm.generate([[1, 2, 3, 4, 7, 6], good], GREEDY)
    assert bad.outputs[0].finish_reason == "error" and "'1' failed" in (bad.error or "")
    same(expected, fine, bitwise=True)
    same(expected, llm.generate(good, GREEDY)[0], bitwise=True)
    assert llm.engine.scheduler.running == [] and not llm.engine.has_unfinished_requests


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty prompt"),
        (list(range(128)), {}, "prompt of 128 tokens; the context holds 128"),
        ([1, 9999], {}, "prompt holds token id 9999; ids go from 0 to 319"),
        ([1], {"stop_token_ids": [-4]}, "stop_token_ids holds token id -4"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
        ("text", {}, "skip_tokenizer_init"),
        ({"text": "x"}, {}, "prompt_token_ids"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    folder: Path, prompt: Any, params: dict[str, Any], words: str
) -> None:
    llm = running(folder)
    with pytest.raises(EightfoldError, match=words):
        llm.generate([[1, 2], prompt], SamplingParams(**params))
    assert not llm.engine.has_unfinished_requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 100000}, "made for at most 512"),
        ({"kv_cache_memory_bytes": 4096}, "holds 0 tokens"),
        ({"kv_cache_memory_bytes": 1 << 60, "max_num_seqs": 1 << 40}, "GiB are free, which hold [0-9]+ tokens"),
        ({"dtype": "int4"}, "--dtype is 'int4'"),
        ({"kv_cache_dtype": "fp7"}, "--kv-cache-dtype is 'fp7'; it must be auto or one of .*, int8"),
        ({"kv_cache_dtype": "int8", "kv_cache_memory_bytes": 32 * 288 * 3}, "holds 96 tokens, .* raise it to 36864 "),
        ({"dtype": "int8"}, "--dtype is 'int8'"),
        ({"block_size": 0}, "--block-size is 0"),
        ({"device": "abacus"}, "device 'abacus' is not supported"),
    ],
)
def test_bad_options_are_named(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(EightfoldError, match=words):
        make(folder, **{"device": "torch", **options})

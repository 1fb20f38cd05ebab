"""Several engines as one: the answers are those of one engine, and none outlives the process that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eightfold.cli import main
from eightfold.config import EngineConfig
from eightfold.engine import Engine
from eightfold.loader import load_engine
from eightfold.parallel.cores import usable
from eightfold.replicas import Replicas
from eightfold.types import EightfoldError, RankError, Request, RequestOutput, RequestOutputKind, SamplingParams

pytestmark = pytest.mark.skipif(len(usable()) < 2, reason="two replicas need two cores")

CONFIG = EngineConfig("demo", dtype="float32", max_model_len=1024, max_num_batched_tokens=256)
WITHIN = 60  # seconds for processes to end


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    replicas = Replicas(CONFIG, 2)
    yield replicas
    replicas.close()


def finish(engines: Engine | Replicas, requests: list[Request]) -> dict[str, RequestOutput]:
    for request in requests:
        engines.add(request)
    done: dict[str, RequestOutput] = {}
    while engines.has_unfinished_requests:
        done.update({output.request_id: output for output in engines.step() if output.finished})
    return done


def requests() -> list[Request]:
    """Greedy, drawn, and scored ones, of 3 to 90 tokens; more than the replicas are given at once."""
    kinds = [
        SamplingParams(temperature=0, max_tokens=9, logprobs=3),
        SamplingParams(temperature=1, max_tokens=7, seed=5),
        SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=[7, 9]),
    ]
    kinds = [replace(one, output_kind=RequestOutputKind.FINAL_ONLY) for one in kinds]
    return [
        Request(str(number), [1, *range(40, 42 + 7 * number % 89)], kinds[number % 3], passing=number % 3 == 2)
        for number in range(120)
    ]


def without_times(output: RequestOutput) -> RequestOutput:
    return replace(output, metrics=None)


def test_answers_are_those_of_one_engine(replicas: Replicas) -> None:
    together, alone = finish(replicas, requests()), finish(load_engine(CONFIG), requests())
    assert list(map(without_times, map(together.__getitem__, alone))) == list(map(without_times, alone.values()))
    assert len(together) == 120 and replicas.max_model_len == 1024


def test_draws_without_a_seed_differ_from_each_other(replicas: Replicas) -> None:
    drawn = SamplingParams(temperature=3, max_tokens=12, ignore_eos=True)
    done = finish(replicas, [Request(str(number), [1, 40, 41], drawn) for number in range(8)])
    assert len({tuple(output.outputs[0].token_ids) for output in done.values()}) == 8


def test_an_aborted_request_is_not_heard_of_again(replicas: Replicas) -> None:
    long, short = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True), SamplingParams(max_tokens=3)
    for number in range(4):
        replicas.add(Request(str(number), [1, 50], long if number < 3 else short))
    replicas.step()
    for number in range(3):
        replicas.abort(str(number))
    heard = []
    while replicas.has_unfinished_requests:
        heard += [output.request_id for output in replicas.step()]
    assert set(heard) == {"3"} and replicas.step() == []


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({}, 0, "--data-parallel-size is 0; it must be at least 1"),
        ({}, 4096, "--data-parallel-size is 4096, but this process may use "),
        ({"device": "npu"}, 2, "--device npu has none"),
        ({"tensor_parallel_size": 2}, 2, "does not go with several ranks"),
        ({"load_mode": "copy"}, 2, "would copy the weights 2 times"),
        ({"max_model_len": 10**6}, 2, "this model was made for at most"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], count: int, message: str) -> None:
    with pytest.raises(EightfoldError, match=message):
        Replicas(replace(CONFIG, **changes), count)


def test_a_request_that_cannot_be_run_is_named() -> None:
    replicas = Replicas(CONFIG, 2)
    replicas.add(Request("long", list(range(2000)), SamplingParams()))
    with pytest.raises(EightfoldError, match="request 'long' has a prompt of 2000 tokens; the context holds 1024"):
        finish(replicas, [])
    replicas.close()


def test_a_killed_replica_is_named_and_the_other_ends_too() -> None:
    replicas = Replicas(CONFIG, 2)
    first, second = (process.pid for process in replicas._processes)
    endless = SamplingParams(max_tokens=1000, ignore_eos=True)
    for number in range(4):
        replicas.add(Request(str(number), [1], endless))
    replicas.step()
    assert second is not None
    os.kill(second, signal.SIGKILL)
    with pytest.raises(RankError, match=rf"replica 1 \(process {second}\) was killed by SIGKILL"):
        while replicas.has_unfinished_requests:
            replicas.step()
    replicas.abort("1")  # as whoever asked does while the error passes: it must not hide that one
    replicas.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in (first, second))


def test_eval_keeps_the_same_records(tmp_path: Path, demo: Path) -> None:
    command = ["eval", "demo", "--task", "boolq", "--data", str(demo / "heldout.jsonl"), "--limit", "150"]
    for count in ("1", "2"):
        assert main([*command, "--data-parallel-size", count, "--output", str(tmp_path / count)]) == 0
    one, two = ((tmp_path / count / "boolq.jsonl").read_text().splitlines() for count in ("1", "2"))
    assert one[0] == two[0] and sorted(one) == sorted(two) and len(one) == 151
    assert (tmp_path / "1" / "boolq_result.csv").read_bytes() == (tmp_path / "2" / "boolq_result.csv").read_bytes()
    with (tmp_path / "2" / "boolq_result.json").open() as file:
        assert json.load(file)["total"]["items"] == 150


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_replicas_end_with_the_command(tmp_path: Path, demo: Path, by: signal.Signals) -> None:
    out = tmp_path / "out"
    words = ["eval", "demo", "--task", "boolq", "--data", str(demo / "heldout.jsonl"), "--output", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "eightfold", *words, "--data-parallel-size", "2", "--max-num-batched-tokens", "16"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + WITHIN
    while not (out / "boolq.jsonl").exists() or (out / "boolq.jsonl").read_text().count("\n") < 3:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    others = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(others) >= 2
    process.send_signal(by)
    _, errors = process.communicate(timeout=WITHIN)
    assert process.returncode == (130 if by == signal.SIGINT else -by) and "Traceback" not in errors
    while any(map(alive, others)):
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False

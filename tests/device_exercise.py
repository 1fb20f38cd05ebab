"""Ranks whose "devices" are the processor and whose device backend is gloo: groups against plain sums, then the demo.

`python tests/device_exercise.py RANKS MOE_TP` prints what the demo says on such ranks, once it is what it says on ranks
that share memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from eightfold.config import EngineConfig
from eightfold.loader import follow as follow_model
from eightfold.loader import load_engine
from eightfold.parallel import Ranks, place
from eightfold.parallel.device import DeviceGroup
from eightfold.parallel.launch import Job
from eightfold.types import EightfoldError, Request, SamplingParams
from eightfold.worker import main
from ranks_exercise import check

PROMPTS = {"a": [1, 100, 200, 300], "b": [1, 5, 6, 7, 8, 9]}


def connected(job: Job) -> Ranks:
    """The job's ranks through device groups, each of which is checked in both ways of adding long sums."""
    assert job.ranks.connect is not None
    place.BACKENDS.update(cpu="gloo", meta="absent")
    with pytest.raises(EightfoldError, match=f"absent, which {job.place.size} of {job.place.size} ranks do not have"):
        job.ranks.connect(torch.device("meta"))  # all of them are told, none is left waiting
    ranks = job.ranks.connect(torch.device("cpu"))
    tp, ep = job.place.rank // job.place.moe_tp * job.place.moe_tp, job.place.rank % job.place.moe_tp
    for group, members in (
        (ranks.world, range(job.place.size)),
        (ranks.moe_tp, range(tp, tp + job.place.moe_tp)),
        (ranks.moe_ep, range(ep, job.place.size, job.place.moe_tp)),
    ):
        assert isinstance(group, DeviceGroup)
        assert group.shares  # as found out: gloo exchanges correctly
        for group.shares in (False, True):
            check(group, members, job.place.size, seed=int(group.shares))
    return ranks


def lead(size: str, moe_tp: str) -> int:
    config = EngineConfig(
        "demo", tensor_parallel_size=int(size), moe_tensor_parallel_size=int(moe_tp), threads=1, max_model_len=128
    )
    home = str(Path(__file__).parent)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    job = Job(config, place.find_place(config, environ), environ, "device_exercise")
    try:
        shared = answers(job.config, job.ranks)
        through_devices = answers(job.config, connected(job))
        assert through_devices == shared
        print(through_devices)
    finally:
        job.close()
    return 0


def answers(config: EngineConfig, ranks: Ranks | None = None) -> list[object]:
    """Tokens and log-probabilities of the demo."""
    engine = load_engine(config, ranks=ranks)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    for name, ids in PROMPTS.items():
        engine.add(Request(name, ids, params))
    done = {}
    while engine.has_unfinished_requests:
        done.update({out.request_id: out.outputs[0] for out in engine.step() if out.finished})
    engine.close()
    return [(done[name].token_ids, done[name].cumulative_logprob) for name in PROMPTS]


def follow(job: Job) -> None:
    follow_model(job.config, job.ranks)
    follow_model(job.config, connected(job))


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    sys.exit(lead(*arguments) if arguments else main(follow))

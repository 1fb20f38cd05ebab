"""Groups of ranks with a device each: through real process groups of gloo, and shapes on torch's fake ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from device_exercise import answers
from eightfold.config import EngineConfig
from eightfold.parallel import Alone, Ranks, alone
from eightfold.parallel.device import DeviceGroup, connect
from eightfold.parallel.place import BACKENDS
from eightfold.types import EightfoldError

PROGRAM = Path(__file__).parent / "device_exercise.py"


class Host(Alone):
    """The other ranks' host: it agrees to everything, and remembers that it was asked."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.asked: list[str] = []

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        self.asked.append("sum")
        return x * self.size

    def all_gather(self, x: Tensor) -> Tensor:
        self.asked.append("gather")
        return x.repeat(1, self.size)

    def broadcast(self, message: bytes | None) -> bytes:
        self.asked.append("broadcast")
        return message or b"from rank 0"


@pytest.fixture(params=[1, 2, 3, 4, 8])
def fake(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup]:
    """A process group that sends nothing, this process its last rank."""
    size = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=size - 1, world_size=size)
    group = dist.new_group(list(range(size)), backend="fake")
    assert isinstance(group, dist.ProcessGroup)
    yield group
    dist.destroy_process_group()


def test_groups_of_devices_give_what_shared_memory_gives() -> None:
    """Four processes: every collective of all groups, then the demo's tokens and log-probabilities."""
    run = subprocess.run([sys.executable, PROGRAM, "4", "2"], capture_output=True, text=True, timeout=150)
    assert (run.returncode, run.stderr) == (0, "")
    on_devices = ast.literal_eval(run.stdout)
    alone_tokens = [tokens for tokens, _ in answers(EngineConfig("demo", threads=1, max_model_len=128))]  # type: ignore[misc]
    assert [tokens for tokens, _ in on_devices] == alone_tokens


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_shapes_at_every_number_of_ranks(fake: dist.ProcessGroup, dtype: torch.dtype, shares: bool) -> None:
    """Of tensors without numbers: nothing asks for their contents, or for the host."""
    host = Host(fake.rank(), fake.size())
    group = DeviceGroup(fake, host, "meta", shares)
    for rows, width in ((1, 1), (3, 4096), (517, 4096)):
        x = torch.empty(width, rows, dtype=dtype, device="meta").T
        results = [(group.all_reduce_sum(x), width), (group.all_gather(x), width * fake.size())]
        if dtype == torch.float32:
            results.append((group.all_reduce_max(x), width))
        for result, columns in results:
            assert (result.shape, result.dtype, result.device.type) == ((rows, columns), dtype, "meta")
    assert host.asked == []


def test_what_is_on_the_host_stays_there(fake: dist.ProcessGroup) -> None:
    size = fake.size()
    host = Host(fake.rank(), size)
    group = DeviceGroup(fake, host, "npu")
    assert torch.equal(group.all_reduce_sum(torch.ones(3)), torch.full((3,), float(size)))
    assert group.all_gather(torch.ones(2, 3)).shape == (2, 3 * size)
    assert torch.equal(group.all_reduce_max(torch.ones(3)), torch.ones(3))
    assert group.broadcast(b"plan") == b"plan"
    assert host.asked == ["sum", "gather", "broadcast"]


@pytest.mark.parametrize("fake", [3], indirect=True)
def test_a_backend_that_sends_nothing_is_found_out(fake: dist.ProcessGroup) -> None:
    with pytest.raises(EightfoldError, match="fake gives wrong results among 3 ranks of cpus"):
        DeviceGroup(fake, Host(2, 3), "cpu").try_out(torch.device("cpu"))


@pytest.mark.parametrize("fake", [1], indirect=True)
def test_an_exchange_that_gives_zeros_is_not_used(fake: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HCCL's does in some versions. Of one rank even the fake group's other results are right."""
    monkeypatch.setattr(DeviceGroup, "_parts", lambda _, x: x[None].clone())
    group = DeviceGroup(fake, Host(0, 1), "cpu", shares=True)
    monkeypatch.setattr(DeviceGroup, "_exchange", lambda _, x: torch.zeros_like(x))
    group.try_out(torch.device("cpu"))
    assert not group.shares
    monkeypatch.setattr(DeviceGroup, "_exchange", lambda _, x: x.clone())
    group.try_out(torch.device("cpu"))
    assert group.shares


@pytest.mark.parametrize("fake", [1], indirect=True)
def test_a_backend_that_is_not_there_is_named(fake: dist.ProcessGroup) -> None:
    with pytest.raises(EightfoldError, match=r"torch\.distributed has no usable backend mpi"):
        connect([0], "mpi", Alone(), torch.device("cpu"))


def test_ranks_on_processors_and_alone_need_no_connection() -> None:
    asked = []

    def connect_to(device: torch.device) -> Ranks:
        asked.append(device)
        return alone()

    ranks = Ranks(Alone(), Alone(), Alone(), exact=False, connect=connect_to)
    assert ranks.on(torch.device("cpu")) is ranks
    assert alone().on(torch.device("meta")).connect is None
    assert not ranks.on(torch.device("meta")).exact  # what the user chose survives
    assert asked == [torch.device("meta")]
    assert set(BACKENDS.values()) == {"hccl", "nccl"}

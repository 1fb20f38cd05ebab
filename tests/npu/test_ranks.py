"""Several NPUs: torch_npu's own ProcessGroupHCCL over a simulated HCCL between processes, products that add up over
ranks, and the contract at true sizes on groups that send nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from emulator import collectives
from emulator.host import Mistake
from test_mistakes import NPU, Call, floats, half, int8, nz
from test_shapes import CHOSEN, DIM, EXPERTS, MODELS, fake, weight
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from eightfold.ops import Expert
from eightfold.ops.npu import NpuOps, weights
from eightfold.ops.npu.device import SOCS
from eightfold.parallel import Alone, Ranks
from eightfold.parallel.device import DeviceGroup

HERE = Path(__file__).parent
QUESTION = "Who is the CEO of Google?"


def eightfold(*words: str) -> str:
    """What a command prints; all of its processes have the emulator's devices."""
    paths = os.pathsep.join(str(path) for path in (HERE / "everywhere", HERE, HERE.parents[1] / "src"))
    environment = {**os.environ, "PYTHONPATH": paths, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-m", "eightfold", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


LONG = "The capital of France is Paris. The capital of Italy is Rome. " * 12


@pytest.mark.parametrize(
    "ranks",
    [("2",), ("2", "--no-exact-ranks"), ("4", "--moe-expert-parallel-size", "2")],
    ids=["2", "2, adding while they multiply", "4, experts shared out"],
)
def test_ranks_answer_as_one_does(ranks: tuple[str, ...]) -> None:
    words = ("run", "demo", QUESTION, LONG + "The capital of France is", "--device", "npu", "--max-tokens", "8")
    words = (*words, "--dtype", "float16", "--max-model-len", "512", "--ignore-eos")
    assert eightfold(*words, "--tensor-parallel-size", *ranks) == eightfold(*words)


# Products that add up: right calls, and deliberate mistakes. Two ranks that are not there, with two and three times
# what this one gives.


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(collectives.MADE_UP, "four", (4, lambda x: torch.stack([2 * x, 3 * x, -x])))
    monkeypatch.setitem(collectives.MADE_UP, "three", (3, lambda x: torch.stack([x, x])))


GOOD: dict[str, Callable[[], Call]] = {
    "dense": lambda: {"x1": half(3, 32), "x2": half(48, 32).t(), "hcom": "four"},
    "int8": lambda: {
        "x1": int8(3, 32),
        "x2": nz(int8(32, 48)),
        "hcom": "four",
        "dequant_scale": half(48),
        "pertoken_scale": floats(3),
    },
    "weight only": lambda: {
        "x1": half(3, 32),
        "x2": int8(48, 32).t(),
        "hcom": "four",
        "antiquant_scale": half(48),
        "antiquant_offset": half(48),
    },
}
MISTAKES: dict[str, dict[str, Callable[[], Call]]] = {
    "dense": {
        "a communicator that is not there": lambda: {"hcom": "five"},
        "three ranks": lambda: {"hcom": "three"},
        "a maximum": lambda: {"reduce_op": "max"},
        "weights not transposed": lambda: {"x2": half(48, 32)},
        "fp32": lambda: {"x1": floats(3, 32), "x2": floats(32, 48)},
        "weights of another dtype": lambda: {"x2": half(32, 48).half()},
        "no tokens": lambda: {"x1": half(0, 32)},
        "x transposed": lambda: {"x1": half(32, 3).t()},
        "the scale of int8 activations": lambda: {"pertoken_scale": floats(3)},
        "the scale of int8 weights": lambda: {"antiquant_scale": half(48)},
        "activations in NZ layout": lambda: {"x1": nz(half(16, 32))},
        "steps of communication": lambda: {"comm_turn": 1},
    },
    "int8": {
        "no scale of tokens": lambda: {"pertoken_scale": None},
        "no scale": lambda: {"dequant_scale": None},
        "bf16 scales of tokens": lambda: {"pertoken_scale": half(3)},
        "scales of other tokens": lambda: {"pertoken_scale": floats(4)},
        "a scale of another length": lambda: {"dequant_scale": half(32)},
        "an int32 scale": lambda: {"dequant_scale": int8(48).int()},
        "float weights": lambda: {"x2": half(32, 48)},
        "K beyond 65535": lambda: {"x1": int8(3, 65536), "x2": int8(65536, 48)},
    },
    "weight only": {
        "no scale": lambda: {"antiquant_scale": None},
        "an fp32 scale": lambda: {"antiquant_scale": floats(48)},
        "a scale of another length": lambda: {"antiquant_scale": half(32)},
        "an fp32 offset": lambda: {"antiquant_offset": floats(48)},
        "groups": lambda: {"antiquant_group_size": 32},
    },
}


@pytest.mark.parametrize("call", GOOD)
def test_right_calls_add_up(call: str) -> None:
    made = {name: value.to(NPU) if isinstance(value, Tensor) else value for name, value in GOOD[call]().items()}
    got = torch.ops.npu.npu_mm_all_reduce_base(**made).float().cpu()
    alone = {**made, "hcom": "one"}
    collectives.MADE_UP["one"] = (1, lambda x: x.new_empty(0, *x.shape))
    want = 5 * torch.ops.npu.npu_mm_all_reduce_base(**alone).float().cpu()
    del collectives.MADE_UP["one"]
    assert float((got - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize(("call", "mistake"), [(call, mistake) for call in MISTAKES for mistake in MISTAKES[call]])
def test_mistake_is_caught(call: str, mistake: str) -> None:
    with pytest.raises((Mistake, RuntimeError, TypeError)) as caught:
        torch.ops.npu.npu_mm_all_reduce_base(**{**GOOD[call](), **MISTAKES[call][mistake]()})
    assert "is not emulated" not in str(caught.value)


# The contract at true sizes. The groups are torch_npu's in no respect: what they would send is not sent.


@pytest.fixture(params=range(1, 9))
def group(request: pytest.FixtureRequest) -> Iterator[DeviceGroup]:
    size = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=size - 1, world_size=size)
    made = dist.new_group(list(range(size)), backend="fake")
    assert isinstance(made, dist.ProcessGroup)
    yield DeviceGroup(made, Alone(), "npu", shares=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["dense", "w8a8", "w8a16", "w4a16"])
@pytest.mark.parametrize("model", MODELS)
def test_what_ranks_share_at_true_sizes(
    model: str, scheme: str, dtype: torch.dtype, group: DeviceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to eight ranks: the attention's last product and the experts, by sums and by products that add up."""
    size, count = SimpleNamespace(**MODELS[model]), group.size
    heads, width = -(-size.heads // count), -(-size.width // count) // 32 * 32
    ops, ranks = NpuOps(dtype), Ranks(group, group, Alone())
    name = "four" if count in weights.ADDING_RANKS and scheme != "w4a16" else None

    def named(device: object, ranks: Ranks, product: object) -> str | None:
        return None if ranks.exact else name

    monkeypatch.setattr("eightfold.ops.npu.communicator", named)
    with fake() as watch:
        matrix = weight(size.hidden, heads * DIM, scheme, dtype)
        summed, added = (
            ops.prepare_linear([matrix], Ranks(group, group, Alone(), exact=exact)) for exact in (True, False)
        )
        shapes = ((width, size.hidden), (size.hidden, width), (width, size.hidden))
        share = SimpleNamespace(first=0, total=EXPERTS, ranks=ranks)
        experts = [Expert(*(weight(*shape, scheme, dtype) for shape in shapes)) for _ in range(EXPERTS)]
        layer = ops.prepare_experts(experts, share)
        for tokens in (1, 64, 2048):
            x = torch.empty(tokens, heads * DIM, dtype=dtype, device="npu:0")
            for handle in (summed, added):
                y = ops.linear(x, handle)
                assert (y.shape, y.dtype, y.device.type) == ((tokens, size.hidden), dtype, "npu")
            ids = torch.empty(tokens, CHOSEN, dtype=torch.int32, device="npu:0")
            assert ops.moe(y, ids, torch.empty(tokens, CHOSEN, device="npu:0"), layer).shape == y.shape
    assert watch.seen.count("npu_mm_all_reduce_base") == (name is not None)  # of 2,048 tokens, not of a few


def test_products_add_up_only_where_that_is_allowed() -> None:
    """Not for ranks that are to be exact, on chips or between numbers of ranks without it, or through the host."""
    npu, matrix = NpuOps(torch.bfloat16).npu, weights.Dense(torch.empty(2, 2))
    world = object.__new__(DeviceGroup)
    named = SimpleNamespace(_get_backend=lambda _: SimpleNamespace(get_hccl_comm_name=lambda rank: f"world of {rank}"))
    world.process_group, world.rank, world.size = named, 1, 2  # type: ignore[assignment]
    ranks = Ranks(world, Alone(), Alone(), exact=False)
    assert weights.communicator(npu, ranks, matrix) == "world of 1"
    assert weights.communicator(npu, Ranks(world, Alone(), Alone()), matrix) is None
    other: Any = SimpleNamespace(name=npu.name, soc=SOCS[1])
    assert weights.communicator(other, ranks, matrix) is None
    assert weights.communicator(npu, ranks, weights.Int4(torch.empty(2, 2), torch.empty(1, 2))) is None
    world.size = 3
    assert weights.communicator(npu, ranks, matrix) is None
    assert weights.communicator(npu, Ranks(Alone(), Alone(), Alone(), exact=False), matrix) is None

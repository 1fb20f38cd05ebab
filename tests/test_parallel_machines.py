"""Several machines, as network namespaces with addresses of their own: the same answers, and a cut cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

QUESTION = "Who is the CEO of Google?"
RUN = ["-m", "eightfold", "run", "demo", QUESTION, "--json", "--threads", "1"]
WITHIN = 15


class Machines:
    """`count` namespaces on one switch, which is a namespace as well: nothing of the host is touched."""

    def __init__(self, count: int) -> None:
        self.names = [f"eightfold-{os.getpid()}-{number}" for number in range(count)]
        self._switch = f"eightfold-{os.getpid()}-switch"
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self._switch, "link", "set", "switch", "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                self._switch,
            )
            ip("-n", self._switch, "link", "set", f"port{number}", "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def start(self, number: int, *command: str) -> subprocess.Popen[str]:
        full = ["ip", "netns", "exec", self.names[number], sys.executable, *command]
        return subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def cut(self, number: int) -> None:
        ip("-n", self.names[number], "link", "set", "eth0", "down")

    def close(self) -> None:
        for name in (*self.names, self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines(request: Any) -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command here (iproute2), with which to make network namespaces")
    try:
        made = Machines(request.param)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield made
    made.close()


def answer(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return out.partition('"outputs"')[2].partition('"cumulative')[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "ranks", "options"),
    [
        (2, 4, []),
        (2, 4, ["--moe-expert-parallel-size", "2"]),
        (4, 4, ["--enable-expert-parallel"]),
        (4, 4, []),
    ],
    indirect=["machines"],
)
def test_machines_answer_as_one(machines: Machines, ranks: int, options: list[str]) -> None:
    alone = answer(subprocess.Popen([sys.executable, *RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    count = len(machines.names)
    common = [*RUN, "--tensor-parallel-size", str(ranks), "--nnodes", str(count), *options]
    common += ["--master-addr", machines.addresses[0]]
    followers = [machines.start(number, *common, "--node-rank", str(number)) for number in range(1, count)]
    assert answer(machines.start(0, *common, "--node-rank", "0")) == alone
    for process in followers:
        out, errors = process.communicate(timeout=WITHIN)
        assert (process.returncode, out, errors) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2], indirect=True)
def test_torchrun_on_two_machines(machines: Machines) -> None:
    alone = answer(subprocess.Popen([sys.executable, *RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", machines.addresses[0], "--master-port", "20031"]
    second = machines.start(1, *torchrun, "--node-rank", "1", *RUN)
    assert answer(machines.start(0, *torchrun, "--node-rank", "0", *RUN)) == alone
    out, _ = second.communicate(timeout=30)
    assert (second.returncode, out) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2], indirect=True)
@pytest.mark.parametrize("cut", [0, 1])
def test_a_cut_cable_ends_all_machines(machines: Machines, cut: int) -> None:
    long = [*RUN[:4], "Tell me", "--no-chat", "--ignore-eos", "--max-tokens", "4000", "--threads", "1"]
    common = [*long, "--tensor-parallel-size", "4", "--nnodes", "2", "--master-addr", machines.addresses[0]]
    second = machines.start(1, *common, "--node-rank", "1")
    first = machines.start(0, *common, "--node-rank", "0")
    assert first.stdout is not None
    assert first.stdout.read(1)
    machines.cut(cut)
    start = time.monotonic()
    _, errors = first.communicate(timeout=WITHIN)
    _, others = second.communicate(timeout=WITHIN)
    assert time.monotonic() - start < WITHIN
    assert (first.returncode, second.returncode) == (1, 1)
    assert "eightfold: error: ranks 2 to 3 (machine 1, 10.77.0.2): no sign of life for 8 s" in errors
    assert "eightfold: error: ranks 0 to 1 (machine 0, 10.77.0.1): no sign of life for 8 s" in others
    assert "Traceback" not in errors + others

"""Several machines, as network namespaces with addresses of their own: the same answers, and a cut cable."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

QUESTION = "Who is the CEO of Google?"
ROOT = Path(__file__).resolve().parent.parent
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

    def type(self, number: int, line: str, home: Path) -> subprocess.Popen[str]:
        """A line in a shell, in the folder of the seed's commands, whose results go to `home`."""
        place = {**os.environ, "PYTHON": sys.executable, "EIGHTFOLD_MODELTEST_HOME": str(home)}
        place["PATH"] = f"{Path(sys.executable).parent}:{place['PATH']}"
        full = ["ip", "netns", "exec", self.names[number], "bash", "-c", line]
        return subprocess.Popen(
            full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=place, cwd=ROOT / "tests" / "modeltest"
        )

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


def prepared(home: Path, demo: Path) -> Path:
    data = home / "data" / "boolq"
    data.mkdir(parents=True)
    lines = (demo / "heldout.jsonl").read_text().splitlines(keepends=True)[:8]
    (data / "dev.jsonl").write_text("".join(lines))
    return home


def written(home: Path) -> dict[str, str]:
    """What lies in the folder of results, by name without the number of ranks and the time."""
    files = [path for path in (home / "outputs").rglob("*") if path.is_file()] if (home / "outputs").is_dir() else []
    return {re.sub(r"_tp\d|_\d{6,}", "", path.name): path.read_text() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2], indirect=True)
def test_the_seeds_commands_on_two_machines(machines: Machines, demo: Path, tmp_path: Path) -> None:
    """run.sh with its words for several machines, and run_pa under torchrun: scores and answers of one rank."""
    homes = [prepared(tmp_path / name, demo) for name in ("one", "first", "second")]
    table = tmp_path / "rank_table.json"
    table.write_text("{}")
    line = f"bash run.sh pa_fp16 full_BoolQ 4 mixtral {demo}"
    alone = machines.type(0, f"{line} 1", homes[0])
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 0, errors
    both = [f"{line} {table} 2 2 {start} {machines.addresses[0]}" for start in (0, 1)]
    second, first = machines.type(1, both[1], homes[2]), machines.type(0, both[0], homes[1])
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    said, complaints = second.communicate(timeout=WITHIN)
    assert (second.returncode, said) == (0, ""), complaints
    assert f"ranks find one another at {machines.addresses[0]}" in errors
    assert len(written(homes[0])) >= 2 and written(homes[1]) == written(homes[0])
    assert written(homes[2]) == {}

    words = f"{ROOT}/examples/run_pa.py --model_path {demo} --is_chat_model --max_output_length 12"
    torchrun = f"torchrun --nnodes 2 --nproc-per-node 1 --master-addr {machines.addresses[0]} --master-port 20032"
    second = machines.type(1, f"{torchrun} --node-rank 1 {words}", homes[2])
    first = machines.type(0, f"{torchrun} --node-rank 0 {words}", homes[1])
    spread, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    assert second.communicate(timeout=30)[0] == ""
    alone = machines.type(0, f"python {words}", homes[0])
    assert alone.communicate(timeout=60)[0] == spread
    assert "Answer[0]: " in spread


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

"""How ranks start and end, as users meet it: options, processes, and what happens when one of them fails."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eightfold import LLM, SamplingParams, cli
from eightfold.config import EngineConfig
from eightfold.parallel import place
from eightfold.parallel.facts import difference, facts_of
from eightfold.parallel.launch import Job
from eightfold.parallel.links import _greeted
from eightfold.parallel.place import Place, find_place
from eightfold.types import EightfoldError, RankError
from eightfold.worker import follow_as_told

COMMAND = [sys.executable, "-m", "eightfold"]
LONG = ["run", "demo", "Tell me", "--no-chat", "--ignore-eos", "--max-tokens", "4000", "--threads", "1"]
TWO = ["--tensor-parallel-size", "2"]
WITHIN = 15  # seconds from a failure to the end of everything
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "h", "MASTER_PORT": "7"}


def place_of(environ: dict[str, str] | None = None, **options: Any) -> Place:
    return find_place(EngineConfig("demo", **options), environ or {})


def test_places() -> None:
    assert place_of() == Place(0, 1, 1, 1, 1)
    assert place_of(tensor_parallel_size=4) == Place(0, 4, 4, 4, 1)
    assert place_of({"MASTER_PORT": "20030"}, tensor_parallel_size=4).port == 20030
    assert place_of(tensor_parallel_size=8, enable_expert_parallel=True).moe_ep == 8
    split = place_of(tensor_parallel_size=8, moe_tensor_parallel_size=2)
    assert (split.moe_tp, split.moe_ep) == (2, 4)
    second = place_of({"MASTER_ADDR": "10.0.0.1"}, tensor_parallel_size=8, nnodes=2, node_rank=1)
    assert second == Place(4, 8, 4, 8, 1, "10.0.0.1", 20030)
    assert (second.local_rank, second.node, second.nodes) == (0, 1, 2)
    started = place_of(TORCHRUN)
    assert started == Place(1, 4, 2, 4, 1, "h", 7, torchrun=True)
    assert (started.local_rank, started.node, started.nodes) == (1, 0, 2)


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ({"tensor_parallel_size": 0}, {}, "--tensor-parallel-size is 0; it must be from 1"),
        ({"tensor_parallel_size": 3, "nnodes": 2, "master_addr": "a"}, {}, "a multiple of the 2 of --nnodes"),
        ({"tensor_parallel_size": 2, "nnodes": 2}, {}, r"--master-addr \(or MASTER_ADDR\)"),
        ({"node_rank": 1}, {}, "--node-rank is 1; it must be from 0 to 0"),
        ({"tensor_parallel_size": 4, "moe_expert_parallel_size": 3}, {}, "is 3; it must be the number of ranks, 4"),
        ({"tensor_parallel_size": 2}, TORCHRUN, r"is 2 but torchrun started 4 ranks \(WORLD_SIZE\)"),
        ({"nnodes": 2}, TORCHRUN, "torchrun's own here"),
        ({}, TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        ({}, TORCHRUN | {"LOCAL_RANK": "0"}, "the same number of ranks"),
        ({}, {"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'; it must be a number"),
        ({"tensor_parallel_size": 2}, {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        (
            {"tensor_parallel_size": 4, "device": "npu"},
            {"ASCEND_RT_VISIBLE_DEVICES": "0,1"},
            "4 ranks on this machine but ASCEND_RT_VISIBLE_DEVICES='0,1' names 2 devices",
        ),
        ({"tensor_parallel_size": 2, "device": "cuda"}, {"CUDA_VISIBLE_DEVICES": "3"}, "names 1 devices"),
        (
            {"tensor_parallel_size": 2, "device": "npu:1"},
            {},
            "--device npu:1 is one device, but each of the 2 ranks .* write npu, and choose with ASCEND_RT_VISIBLE_DEV",
        ),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], environ: dict[str, str], message: str) -> None:
    with pytest.raises(EightfoldError, match=message):
        place_of(environ, **options)


def test_devices_are_counted_where_the_driver_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "DEVICE_FILES", tmp_path)
    assert place_of(tensor_parallel_size=8, device="npu").size == 8  # nothing to count: the backend will tell
    for name in ("davinci0", "davinci1", "davinci_manager", "nvidia0"):
        (tmp_path / name).touch()
    assert place_of(tensor_parallel_size=2, device="npu").size == 2
    with pytest.raises(EightfoldError, match="4 ranks on this machine but it has 2 devices"):
        place_of(tensor_parallel_size=4, device="npu")
    chosen = place_of({"ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3"}, tensor_parallel_size=4, device="npu")
    assert chosen.size == 4  # a container may show its driver's files otherwise: what the user says counts


def test_what_differs_between_ranks_is_named() -> None:
    first = facts_of(EngineConfig("a", max_model_len=64), [0, 1])
    assert difference(first, facts_of(EngineConfig("elsewhere", max_model_len=64, threads=3), [5])) is None
    other = facts_of(EngineConfig("a", max_model_len=65), [0])
    assert difference(first, other) == "was started with --max-model-len 65 where rank 0 has 64"
    assert "runs eightfold 0.0 where rank 0 runs" in str(difference(first, {**first, "version": "0.0"}))
    assert "another build" in str(difference(first, {**first, "build": ""}))


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether it runs: what has ended and was not waited for (its parent is gone, too) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def running() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Two ranks in the middle of an answer, and the other rank's process."""
    process = start(*LONG, *TWO, "--distributed-timeout-seconds", "3")
    assert process.stdout is not None
    assert process.stdout.read(1)
    (other,) = children(process.pid)
    yield process, other
    process.kill()
    process.communicate()


def ends(process: subprocess.Popen[str], *others: int) -> str:
    """Standard error of a job that must end in time, and leave nobody behind."""
    until = time.monotonic() + WITHIN
    _, errors = process.communicate(timeout=WITHIN)
    while any(map(alive, others)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, others))
    return errors


def test_a_killed_rank_ends_the_job_and_is_named(running: tuple[subprocess.Popen[str], int]) -> None:
    process, other = running
    os.kill(other, signal.SIGKILL)
    errors = ends(process, other)
    assert process.returncode == 1
    assert f"eightfold: error: rank 1 (process {other}) was killed by SIGKILL" in errors
    assert "Traceback" not in errors


def test_a_stopped_rank_ends_the_job_and_is_named(running: tuple[subprocess.Popen[str], int]) -> None:
    process, other = running
    os.kill(other, signal.SIGSTOP)
    errors = ends(process, other)
    assert process.returncode == 1
    assert f"rank 1 (process {other}) gave no sign of life for 3 s" in errors


HANGS = """import signal, time

def hang(*_):  # from the next step on
    import eightfold.model
    eightfold.model.Mixtral.gather = {body}

signal.signal(signal.SIGUSR1, hang)
"""
LOOP, BLOCKED = "lambda *_: exec('while True: pass')", "lambda *_: time.sleep(1e6)"


@pytest.mark.parametrize(("rank", "body"), [(1, LOOP), (0, BLOCKED)])
def test_a_rank_that_hangs_while_it_lives_ends_the_job_and_is_named(tmp_path: Path, rank: int, body: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS.format(body=body))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = start(*LONG, *TWO, "--distributed-timeout-seconds", "2", PYTHONPATH=path)
    assert process.stdout is not None
    assert process.stdout.read(1)
    (other,) = children(process.pid)
    hung = (process.pid, other)[rank]
    os.kill(hung, signal.SIGUSR1)
    begun = time.monotonic()
    errors = ends(process, other)
    assert time.monotonic() - begun < WITHIN - 6  # with the 8 s that are meant by default
    assert process.returncode == 1
    line = f"rank {rank} (process {hung}) is alive, but in the middle of a step nothing of it moved for 2 s"
    assert errors == f"eightfold: error: {line}\n"


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_die_with_rank_0(running: tuple[subprocess.Popen[str], int], stopped: bool) -> None:
    process, other = running
    if stopped:
        os.kill(other, signal.SIGSTOP)
    process.kill()
    ends(process, other)


def test_ctrl_c_is_clean(running: tuple[subprocess.Popen[str], int]) -> None:
    process, other = running
    os.kill(other, signal.SIGINT)  # a terminal sends it to all
    process.send_signal(signal.SIGINT)
    assert ends(process, other) == "eightfold: interrupted\n"
    assert process.returncode == 130


def test_a_rank_that_cannot_start_leaves_nothing_behind() -> None:
    def memory() -> int:
        return sum(
            "memfd:eightfold" in str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()
        )

    config = EngineConfig("demo", tensor_parallel_size=2)
    with pytest.raises(RankError, match=r"rank 1 \(process \d+\) ended with exit code 1 while it started"):
        Job(config, find_place(config, {}), os.environ, module="eightfold.no_such_module")
    assert memory() == 0 and children(os.getpid()) == []


def test_strangers_are_not_taken_for_machines() -> None:
    for said, node in (
        (json.dumps([3, "word"]).encode().ljust(200), 3),
        (json.dumps([3, "other"]).encode().ljust(200), None),
        (b"5".ljust(200), None),
        (b"GET / HTTP/1.1\r\n\r\n", None),
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)
            assert _greeted(ours, "word") == node


def test_a_busy_port_is_named_with_its_variable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        process = start("run", "demo", "x", *TWO, MASTER_PORT=port)
        errors = ends(process)
    assert process.returncode == 2
    assert errors == f"eightfold: error: port {port} is in use on 127.0.0.1: set MASTER_PORT to another\n"


def test_ranks_that_differ_end_at_the_start() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(start("run", "demo", "x", "--block-size", "8" if rank == "1" else "16", **environ))
    errors = [ends(process) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert errors[0] == "eightfold: error: rank 1 was started with --block-size 8 where rank 0 has 16\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-parallel-size", "3"], "3 ranks cannot share"),
        (["--tensor-parallel-size", "8", "--enable-expert-parallel", "--load-mode", "copy"], "--load-mode copy would"),
        (["--tensor-parallel-size", "2", "--max-model-len", "9999999"], "--max-model-len is 9999999"),
    ],
)
def test_what_ranks_cannot_do_is_refused_before_any_starts(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start_one(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start_one)
    assert cli.main(["run", "demo", "x", *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("eightfold: error: " + message)
    assert errors.count("\n") == 1


def test_under_torchrun_one_rank_says_what_all_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    """No rank waits for another: each knows by itself."""
    before, level = signal.getsignal(signal.SIGINT), logging.getLogger("eightfold").level
    environ = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    said = []
    try:
        for rank in ("0", "1", "2"):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {**environ, "RANK": rank, "LOCAL_RANK": rank}.items():
                    patch.setenv(name, value)
                code = cli.main(["run", "demo", "x"]) if rank == "0" else follow_as_told({"model": "demo"})
            assert code == (2 if rank == "0" else 1)
            said.append(capsys.readouterr().err)
    finally:
        signal.signal(signal.SIGINT, before)
        logging.getLogger("eightfold").setLevel(level)
    assert said[0].startswith("eightfold: error: 3 ranks cannot share 8 heads")
    assert said[1:] == ["", ""]


def test_from_python_without_a_main_guard(tmp_path: Path) -> None:
    """Also: experts shared out, in another thread than the main one, which ends before its ranks are used."""
    script = tmp_path / "types.py"  # a name that would hide Python's own from ranks that started in this folder
    script.write_text(
        "import threading\n"
        "from eightfold import LLM, SamplingParams\n"
        "made = []\n"
        "options = dict(tensor_parallel_size=2, enable_expert_parallel=True, threads=1)\n"
        "maker = threading.Thread(target=lambda: made.append(LLM('demo', **options)))\n"
        "maker.start(); maker.join()\n"
        "with made.pop() as llm:\n"
        "    question = {'role': 'user', 'content': 'Who is the CEO of Google?'}\n"
        "    out = llm.chat([question], SamplingParams(max_tokens=20, temperature=0))\n"
        "    print(out[0].outputs[0].text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", script] if sys.version_info >= (3, 11) else [sys.executable, script.rename("s.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "The CEO of Google is Sundar Pichai."


def test_closing_ends_the_ranks_and_gives_the_cores_back() -> None:
    cores = os.sched_getaffinity(0)
    llm = LLM("demo", tensor_parallel_size=2, threads=1, max_model_len=64)
    assert len(children(os.getpid())) == 1
    (output,) = llm.generate("One two", SamplingParams(max_tokens=3, temperature=0))
    assert len(output.outputs[0].token_ids) == 3
    llm.close()
    llm.close()
    assert children(os.getpid()) == []
    assert os.sched_getaffinity(0) == cores

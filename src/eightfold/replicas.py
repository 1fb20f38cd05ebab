"""Several engines of one model on one machine, each in a process of its own, that share out requests.

For models so small that a step's operations are too short to divide among all cores: each replica computes alone on its
own cores, and what Python does between operations runs side by side too. The files of the weights are in memory once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from eightfold.checkpoint import resolve
from eightfold.config import EngineConfig, load_model_config
from eightfold.loader import load_engine, load_tokenizer
from eightfold.parallel import alone
from eightfold.parallel.cores import share, usable
from eightfold.parallel.place import find_place
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError, Progress, RankError, Request, RequestOutput
from eightfold.worker import end_with, ignore_interrupts

STEPS_AHEAD = 4  # of prompts that end with their first token, a replica gets so many steps' tokens in advance
_LOADING, _READY, _OUTPUTS, _FAILED = "loading", "ready", "outputs", "failed"


class Replicas:
    """`count` engines, which take requests and give outputs as one `Engine` does.

    Each gets its share of the cores, or `config.threads` threads; keys and values take their share of the memory, or
    `config.kv_cache_memory_bytes` each. `progress` hears of the bytes of weights that have come into memory. Raises
    EightfoldError if the model can't be run as asked, and RankError later if a replica is lost.
    """

    def __init__(self, config: EngineConfig, count: int, progress: Progress | None = None) -> None:
        _check(config, count)
        folder = resolve(config.model)
        self.tokenizer: Tokenizer | None = load_tokenizer(config, folder, load_model_config(folder))
        self._config = config
        self._waiting: deque[Request] = deque()
        self._running: list[dict[str, Request]] = [{} for _ in range(count)]
        self._num_added = 0
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        try:
            for number in range(count):
                mine, other = context.Pipe()
                self._pipes.append(mine)
                given = other, config, number, count, os.getpid()
                process = context.Process(target=_replica, args=given, daemon=True)
                process.start()
                self._processes.append(process)
                other.close()
            self.max_model_len = self._until_ready(progress)
        except BaseException:
            self.close()
            raise

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting) or any(self._running)

    def add(self, request: Request) -> None:
        """Take a request. One that can't be run makes the next `step` raise."""
        if request.params.seed is None and request.params.temperature > 0:  # else two replicas would draw alike
            params = replace(request.params, seed=self._config.seed + self._num_added)
            request = replace(request, params=params)
        self._num_added += 1
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Stop a request; nothing more is heard of it."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        for pipe, running in zip(self._pipes, self._running, strict=True):
            if running.pop(request_id, None) is not None:
                with contextlib.suppress(OSError):  # of a replica that is lost, of which the next step tells
                    pipe.send(request_id)

    def step(self) -> list[RequestOutput]:
        """Wait until a replica has something new → its outputs. Raises EightfoldError if a request could not be run,
        RankError if a replica is lost."""
        for number in range(len(self._pipes)):
            self._fill(number)
        if not any(self._running):
            return []
        outputs: list[RequestOutput] = []
        for number, (kind, content) in self._messages():
            assert kind == _OUTPUTS
            known = self._running[number]
            outputs += [output for output in content if output.request_id in known]  # else it was aborted meanwhile
            for output in content:
                if output.finished:
                    known.pop(output.request_id, None)
        return outputs

    def close(self) -> None:
        """End the replicas. May be called again."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # they have nothing to tidy up
            process.join()

    def _fill(self, number: int) -> None:
        """Requests for a replica that is running out of them: those that come after one another, as they may begin
        alike, but not more than keep it busy, so that all replicas end at about the same time."""
        running = self._running[number]
        room = STEPS_AHEAD * self._config.max_num_batched_tokens - sum(map(_short_work, running.values()))
        if room < STEPS_AHEAD * self._config.max_num_batched_tokens // 2:
            return
        due: list[Request] = []
        while self._waiting and room > 0 and len(running) < self._config.max_num_seqs:
            request = self._waiting.popleft()
            running[request.request_id] = request
            room -= _short_work(request)
            due.append(request)
        if due:
            try:
                self._pipes[number].send(due)
            except OSError:
                raise self._lost(number) from None

    def _messages(self) -> Iterable[tuple[int, tuple[str, Any]]]:
        """What the replicas say next, at least one word of one of them."""
        for pipe in wait(self._pipes):
            assert isinstance(pipe, Connection)
            number = self._pipes.index(pipe)
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                raise self._lost(number) from None
            if message[0] == _FAILED:
                raise EightfoldError(message[1])
            yield number, message

    def _until_ready(self, progress: Progress | None) -> int:
        ready: dict[int, int] = {}
        while len(ready) < len(self._pipes):
            for number, (kind, content) in self._messages():
                if kind == _READY:
                    ready[number] = content
                elif number == 0 and progress:
                    progress(*content)
        return ready[0]

    def _lost(self, number: int) -> RankError:
        from eightfold.parallel.launch import how_ended  # brings torch.distributed with it

        process = self._processes[number]
        process.join(3)
        return RankError(f"replica {number} (process {process.pid}) {how_ended(process.exitcode)}")


def _check(config: EngineConfig, count: int) -> None:
    if count < 1:
        raise EightfoldError(f"--data-parallel-size is {count}; it must be at least 1")
    if config.device not in ("cpu", "torch"):
        raise EightfoldError(
            f"--data-parallel-size shares out the cores of a machine, and --device {config.device} has none: start "
            "the command once for each device, on a part of the data each"
        )
    if find_place(config, os.environ).size > 1:
        raise EightfoldError("--data-parallel-size does not go with several ranks: choose one of them")
    if count > len(usable()):
        raise EightfoldError(f"--data-parallel-size is {count}, but this process may use {len(usable())} cores")


def _short_work(request: Request) -> int:
    """Tokens of a request that its prompt's step finishes; 0 of one that goes on generating."""
    return len(request.prompt_token_ids) if request.params.max_tokens == 1 else 0


def _replica(pipe: Connection, config: EngineConfig, number: int, count: int, parent: int) -> None:
    """The process of one replica: takes requests and numbers of aborted ones, until the other end closes."""
    ignore_interrupts()
    end_with(parent)
    logging.basicConfig(format="eightfold: %(message)s")
    if number:  # what is worth a warning, the first one says
        logging.getLogger("eightfold").setLevel(logging.ERROR)
    try:
        _serve(pipe, config, number, count)
    except EightfoldError as error:
        pipe.send((_FAILED, str(error)))


def _serve(pipe: Connection, config: EngineConfig, number: int, count: int) -> None:
    cores = share(usable(), number, count) or usable()
    if config.threads is None or config.threads <= len(cores):
        os.sched_setaffinity(0, cores)
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.1:
            last = time.monotonic()
            pipe.send((_LOADING, (done, total)))

    threads = config.threads or len(cores)
    engine = load_engine(replace(config, threads=threads), progress, replace(alone(), local_size=count))
    inbox: SimpleQueue[list[Request] | str] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    pipe.send((_READY, engine.max_model_len))
    while True:
        while not engine.has_unfinished_requests or not inbox.empty():
            message = inbox.get()
            if isinstance(message, str):
                engine.abort(message)
                continue
            for request in message:
                engine.add(request)
        outputs = engine.step()
        if outputs:
            pipe.send((_OUTPUTS, outputs))


def _receive(pipe: Connection, inbox: SimpleQueue[list[Request] | str]) -> None:
    """Always takes what comes, so that neither end waits for the other to read."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(pipe.recv())
    os._exit(0)

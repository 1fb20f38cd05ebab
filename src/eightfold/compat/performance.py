"""modeltest's tests of given lengths: performance, performance_maxbs, performance_single and precision_single."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from eightfold.bench.requests.lengths import Case
from eightfold.bench.requests.prompts import read_dataset
from eightfold.compat.console import CaseError, log, note
from eightfold.compat.dialogue import WARM_UP, print_answers, replicated
from eightfold.compat.environment import Environment
from eightfold.compat.modeltest import Places, engine_options
from eightfold.compat.modeltest_grammar import ModelTest
from eightfold.compat.tables import (
    PERFORMANCE_COLUMNS,
    performance_cells,
    write_benchmark,
    write_csv,
    write_performance,
)
from eightfold.compat.timed import Timed, run_timed
from eightfold.config import ModelConfig
from eightfold.eval.data import find_data
from eightfold.eval.task import LoadOptions
from eightfold.eval.tasks import get_tasks
from eightfold.llm import LLM
from eightfold.loader import KV_DTYPES, kv_bytes_per_token
from eightfold.types import EightfoldError, Request, RequestOutputKind, SamplingParams

PAGE = 128  # tokens, the reference's block size


def run_lengths(test: ModelTest, environment: Environment, model: ModelConfig, places: Places) -> None:
    """Run the test, print its lines, write its tables.

    Raises EightfoldError on what can't be run, and CaseError where a case fails; tables of what was done are there.
    """
    prompts = _prompts(test, places) if test.prompts_of is not None else None
    with LLM(**_engine(test, environment, model)) as llm:
        bench = Tests(test, llm, model.vocab_size, places)
        bench.warm_up()
        if test.test == "performance_maxbs":
            bench.search()
        elif test.texts:
            bench.single()
        else:
            bench.fixed(None if prompts is None else bench.encode(prompts))


def _engine(test: ModelTest, environment: Environment, model: ModelConfig) -> dict[str, Any]:
    """Fields of EngineConfig with room for the largest batch of the longest case."""
    if test.ranges:
        sizes = [(high, sum(case)) for case, (_, high) in zip(test.cases, test.ranges, strict=True)]
    else:
        sizes = [(max(batches), sum(case)) for case, batches in zip(test.cases, test.batches, strict=True)]
    options = engine_options(test, environment)
    batch = max(max(batch for batch, _ in sizes), len(test.texts))
    options |= {"max_num_seqs": batch, "block_size": PAGE, "enable_prefix_caching": False}
    options["max_model_len"] = test.context
    if not test.texts:
        longest = max(length for _, length in sizes)
        pages = max(max(batch * -(-length // PAGE) for batch, length in sizes), -(-longest // PAGE))
        token = kv_bytes_per_token(model, KV_DTYPES[options["kv_cache_dtype"]])
        options |= {"max_model_len": longest, "kv_cache_memory_bytes": pages * PAGE * token}
    if environment.split_prefill and test.test == "performance":
        options["max_num_batched_tokens"] = test.prefill_length or 8192
    elif test.prefill_batch is not None:
        options["max_num_batched_tokens"] = test.prefill_batch * max(map(sum, test.cases))
    if test.prefill_length is not None and not environment.split_prefill:
        note(f"prefill_length {test.prefill_length} has no effect without MODELTEST_PD_SPLIT_ENABLE=1")
    return options


def _prompts(test: ModelTest, places: Places) -> list[str]:
    """All prompts of the data set that the test names."""
    assert test.prompts_of is not None
    folder = places.datasets / test.prompts_of
    if not folder.is_dir():
        raise EightfoldError(f"no data for {test.prompts_of}: there is no folder {folder}")
    if test.prompts_of != "ceval":
        return [text for _, text in read_dataset(test.prompts_of, str(folder))]
    (task,) = get_tasks("ceval")
    items = task.load(find_data("ceval", task.files, str(folder)), LoadOptions(shots=0))
    if not items:
        raise EightfoldError(f"{folder} holds no item")
    return [query.prompt for item in items for query in task.queries(item)]


class Tests:
    """A loaded model under test. Random token ids are the same in every run."""

    def __init__(self, test: ModelTest, llm: LLM, vocab_size: int, places: Places) -> None:
        self._test, self._llm, self._places = test, llm, places
        self._random, self._vocab = random.Random(0), range(vocab_size)
        self._numbers = count()
        self._world = test.layout.world

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, as a user's messages where the test is of a chat model."""
        tokenizer = self._llm.get_tokenizer()
        if self._test.chat:
            return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        return [tokenizer.encode(text) for text in texts]

    def warm_up(self) -> None:
        log("warm-up begins")
        try:
            self._run([self._ids(min(WARM_UP, self._llm.engine.max_model_len - 1))], 1)
        except CaseError as error:
            raise CaseError(f"the warm-up failed, so no case ran: {error}") from None
        log("warm-up ends")

    def fixed(self, prompts: Sequence[list[int]] | None) -> None:
        """Every case with its batches, of random ids or of prompts; a table for each batch size."""
        pairs = list(zip(self._test.cases, self._test.batches, strict=True))
        for batch in dict.fromkeys(size for _, batches in pairs for size in batches):
            rows: list[list[str]] = []
            try:
                # As they come, so that a case which fails leaves those before it.
                rows.extend(self._case(case, batch, prompts) for case, batches in pairs if batch in batches)
            finally:
                if rows:
                    self._write(f"performance_pa_batch{batch}_tp{self._world}_result.csv", rows)

    def single(self) -> None:
        """The given texts; more of them than the batch run together all the same."""
        test, ids = self._test, self.encode(self._test.texts)
        timing = test.test == "performance_single"
        pairs = list(zip(test.cases, test.batches, strict=True))
        for batch in dict.fromkeys(size for _, batches in pairs for size in batches):
            if len(ids) > batch:
                note(f"{len(ids)} texts run together, although the batch is {batch}")
            asked = replicated(ids, batch)
            rows = []
            for case in (case for case, batches in pairs if batch in batches):
                timed = self._run(asked, case.output_len, ignore_eos=timing, text=True)
                answers = [(output.outputs[0].text, len(output.outputs[0].token_ids)) for output in timed.outputs]
                print_answers(test.texts, answers)
                if timing:
                    rows.append(self._row(Case(len(asked[0]), case.output_len), [timed]))
            if rows:
                self._write(f"performance_single_pa_batch{batch}_tp{self._world}_result.csv", rows)

    def search(self) -> None:
        """For each case, the largest batch whose decoding takes no longer a token than the limit, by halving."""
        test, name = self._test, f"performance_maxbs_pa_tp{self._world}"
        rounds: list[list[str]] = []
        best: list[list[str]] = []
        missed = []
        try:
            for case, (low, high) in zip(test.cases, test.ranges, strict=True):
                found = self._largest(case, low, high, rounds)
                print(f"[{case.input_len},{case.output_len}]: {found[1] if found else 0}", flush=True)
                best += [found] if found else []
                missed += [] if found else [f"[{case.input_len},{case.output_len}]"]
        finally:  # a case that fails leaves what was measured before it
            for kind, rows in (("round", rounds), ("final", best)) if rounds else ():
                path = self._places.results / f"{name}_{kind}_result.csv"
                write_csv(path, PERFORMANCE_COLUMNS[:10], rows)
                print(f"{test.model} {kind} result saved in {path}", flush=True)
        if missed:
            raise CaseError(f"no batch decodes within {test.time_limit:g} ms a token for the cases {', '.join(missed)}")

    def _largest(self, case: Case, low: int, high: int, rounds: list[list[str]]) -> list[str] | None:
        """The row of the largest batch within the limit, if there is one; every row that is measured joins `rounds`."""
        found = None
        while low <= high:
            batch = (low + high) // 2
            row = self._case(case, batch, None)
            rounds.append(row)
            if float(row[7]) <= self._test.time_limit:
                found, low = row, batch + 1
            else:
                high = batch - 1
        return found

    def _case(self, case: Case, batch: int, prompts: Sequence[list[int]] | None) -> list[str]:
        """Run a case → its row. Raises CaseError that names it."""
        try:
            timed = [self._run(asked, case.output_len) for asked in self._asked(case, batch, prompts)]
        except CaseError as error:
            raise CaseError(f"case [{case.input_len},{case.output_len}] of batch {batch} failed: {error}") from None
        row = self._row(case, timed)
        names = ["batch", "seq_len_in", "seq_len_out", "total_time", "prefill_all_time", "prefill_avg_time"]
        names += ["non_first_token_time", "non_first_token_throughput", "e2e_throughput"]
        print(", ".join(f"{name}: {value}" for name, value in zip(names, row[1:], strict=True)), flush=True)
        return row

    def _asked(self, case: Case, batch: int, prompts: Sequence[list[int]] | None) -> Iterator[list[list[int]]]:
        """The prompts of each batch that is to run."""
        if prompts is None:
            yield [self._ids(case.input_len) for _ in range(batch)]
            return
        full = list(prompts) * (-(-batch // len(prompts)) if len(prompts) < batch else 1)
        most = len(full) // batch
        if self._test.groups is not None and self._test.groups > most:
            note(f"{self._test.prompts_of} has {most} batches of {batch}, fewer than {self._test.groups}")
        for number in range(most if self._test.groups is None else min(most, self._test.groups)):
            chosen = full[number * batch : (number + 1) * batch]
            if self._test.padding:
                chosen = [ids * -(-case.input_len // len(ids)) for ids in chosen]
            yield [ids[: case.input_len] for ids in chosen]

    def _row(self, case: Case, runs: Sequence[Timed]) -> list[str]:
        """Of one batch, or the means over several."""
        batch = len(runs[0].outputs)
        write_benchmark(self._places.benchmark, runs[-1], case.input_len, case.output_len)
        mean = len(runs)
        seconds = sum(run.seconds for run in runs) / mean
        prefill = sum(run.prefill_seconds for run in runs) / mean
        decode = sum(run.decode_token_seconds(case.output_len) for run in runs) / mean
        return performance_cells(self._test.model, case, batch, seconds, prefill, prefill / batch, decode)

    def _write(self, name: str, rows: list[list[str]]) -> None:
        path = self._places.results / name
        write_performance(path, rows)
        formatted = path.with_name(path.name.replace("_result.csv", "_formatted_result.csv"))
        print(f"{self._test.model} batch {rows[0][1]} result saved in {path}")
        print(f"{self._test.model} batch {rows[0][1]} formatted result saved in {formatted}", flush=True)

    def _ids(self, length: int) -> list[int]:
        return self._random.choices(self._vocab, k=length)

    def _run(self, prompts: Sequence[list[int]], most: int, ignore_eos: bool = True, text: bool = False) -> Timed:
        params = SamplingParams(
            temperature=0,
            max_tokens=most,
            ignore_eos=ignore_eos,
            detokenize=text,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        requests = [Request(f"test-{next(self._numbers)}", ids, params) for ids in prompts]
        return run_timed(self._llm.engine, requests)

"""`bench requests`: what is typed, what is counted, what is written. Nothing here depends on speed."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eightfold import LLM
from eightfold.bench.accounting import Row, model_step
from eightfold.bench.requests.lengths import Case, parse_batches, parse_cases, parse_range
from eightfold.bench.requests.plan import RequestOptions, make_plan
from eightfold.bench.requests.prompts import DATASETS, find_file, read_dataset
from eightfold.bench.requests.run import largest_batch
from eightfold.bench.requests.timing import Ask, Bench, RequestTimes, Run, StepTimes
from eightfold.cli import main
from eightfold.config import ModelConfig, RopeConfig
from eightfold.html.charts import Curve, Series, lines
from eightfold.html.plots import Range, Roof, Spot, Stack, curves, heat_map, ranges, roofline, stacks
from eightfold.ops.cpu import CpuOps
from eightfold.random_checkpoint import random_checkpoint
from eightfold.types import EightfoldError
from pages import Page

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    num_experts=8,
    experts_per_token=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    rope=RopeConfig(1e4),
)
ROWS = {
    "boolq": {"title": "T", "passage": "P.", "question": "is it", "answer": True},
    "gsm8k": {"question": "how many?", "answer": "#### 3"},
    "humaneval": {"prompt": "def f():\n", "test": ""},
    "customize": {"question": "what is it?"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("bench") / "model", TINY, scheme="w8a8")


def opened(folder: Path, **options: Any) -> Bench:
    given = {"block_size": 16, "max_model_len": 128, "skip_tokenizer_init": True, "threads": 1}
    given |= {"enable_prefix_caching": False, **options}
    return Bench(LLM(str(folder), **given), str(folder), given["block_size"])


# --- what is typed ---


@pytest.mark.parametrize(
    ("text", "cases"),
    [
        ("[[2048,2048],[512,512]]", [(2048, 2048), (512, 512)]),
        ("[2048,2048],[512,512]", [(2048, 2048), (512, 512)]),
        ("[[64, 8]]", [(64, 8)]),
        ("[64,8]", [(64, 8)]),
        ("64,8", [(64, 8)]),
        ("[(64, 8), (1, 1)]", [(64, 8), (1, 1)]),
    ],
)
def test_cases(text: str, cases: list[tuple[int, int]]) -> None:
    assert parse_cases(text) == cases


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1,2],[3]", "1 of its brackets are not closed"),
        ("[[1,2]]]", "']' at place 8 does not belong there"),
        ("[[1,x]]", "'x' at place 5 does not belong there"),
        ("[[1,2],]", "']' at place 8"),
        ("[[1,2] [3,4]]", r"'\[' at place 8"),
        ("[[1,2],", "brackets are not closed"),
        ("", "ends too soon"),
        ("[[1,2],[3]]", r"case 2 is \[3\]; it must be a pair"),
        ("[[1,2],3]", "case 2 is 3; it must be a pair"),
        ("[[1,2],[0,4]]", r"case 2 is \[0,4\]; both lengths must be whole numbers from 1"),
        ("[[-1,2]]", "'-' at place 3"),
    ],
)
def test_malformed_cases(text: str, message: str) -> None:
    with pytest.raises(EightfoldError, match=message):
        parse_cases(text)


@pytest.mark.parametrize(
    ("text", "cases", "batches"),
    [
        ("4", 2, [[4], [4]]),
        ("[1]", 1, [[1]]),
        ("1,4,1", 2, [[1, 4], [1, 4]]),
        ("[1,4]", 1, [[1, 4]]),
        ("[[1,4],[1,8]]", 2, [[1, 4], [1, 8]]),
    ],
)
def test_batches(text: str, cases: int, batches: list[list[int]]) -> None:
    assert parse_batches(text, cases) == batches


@pytest.mark.parametrize(
    ("text", "cases", "message"),
    [
        ("[[1,4],[1,8]]", 3, "lists for 2 cases but there are 3"),
        ("[[1],4]", 2, "for case 2 it is 4"),
        ("1,0", 1, r"for case 1 it is \[1,0\]"),
        ("many", 1, "'m' at place 1"),
    ],
)
def test_batches_that_do_not_match(text: str, cases: int, message: str) -> None:
    with pytest.raises(EightfoldError, match=message):
        parse_batches(text, cases)


def test_range_of_batches() -> None:
    assert parse_range("1,64") == parse_range("[1,64]") == (1, 64)
    for text in ("64,1", "5", "0,4", "1,2,3", "[[1,2],[3,4]]"):
        with pytest.raises(EightfoldError, match="the lowest and highest batch to try"):
            parse_range(text)


# --- data sets ---


@pytest.mark.parametrize("name", ROWS)
def test_prompts_of_a_data_set(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / DATASETS[name].file
    path.parent.mkdir()
    path.write_text(f"{json.dumps(ROWS[name])}\n\n{json.dumps(ROWS[name])}\n")
    expected = {
        "boolq": "T -- P.\nQuestion: is it?\nAnswer:",
        "gsm8k": "how many?",
        "humaneval": "def f():\n",
        "customize": "what is it?",
    }
    for place in (tmp_path, path.parent, path):
        found = list(read_dataset(name, str(place)))
        assert found == [(f"{path}:1", expected[name]), (f"{path}:3", expected[name])]


def test_data_is_found_where_users_of_the_reference_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EightfoldError, match="none of tests/modeltest/data/gsm8k, data/gsm8k, gsm8k holds GSM8K"):
        find_file("gsm8k", None)
    place = Path("tests/modeltest/data/gsm8k")
    place.mkdir(parents=True)
    (place / "other.jsonl").write_text("{}")
    assert find_file("gsm8k", None) == place / "other.jsonl"
    (place / "more.jsonl").write_text("{}")
    with pytest.raises(EightfoldError, match=r"holds 2 files \*\.jsonl and none is GSM8K"):
        find_file("gsm8k", None)
    (place / "GSM8K.jsonl").write_text("{}")
    assert find_file("gsm8k", None) == place / "GSM8K.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a"}\n{"question"', r"dev\.jsonl:2 is not valid JSON"),
        (b'{"question": "a"}\n\n[]', r"dev\.jsonl:3 holds a list; an object with question is needed"),
        (b'{"answer": "a"}', r"dev\.jsonl:1 has no 'question'; it has answer"),
        (b'{"question": 3}', r"dev\.jsonl:1: 'question' is 3; it must be of type str"),
        (b'{"question": "a"}\n\xff', r"dev\.jsonl:2 is not text in UTF-8 \(byte 0xff\)"),
        (b"\n", r"dev\.jsonl holds no item"),
    ],
)
def test_malformed_data(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_bytes(content)
    with pytest.raises(EightfoldError, match=message):
        list(read_dataset("customize", str(path)))


@pytest.mark.parametrize(("padding", "length"), [(False, [8, 12]), (True, [12, 12])])
def test_prompts_are_cut_and_padded_to_a_case(padding: bool, length: list[int], demo: Path, tmp_path: Path) -> None:
    data = tmp_path / "customize.jsonl"
    data.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("Who is the CEO?", "a b c " * 20)))
    options = RequestOptions(
        {"model": str(demo)}, cases=[Case(12, 3)], batches=[[2]], dataset="customize", data=str(data), padding=padding
    )
    plan = make_plan(options)
    (test,) = plan.tests
    assert test.name == "customize in 12 out 3 batch 2"
    assert [len(ask.prompt) for ask in test.asks][1] == length[1]
    assert len(test.asks[0].prompt) == (12 if padding else len(make_plan_prompt(demo, "Who is the CEO?")))
    assert all(ask.ignore_eos and ask.output_len == 3 for ask in test.asks)
    assert plan.notes == ["customize has 2 prompts that can be used, fewer than --num-prompts"]


def make_plan_prompt(demo: Path, text: str) -> list[int]:
    (test,) = make_plan(RequestOptions({"model": str(demo)}, prompts=[text])).tests
    return list(test.asks[0].prompt)


# --- what is counted ---


def steps_of(run: Run) -> list[tuple[Row, ...]]:
    return [step.rows for step in run.steps]


def test_a_single_request_is_a_prefill_and_its_decode_steps(folder: Path) -> None:
    bench = opened(folder)
    run = bench.run(bench.random_asks(Case(20, 4), 1), 1)
    assert steps_of(run) == [(Row(20, 20),), (Row(1, 21),), (Row(1, 22),), (Row(1, 23),)]
    assert [(step.prompt_tokens, step.decoded, step.outputs) for step in run.steps] == [(20, 0, 1), *[(0, 1, 1)] * 3]
    assert len(run.prefill_times) == 1 and len(run.decode_times) == 3
    token = 3 * 2 * 4 * 16 * 2
    assert run.kv_bytes == 32 * token  # two pages of 16
    # After the last layer's attention only the token whose logits are wanted goes on.
    assert run.expert_counts.sum(axis=1).tolist() == [2 * 23, 2 * 23, 2 * 4]
    assert run.decode_work is not None and run.prefill_work is not None
    formats = bench._formats
    expected = model_step(bench.model, formats, [Row(1, 21)], 1, [2, 2, 2])
    for length in (22, 23):
        expected += model_step(bench.model, formats, [Row(1, length)], 1, [2, 2, 2])
    assert run.decode_work == expected


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 17}, {"max_num_seqs": 2}])
def test_every_token_of_every_request_is_counted_once(folder: Path, options: dict[str, int]) -> None:
    bench = opened(folder, **options)
    asks = [Ask(bench.random_asks(Case(length, 1), 1)[0].prompt, out) for length, out in ((30, 5), (7, 1), (19, 9))]
    run = bench.run([*asks, *asks], 3)
    assert [(one.input_tokens, one.output_tokens) for one in run.requests] == [(30, 5), (7, 1), (19, 9)] * 2
    assert sum(step.prompt_tokens for step in run.steps) == run.input_tokens == 112
    assert sum(step.outputs for step in run.steps) == run.output_tokens == 30
    assert sum(step.decoded for step in run.steps) == 30 - 6  # all but the first tokens
    assert max(len(step.rows) for step in run.steps) == min(3, options.get("max_num_seqs", 3))
    assert all(one.finish_reason == "length" for one in run.requests)
    for one in run.requests:
        assert one.arrival < one.token_times[0] and sorted(one.token_times) == one.token_times
        assert one.first_token_seconds + sum(one.gaps) == pytest.approx(one.seconds)
    assert run.requests[3].arrival > 0 == run.preemptions


def test_requests_wait_until_one_has_ended(folder: Path) -> None:
    bench = opened(folder)
    run = bench.run(bench.random_asks(Case(9, 3), 5), 2)
    arrivals = [one.arrival for one in run.requests]
    assert arrivals[2] > run.requests[0].token_times[-1] and arrivals[4] > run.requests[2].token_times[-1]
    assert max(len(step.rows) for step in run.steps) == 2


def test_what_is_computed_again_after_a_preemption_is_counted(folder: Path) -> None:
    token = 3 * 2 * 4 * 16 * 4
    bench = opened(folder, kv_cache_memory_bytes=9 * 16 * token, max_model_len=112, dtype="float32")
    run = bench.run(bench.random_asks(Case(40, 60), 2), 2)
    assert run.preemptions > 0
    assert sum(step.prompt_tokens for step in run.steps) > 80
    assert run.output_tokens == 120 and bench.run(bench.random_asks(Case(8, 2), 1), 1).preemptions == 0


def test_what_the_prefix_cache_holds_is_not_counted(folder: Path) -> None:
    bench = opened(folder, enable_prefix_caching=True)
    (ask,) = bench.random_asks(Case(40, 2), 1)
    first, again = bench.run([ask], 1), bench.run([ask], 1)
    assert (steps_of(first)[0], steps_of(again)[0]) == ((Row(40, 40),), (Row(8, 40),))


def test_figures_of_a_run() -> None:
    requests = (RequestTimes(10, 0.0, [1.0, 2.0, 4.0]), RequestTimes(6, 0.5, [3.0]))
    steps = (
        StepTimes(0.0, 1.0, (Row(10, 10),), 10, 0, 1),
        StepTimes(1.0, 1.0, (Row(1, 11),), 0, 1, 1),
        StepTimes(2.0, 0.5, (Row(6, 6),), 6, 0, 1),
        StepTimes(3.0, 0.5, (Row(1, 12),), 0, 1, 1),
    )
    run = Run(2, 4.0, requests, steps, None, None, np.ones((1, 1), np.int64), 1.0, 0, 0, 0, 0)
    assert [one.first_token_seconds for one in requests] == [1.0, 2.5]
    assert [one.seconds for one in requests] == [4.0, 2.5]
    assert [one.seconds_per_token for one in requests] == [1.5, None]
    assert run.gaps == [1.0, 2.0]
    assert (run.input_tokens, run.output_tokens) == (16, 4)
    assert (run.output_per_second, run.total_per_second) == (1.0, 5.0)
    assert run.prefill_per_second == 16 / 1.5
    assert (run.decode_per_second, run.decode_seconds_per_token) == (2 / 1.5, 0.75)


@pytest.mark.parametrize("best", range(3, 20))
def test_the_largest_batch_is_found(best: int) -> None:
    tried: list[int] = []

    def latency(batch: int) -> float:
        tried.append(batch)
        return 0.010 if batch <= best else 0.011

    found = largest_batch(latency, 3, 17, 0.0105)
    assert found.batch == min(best, 17)
    assert list(found.tried) == tried and len(tried) == len(set(tried)) <= 6
    assert found.tried[found.batch] <= 0.0105


def test_a_limit_that_the_smallest_batch_misses() -> None:
    with pytest.raises(EightfoldError, match=r"even batch 3 takes 12\.5 ms a token, above the latency limit of 10 ms"):
        largest_batch(lambda batch: 0.0125, 3, 17, 0.010)
    assert largest_batch(lambda batch: 0.0125, 3, 3, 0.0125).batch == 3


# --- the command ---


def command(*words: object) -> int:
    return main(["bench", "requests", *map(str, words), "--threads", "1"])


def test_several_ranks_are_judged_by_the_limits_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Probed on the cores and threads of both, and rank 0 is back on its own afterwards."""
    probed = []

    def probe(_: CpuOps, threads: int | None = None) -> dict[str, float]:
        probed.append((threads, os.sched_getaffinity(0)))
        return dict.fromkeys(("int8", "bf16", "fp32", "read"), 1e9)

    monkeypatch.setattr(CpuOps, "probe", probe)
    data, before = tmp_path / "out.json", os.sched_getaffinity(0)
    words = ["demo", "--cases", "[[20,4]]", "--batch", "2", "--repeat", "1", "--tensor-parallel-size", "2"]
    assert command(*words, "--json", data) == 0
    assert probed == [(2, before)] * len(probed) and len(probed) == 2
    assert os.sched_getaffinity(0) == before
    (one,) = json.loads(data.read_text())["results"]
    assert all(one["samples"][0][f"{kind}_share_of_limit"] > 0 for kind in ("prefill", "decode"))
    assert capsys.readouterr().err == ""


def test_command_writes_tables_json_csv_and_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, rows, page = (tmp_path / name for name in ("out.json", "out.csv", "out.html"))
    cases = ["--cases", "[[20,4],[9,1]]", "--batch", "[[1,3],[2]]", "--repeat", "2", "--seed", "7"]
    assert command(folder, *cases, "--json", data, "--csv", rows, "--html", page) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(data.read_text())
    assert {"command", "machine", "versions", "backend", "probes", "results", "model", "engine"} <= report.keys()
    names = ["in 20 out 4 batch 1", "in 20 out 4 batch 3", "in 9 out 1 batch 2"]
    assert [one["test"] for one in report["results"]] == names
    for one in report["results"]:
        assert len(one["samples"]) == 2 and all(name in out for name in names)
        for sample in one["samples"]:
            assert len(sample["requests"]) == one["batch"]
            tokens = sum(request["output_tokens"] for request in sample["requests"])
            assert sample["output_tokens_per_second"] == pytest.approx(tokens / sample["seconds"])
            assert sum(step[2] for step in sample["steps"]) == one["batch"] * one["input_tokens"][0]
            assert sample["anonymous_bytes"] > 0 and sample["prefill_share_of_limit"] > 0
    last = report["results"][-1]["samples"][0]
    assert last["itl_ms_p50"] is last["decode_tokens_per_second"] is last["decode_share_of_limit"] is None
    assert np.array(report["expert_counts"]).shape == (3, 8)
    with rows.open(newline="") as opened_file:
        table = list(csv.DictReader(opened_file))
    assert [row["test"] for row in table] == names
    assert [row["output_tokens"] for row in table] == ["4", "4", "1"]
    middle = report["results"][1]["spreads"]["ttft_ms_p90"][0]
    assert float(table[1]["ttft_p90_ms"]) == pytest.approx(middle, rel=1e-5)
    assert table[2]["itl_p99_ms"] == "" and float(table[0]["kv_cache_mb"]) > 0
    content = page.read_text()
    parsed = Page(content)
    assert (parsed.open, parsed.loads, parsed.charts) == ([], [], 6)
    assert "url(" not in content and "@import" not in content and names[1] in content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.html", "out.json"]


def test_command_searches_the_largest_batch(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    search = ["--cases", "[8,3]", "--max-batch", "1,3", "--repeat", "1"]
    assert command(folder, *search, "--latency-limit", "60000", "--html", page) == 0
    assert "in 8 out 3: batch 3 is the largest within 60000 ms a token" in capsys.readouterr().out
    assert "Up to 3 requests at once stay within 60000 ms" in page.read_text()
    assert command(folder, *search, "--latency-limit", "0.0001") == 2
    assert re.search(r"even batch 1 takes [\d.]+ ms a token, above", capsys.readouterr().err)


def test_command_measures_data_sets_and_prompts(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "dev.jsonl"
    data.write_text((json.dumps(ROWS["boolq"]) + "\n") * 3)
    few = ["--repeat", "1", "--output-len", "3", "--num-prompts", "2"]
    assert command(demo, "--dataset", "boolq", "--data", data, "--batch", "2", *few) == 0
    assert "boolq out 3 batch 2" in capsys.readouterr().out
    prompt = ["--prompt", "Who is the CEO of Google?", "--output-len", "12", "--repeat", "1", "--batch", "2"]
    page = tmp_path / "out.html"
    assert command("demo", *prompt, "--html", page) == 0
    out = capsys.readouterr().out
    (answer,) = re.findall(r"prompt 1 batch 2 \(\d+ tokens, \w+\): (.*)", out)
    llm = LLM("demo", threads=1)
    from eightfold import SamplingParams

    (output,) = llm.generate(["Who is the CEO of Google?"], SamplingParams(temperature=0, max_tokens=12))
    assert output.outputs[0].text.splitlines()[0] == answer
    assert "What it said" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "[[8,4],[8"], "2 of its brackets are not closed"),
        (["--cases", "[[8,4]]", "--batch", "[[1],[2]]"], "lists for 2 cases but there are 1"),
        (["--cases", "[[1000,25]]"], "sequences of 1025 tokens and the context holds 1024"),
        (["--cases", "[[60,5]]", "--max-model-len", "64"], "the context holds 64: shorten it or raise --max-model-len"),
        (["--dataset", "bolq"], "'bolq' is not known; did you mean boolq? there are boolq, gsm8k"),
        (["--dataset", "gsm8k", "--data", "/no/such"], "--data /no/such: there is no such file or folder"),
        (["--data", "x"], "--data needs --dataset"),
        (["--padding"], "--padding needs --dataset"),
        (["--prompt", "x"], "tokenizer"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "x", "--cases", "8,4"], "--prompt and --cases do not go together"),
        (["--max-batch", "1,4"], "--max-batch and --latency-limit belong together"),
        (["--max-batch", "4,1", "--latency-limit", "5"], "the lowest and highest batch to try"),
        (["--max-batch", "1,4", "--latency-limit", "0"], "--latency-limit is 0.0"),
        (["--max-batch", "1,4", "--latency-limit", "5", "--batch", "2"], "--max-batch and --batch do not go together"),
        (["--max-batch", "1,4", "--latency-limit", "5", "--cases", "8,1"], "at least 2 tokens"),
        (["--cases", "8,4", "--output-len", "4"], "--output-len does not go with --cases"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--json", "/no/such/folder/a.json"], "there is no folder /no/such/folder"),
        (["--html", "/"], "/ is a folder"),
        (["--csv", "/no/such/folder/a.csv"], "there is no folder"),
        (["--kv-cache-memory-bytes", "1K"], "fewer than the context"),
    ],
)
def test_bad_input(words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_lost_pages_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tight = ["--cases", "[40,60]", "--batch", "2", "--block-size", "16", "--kv-cache-memory-bytes", "216K"]
    assert command(folder, *tight, "--kv-cache-dtype", "float32", "--repeat", "1") == 0
    assert "note: in 40 out 60 batch 2: keys and values did not fit;" in capsys.readouterr().out


# --- pictures ---


@pytest.fixture(params=["lines", "ranges", "curves", "roofline", "stacks", "heat map", "tall heat map"])
def picture(request: pytest.FixtureRequest) -> Iterator[str]:
    name = '<b>"&'
    drawn = {
        "lines": lambda: lines([Series(name, "a", [1.0, None, 3.0])], ["1", "2", "3"], name, str),
        "ranges": lambda: ranges([Range(name, (1.0, 2.0, 30.0))], ("50", "90", "99"), name, str),
        "curves": lambda: curves([Curve(name, "a", [(1e-3, 0.0), (1e-3, 1.0)])], name, str, str),
        "roofline": lambda: roofline([Spot(name, 0.5, 1e9, name)], [Roof(name, 1e12)], 1e10, name, str),
        "stacks": lambda: stacks([Stack(name, (0.25, 0.5, 0.25), name)], ("x", "y", "z")),
        "heat map": lambda: heat_map([[0.5, 0.5], [0.0, 1.0]], name, name, str),
        "tall heat map": lambda: heat_map([[0.0] * 64] * 60, name, name, str),
    }
    yield drawn[request.param]()


def test_pictures_hold_finite_numbers_and_escape_text(picture: str) -> None:
    assert "nan" not in picture and "inf" not in picture and "<b>" not in picture and "&lt;b&gt;" in picture

    class Drawing(Page):
        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("line", "polyline", "rect")

    parsed = Drawing(picture)
    assert (parsed.open, parsed.charts) == ([], 1)
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture)[0])
    for axis, most in (("x", width), ("y", height)):
        for value in re.findall(rf' c?{axis}\d?="(-?[\d.]+)"', picture):
            assert 0 <= float(value) <= most

"""`eightfold eval` as its users meet it: the demo model on small data sets in the real formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold import LLM, SamplingParams
from eightfold.cli import main
from eightfold.eval.ask import Prompting, ask, shorten
from eightfold.eval.boolq import BoolQ
from eightfold.eval.evaluate import evaluate, neighbours
from eightfold.eval.longbench import LongBench
from eightfold.eval.records import Records
from eightfold.eval.results import DEBUG_COLUMNS
from eightfold.eval.task import Answer, Compare, Generate, Item, Likelihood, LoadOptions
from eightfold.types import EightfoldError

USERS_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside a checkout, where there is one
ROW = {"title": "T", "question": "is it so", "passage": "It is so.", "answer": True}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32", max_model_len=4096)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """eightfold eval demo … → (exit code, standard output, standard error); results go to tmp_path/out."""

    def call(*words: str) -> tuple[int, str, str]:
        status = main(["eval", "demo", "--output", str(tmp_path / "out"), "--max-model-len", "2048", *words])
        return status, *capsys.readouterr()

    return call


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_the_demo_reads_what_it_has_not_seen(demo: Path, run: Any, tmp_path: Path) -> None:
    status, out, err = run("--task", "boolq", "--data", str(demo / "heldout.jsonl"))
    assert status == 0 and "800 items" in err
    result = json.loads((tmp_path / "out" / "boolq_result.json").read_text())
    assert result["total"]["accuracy"] >= 0.9 and result["total"]["items"] == 800
    low, high = result["total"]["interval_95"]
    assert low < result["total"]["accuracy"] < high and f"{100 * low:.2f}–{100 * high:.2f}" in out
    with (tmp_path / "out" / "boolq_result.csv").open() as file:
        total, *subjects = csv.DictReader(file)
    assert total == {
        "file_name": "total",
        "value": str(result["total"]["accuracy"]),
        "correct": f"{result['total']['correct']:g}",
        "sum": "800",
    }
    assert [row["file_name"] for row in subjects] == ["heldout.jsonl"]
    with (tmp_path / "out" / "boolq_debug.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == DEBUG_COLUMNS and len(rows) == 800
    assert sum(row["pass"] == "True" for row in rows) == result["total"]["correct"]
    assert all((row["test_result"] == row["golden_result"]) == (row["pass"] == "True") for row in rows)
    assert rows[0]["queries"].endswith("?\nAnswer:") and json.loads(rows[0]["input_token_ids"])[0] == 1


@pytest.mark.skipif(not (USERS_DATA / "boolq").is_dir(), reason="the data sets are not beside this checkout")
@torch.inference_mode()
def test_boolq_is_scored_as_transformers_does(demo: Path, llm: LLM) -> None:
    transformers = pytest.importorskip("transformers")
    reader = transformers.AutoTokenizer.from_pretrained(demo)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    yes, no = (reader(f": {word}", add_special_tokens=False).input_ids[-1] for word in ("yes", "no"))
    task = BoolQ()
    items = task.load(USERS_DATA / "boolq", LoadOptions())
    assert len(items) == 3270
    chosen = items[::65]
    for item, found in ask(llm.engine, ((item, task.queries(item)[0]) for item in chosen), Prompting(3072)):
        ids = reader(task.queries(item)[0].prompt).input_ids
        assert found.prompt_token_ids == ids
        logprobs = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].log_softmax(-1)
        assert found.logprobs == pytest.approx((float(logprobs[yes]), float(logprobs[no])), abs=2e-3)
        assert task.score(item, [found]).result == ("yes" if logprobs[yes] > logprobs[no] else "no")


@pytest.mark.skipif(not (USERS_DATA / "gsm8k").is_dir(), reason="the data sets are not beside this checkout")
def test_users_data_load_and_run(run: Any, tmp_path: Path) -> None:
    command = ["--task", "gsm8k,HumanEval", "--data", str(USERS_DATA), "--limit", "3", "--allow-code-execution"]
    status, out, _ = run(*command, "--batch-size", "2", "--max-tokens", "20")
    assert status == 0 and "GSM8K" in out and "pass@1" in out
    assert len((tmp_path / "out" / "humaneval.jsonl").read_text().splitlines()) == 4


def test_an_interrupted_run_goes_on(demo: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "some.jsonl", (demo / "heldout.jsonl").read_text().splitlines()[:30])
    command = ["--task", "boolq", "--data", str(data)]
    score, calls = BoolQ.score, 0

    def interrupting(self: BoolQ, item: Item, answers: Sequence[Answer]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return score(self, item, answers)

    monkeypatch.setattr(BoolQ, "score", interrupting)
    status, out, err = run(*command)
    assert status == 130 and not out and "10 items are kept" in err
    records = tmp_path / "out" / "boolq.jsonl"
    with records.open("a") as file:
        file.write('{"key": "cut sho')
    monkeypatch.setattr(BoolQ, "score", score)
    status, whole, err = run(*command, "--max-num-seqs", "3")  # of no consequence for answers
    assert status == 0 and "20 items in" in err and "10 finished before" in err
    assert len(records.read_text().splitlines()) == 31
    debug = (tmp_path / "out" / "boolq_debug.csv").read_text()
    status, out, err = run(*command, "--overwrite")
    assert out == whole and "30 items in" in err
    assert (tmp_path / "out" / "boolq_debug.csv").read_text() == debug
    status, _, err = run(*command, "--dtype", "float32")
    assert status == 2 and "dtype: 'auto' there, 'float32' now" in err and "--overwrite" in err
    write(data, (demo / "heldout.jsonl").read_text().splitlines()[1:31])
    status, _, err = run(*command)
    assert status == 2 and "data:" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "boolk"], "did you mean boolq?"),
        (["--task", "MM-LU", "--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["--task", "xyzzy"], "there are boolq, mmlu"),
        (["--task", "boolq"], "none of tests/modeltest/data/boolq, data/boolq, boolq holds *.jsonl"),
        ([], "give --task"),
        (["--task", "boolq", "--lm-eval", "x"], "give --task"),
        (["--task", "humaneval", "--data", "{data}"], "--allow-code-execution"),
        (["--task", "boolq", "--data", "{data}", "--shots", "2"], "there are no examples in boolq"),
        (["--task", "boolq", "--data", "{data}", "--max-tokens", "2"], "--max-tokens 2: nothing is generated"),
        (["--task", "boolq", "--data", "{data}", "--limit", "0"], "--limit is 0"),
        (["--task", "boolq", "--data", "{data}", "--subjects", "x"], "no subject 'x'; there are rows.jsonl"),
        (["--task", "truthfulqa", "--data", "{data}/rows.jsonl"], "has files such as TruthfulQA.csv"),
        (["--task", "boolq", "--data", "{data}", "--output", "{data}/rows.jsonl/x"], "cannot write"),
        (["--task", "boolq", "--data", "{data}", "--skip-tokenizer-init"], "data sets are text"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "given" / "rows.jsonl", [ROW]).parent
    status, out, err = run(*(word.replace("{data}", str(data)) for word in words))
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'title'}", "rows.jsonl:2 is not valid JSON"),
        ("[1]", "rows.jsonl:2 holds a list"),
        (json.dumps({**ROW, "answer": "yes"}), "rows.jsonl:2: 'answer' is 'yes'; it must be of type bool"),
        (json.dumps({name: ROW[name] for name in ("title", "question", "answer")}), "rows.jsonl:2 has no 'passage'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: str, message: str, run: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [ROW, line])
    status, out, err = run("--task", "boolq", "--data", str(data))
    assert (status, out) == (2, "") and message in err
    assert not (tmp_path / "out").exists()


def test_text_that_is_none_is_named_by_line(run: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(json.dumps(ROW).encode() + b"\n\xff\xfe\n")
    assert "rows.jsonl:2 is not text in UTF-8" in run("--task", "boolq", "--data", str(data))[2]


def test_a_folder_that_can_not_be_written(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write anywhere
    data = write(tmp_path / "rows.jsonl", [ROW])
    status, _, err = run("--task", "boolq", "--data", str(data))
    assert status == 2 and "out: no permission" in err


def test_items_of_one_key_are_refused(llm: LLM, tmp_path: Path) -> None:
    task = BoolQ()
    (item,) = task.load(write(tmp_path / "rows.jsonl", [ROW]), LoadOptions())
    with pytest.raises(EightfoldError, match=r"boolq: rows\.jsonl:1 stands in the data twice"):
        evaluate(llm.engine, task, [item, item], Prompting(3072), Records(tmp_path / "records.jsonl", {}))


def test_a_failed_request_leaves_no_record(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = BoolQ()
    items = task.load(write(tmp_path / "rows.jsonl", [ROW, {**ROW, "title": "U"}]), LoadOptions())
    real, failures = llm.engine._runner.run, []

    def broken(plan: Any) -> torch.Tensor:
        logits = real(plan).clone()
        logits[0] = float("nan")
        return logits

    monkeypatch.setattr(llm.engine._runner, "run", broken)
    records = Records(tmp_path / "boolq.jsonl", {})
    done = evaluate(llm.engine, task, items, Prompting(3072), records, failed=failures.append)
    assert len(done) == 1 and len(failures) == 1 and "not finite" in failures[0]
    assert not llm.engine.has_unfinished_requests


def test_what_begins_alike_is_asked_in_a_row() -> None:
    rows = [{**ROW, "title": title, "question": f"is it {number}"} for number, title in enumerate("ABACB")]
    items = [Item(str(number), "boolq", "yes", row) for number, row in enumerate(rows)]
    assert [item.key for item in neighbours(items, BoolQ().beginning)] == ["0", "2", "1", "4", "3"]
    assert neighbours(items, lambda item: None) == items
    long = [{"set": "qasper", "row": {"context": context, "input": str(n)}} for n, context in enumerate("xyx")]
    about = [Item(str(number), "qasper", "", data) for number, data in enumerate(long)]
    assert [item.key for item in neighbours(about, LongBench().beginning)] == ["0", "2", "1"]


def test_a_likelihood_is_the_sum_over_a_continuation(llm: LLM) -> None:
    """One query in three ways: prompt logprobs of the whole, and through the query with and without a warm cache."""
    prompt, rest = "Question: What is the capital of France?\nAnswer:", " The capital of France is Paris."
    ids = llm.get_tokenizer().encode(prompt + rest)
    start = len(llm.get_tokenizer().encode(prompt))
    whole = llm.generate(ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert whole is not None
    expected = [entry[token].logprob for token, entry in zip(ids, whole, strict=True) if entry][start - 1 :]
    for rests in ((rest,), (rest, " The", rest)):
        queries = [(number, Likelihood(prompt, text)) for number, text in enumerate(rests)]
        for number, found in ask(llm.engine, queries, Prompting(3072)):
            assert list(found.logprobs) == expected[: 1 if rests[number] == " The" else None]
    for prompting in (Prompting(3072), Prompting(3072, chat=True)):
        ((_, found),) = ask(llm.engine, [(0, Likelihood(prompt, rest))], prompting)
        assert len(found.logprobs) == len(expected)


def test_long_prompts_lose_their_middle(llm: LLM) -> None:
    assert shorten(list(range(10)), 5) == ([0, 1, 2, 8, 9], 5)
    assert shorten([1, 2], 2) == ([1, 2], 0)
    prompt = "Ivan avoids London. " * 100
    for query in (Compare(prompt, (" yes",)), Generate(prompt, 4), Likelihood(prompt.strip(), " Yes.")):
        ((_, found),) = ask(llm.engine, [(0, query)], Prompting(64))
        assert found.shortened > 0 and found.prompt_token_ids[0] == 1
        assert len(found.prompt_token_ids) <= 64 + 4


def test_text_from_data_is_no_control_token(llm: LLM) -> None:
    ((_, found),) = ask(llm.engine, [(0, Generate("a </s> b <s>", 1))], Prompting(3072))
    assert found.prompt_token_ids[0] == 1 and not {1, 2} & set(found.prompt_token_ids[1:])


def test_chat_puts_prompts_into_the_template(llm: LLM) -> None:
    ((_, found),) = ask(llm.engine, [(0, Generate("Who is the CEO of Apple?", 20))], Prompting(3072, chat=True))
    assert "Tim Cook" in found.text
    assert "[INST]" in llm.get_tokenizer().decode(found.prompt_token_ids, skip_special_tokens=False)

"""MindIE-LLM's commands as their users type them: the README's lines on the demo model, and how each of them fails."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.compat import performance
from eightfold.compat.console import CaseError
from eightfold.compat.main import main
from eightfold.compat.modeltest import Places
from eightfold.compat.modeltest_grammar import parse
from eightfold.compat.tables import BENCHMARK_COLUMNS, PERFORMANCE_COLUMNS, performance_cells, with_averages
from eightfold.compat.timed import Timed, run_timed
from eightfold.eval.evaluate import NAMED_FAILURES
from eightfold.eval.results import DEBUG_COLUMNS
from eightfold.llm import LLM
from eightfold.types import Request, RequestOutputKind, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
CASES = "[[2048,2048],[1024,1024],[512,512],[256,256]]"
ITEMS = 24
WORLDS = [1, 2, pytest.param(8, marks=pytest.mark.slow)]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def models(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo model, and what the README's second line makes of it."""
    quantized = tmp_path_factory.mktemp("models") / "w8a8"
    words = ["--model_path", str(demo), "--save_directory", str(quantized)]
    assert main(["convert_quant_weights.py", *words]) == 0
    return {"demo": str(demo), "w8a8": str(quantized)}


@pytest.fixture
def home(demo: Path, tmp_path: Path) -> Path:
    """A folder of modeltest with a small data set."""
    data = tmp_path / "home" / "data" / "boolq"
    data.mkdir(parents=True)
    lines = (demo / "heldout.jsonl").read_text().splitlines(keepends=True)[:ITEMS]
    (data / "dev.jsonl").write_text("".join(lines))
    return tmp_path / "home"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command with its words, in this process, in whose environment the keywords stand."""

    def run(command: str, *words: str, **environ: str) -> Ended:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        status = main([command, *words])
        return Ended(status, *capfd.readouterr())

    return run


def shell(command: str, cwd: Path = ROOT, **environ: str) -> Ended:
    """A line typed in a shell, whose Python is ours."""
    place = {**os.environ, "PYTHON": sys.executable, **environ}
    place["PATH"] = f"{Path(sys.executable).parent}:{place['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=place, capture_output=True, text=True, timeout=300)
    return Ended(done.returncode, done.stdout, done.stderr)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", ["demo", "w8a8"])
def test_dialogue(call: Any, models: dict[str, str], model: str, world: int, tmp_path: Path) -> None:
    devices = ",".join(map(str, range(world)))
    ended = call("run_pa.sh", models[model], "-trust_remote_code", ASCEND_RT_VISIBLE_DEVICES=devices)
    assert ended.status == 0
    assert ended.out.splitlines() == [
        "Question[0]: Who is the CEO of Google?",
        "Answer[0]:  The CEO of Google is Sundar Pic",
        "Generate[0] token num: (0, 10)",
    ]
    assert f"device: cpu, ranks: {world}" in ended.err and "no code from a checkpoint" in ended.err


@pytest.mark.parametrize("model", ["demo", "w8a8"])
def test_boolq(call: Any, models: dict[str, str], model: str, home: Path) -> None:
    for world in (1, 2):
        boolq(call, models, model, home, world)
    one, two = (debug(home, model, world) for world in (1, 2))
    assert (one == two) if model == "w8a8" else ([row["pass"] for row in one] == [row["pass"] for row in two])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo", "w8a8"])
def test_boolq_at_eight_ranks(call: Any, models: dict[str, str], model: str, home: Path) -> None:
    boolq(call, models, model, home, 8)


def boolq(call: Any, models: dict[str, str], model: str, home: Path, world: int) -> None:
    ended = call("run.sh", str(home), "pa_fp16", "full_BoolQ", "1", "mixtral", models[model], str(world))
    path = (
        home
        / "outputs/results/CPU/precision_test/full"
        / kind(model)
        / f"mixtral/BoolQ_pa_batch1_tp{world}_full_result.csv"
    )
    assert ended.status == 0 and str(path) in ended.out
    total, *subjects = table(path)
    assert list(total) == ["file_name", "value", "correct", "sum"]
    assert total["file_name"] == "total" and total["sum"] == str(ITEMS) and float(total["value"]) >= 0.9
    assert [row["file_name"] for row in subjects] == ["dev.jsonl"]
    rows = debug(home, model, world)
    assert tuple(rows[0]) == DEBUG_COLUMNS and len(rows) == ITEMS
    assert sum(row["pass"] == "True" for row in rows) == int(total["correct"])
    assert not list((home / "outputs/data").rglob("*.jsonl"))  # a finished run leaves nothing to go on from


def kind(model: str) -> str:
    return "fp16" if model == "demo" else "fp16_w8a8_dynamic"


def debug(home: Path, model: str, world: int) -> list[dict[str, str]]:
    folder = home / "outputs/debug/CPU/precision_test/full" / kind(model) / "mixtral"
    return table(folder / f"BoolQ_pa_batch1_tp{world}_full_debug_info.csv")


@pytest.mark.parametrize(
    ("world", "cases"),
    [(1, CASES), (2, "[[64,16],[32,8]]"), *(pytest.param(n, CASES, marks=pytest.mark.slow) for n in (2, 8))],
)
@pytest.mark.parametrize("model", ["demo", "w8a8"])
def test_performance(call: Any, models: dict[str, str], model: str, home: Path, world: int, cases: str) -> None:
    ended = call("run.sh", str(home), "pa_fp16", "performance", cases, "1", "mixtral", models[model], str(world))
    folder = home / "outputs/results/CPU/performance_test/performance" / kind(model) / "mixtral"
    path = folder / f"performance_pa_batch1_tp{world}_result.csv"
    assert ended.status == 0 and str(path) in ended.out
    rows, pairs = table(path), json.loads(cases)
    assert tuple(rows[0]) == PERFORMANCE_COLUMNS
    assert [[int(row["In_seq"]), int(row["Out_seq"])] for row in rows] == pairs
    for row, (_, out) in zip(rows, pairs, strict=True):
        seconds, decode = float(row["Total time(s)"]), float(row["Non-first token time(ms)"])
        assert float(row["Throughput(Tokens/s)"]) == pytest.approx(out / seconds, rel=1e-6)
        assert float(row["Non-first token Throughput(Tokens/s)"]) == pytest.approx(1e3 / decode, rel=1e-6)
        assert float(row["Prefill all time(ms)"]) + decode * (out - 1) <= 1e3 * seconds
    averages = [bool(row["E2E Throughput Average(Tokens/s)"]) for row in rows]
    assert averages == [False] * (len(rows) - 1) + [True]
    lines = (folder / f"performance_pa_batch1_tp{world}_formatted_result.csv").read_text().splitlines()
    assert [cell.strip() for cell in lines[-1].split("|")] == list(rows[-1].values())
    (measured,) = table(home / "benchmark.csv")
    assert tuple(measured) == BENCHMARK_COLUMNS and measured["output_seq_len"] == str(pairs[-1][1])
    assert len(measured["decode_token_times"].split(",")) == pairs[-1][1] - 1


def test_the_lines_of_the_readme_in_a_shell(models: dict[str, str], home: Path, tmp_path: Path) -> None:
    ended = shell(f"bash examples/models/mixtral/run_pa.sh -trust_remote_code {models['demo']} --is_chat_model")
    assert ended.status == 0 and "Answer[0]:  The CEO of Google is" in ended.out
    script = "examples/models/mixtral/convert_quant_weights.py"
    ended = shell(f"python {script} --model_path {models['demo']} --save_directory {tmp_path}/q --trust_remote_code")
    assert ended.status == 0 and (tmp_path / "q" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantize"] == "w8a8_dynamic"
    place = {"cwd": ROOT / "tests" / "modeltest", "EIGHTFOLD_MODELTEST_HOME": str(home)}
    assert shell(f"bash run.sh pa_fp16 full_BoolQ 1 mixtral {models['demo']} 1", **place).status == 0
    line = f"bash run.sh pa_fp16 performance [[9,5],[8,4]] 1 mixtral {tmp_path}/q 1"  # in no quotes
    assert shell(line, **place).status == 0
    assert len(list((home / "outputs/results").rglob("*_result.csv"))) == 3


def test_run_pa_as_a_file_a_module_and_under_torchrun(models: dict[str, str], tmp_path: Path) -> None:
    words = f"--model_path {models['demo']} --input_ids 1,5,6 7,8 --max_batch_size 2 --max_output_length 4 --ignore_eos"
    times = tmp_path / "times" / "benchmark.csv"
    switches = {"ATB_LLM_BENCHMARK_ENABLE": "1", "ATB_LLM_BENCHMARK_FILEPATH": str(times), "TASK_QUEUE_ENABLE": "1"}
    ended = shell(f"python examples/run_pa.py {words}", **switches)
    assert ended.status == 0 and ended.err.count("no effect on this backend: TASK_QUEUE_ENABLE") == 1
    assert re.findall(r"^(Question\[\d\]: .*|Generate\[\d\] token num: .*)$", ended.out, re.MULTILINE) == [
        "Question[0]: 1,5,6",
        "Generate[0] token num: (0, 4)",
        "Question[1]: 7,8",
        "Generate[1] token num: (1, 4)",
    ]
    (row,) = table(times)
    assert (row["batch_size"], row["input_seq_len"], row["output_seq_len"]) == ("2", "3", "4")
    spread = shell(f"torchrun --standalone --nproc_per_node 2 -m examples.run_pa {words}")
    assert (spread.status, spread.out) == (0, ended.out)


def test_answers_of_a_batch(call: Any, models: dict[str, str]) -> None:
    words = ["--model_path", models["demo"], "--is_chat_model", "--max_output_length", "30"]
    alone = call("run_pa.py", *words, "--input_texts", "Who is the CEO of Apple?", "--max_batch_size", "3")
    assert [line.split(":")[0] for line in alone.out.splitlines()] == [
        *("Question[0]", "Answer[0]", "Generate[0] token num"),
        *("Answer[1]", "Generate[1] token num", "Answer[2]", "Generate[2] token num"),
    ]
    answers = re.findall(r"Answer\[\d\]: (.*)", alone.out)
    assert len(set(answers)) == 1 and "Apple" in answers[0]
    texts = ["Who is the CEO of Google?", "Who is the CEO of Apple?"]
    both = call("run_pa.py", *words, "--max_batch_size", "2", "--input_texts", *texts)
    assert re.findall(r"Answer\[1\]: (.*)", both.out) == answers[:1]
    ids = call("run_pa.py", *words[:2], "--input_ids", "1,2", "--load_tokenizer", "false")
    assert re.search(r"Answer\[0\]: [\d,]+\n", ids.out)


def test_the_largest_batch(call: Any, models: dict[str, str], home: Path) -> None:
    words = ["performance_maxbs", "[[8,4],[6,3]]", "[[1,3],[1,1]]"]
    ended = call("run.sh", str(home), "pa_fp16", *words, "60000", "mixtral", models["demo"], "1")
    assert ended.status == 0 and "[8,4]: 3\n" in ended.out and "[6,3]: 1\n" in ended.out
    folder = home / "outputs/results/CPU/performance_test/performance_maxbs/fp16/mixtral"
    assert [row["Batchsize"] for row in table(folder / "performance_maxbs_pa_tp1_final_result.csv")] == ["3", "1"]
    assert [row["Batchsize"] for row in table(folder / "performance_maxbs_pa_tp1_round_result.csv")] == ["2", "3", "1"]
    ended = call("run.sh", str(home), "pa_fp16", *words, "0.0001", "mixtral", models["demo"], "1")
    assert ended.status == 1 and "no batch decodes within 0.0001 ms a token for the cases [8,4], [6,3]" in ended.err


def test_a_search_that_fails_leaves_what_was_measured(
    call: Any, models: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = performance.Tests._case

    def fails_at_three(self: performance.Tests, case: Any, batch: int, prompts: Any) -> list[str]:
        if batch == 3:
            raise CaseError("no memory for three")
        return measure(self, case, batch, prompts)

    monkeypatch.setattr(performance.Tests, "_case", fails_at_three)
    words = ["performance_maxbs", "[[6,3],[8,4]]", "[[1,1],[1,3]]", "60000"]
    ended = call("run.sh", str(home), "pa_fp16", *words, "mixtral", models["demo"], "1")
    assert ended.status == 1 and "no memory for three" in ended.err
    folder = home / "outputs/results/CPU/performance_test/performance_maxbs/fp16/mixtral"
    assert [row["Batchsize"] for row in table(folder / "performance_maxbs_pa_tp1_final_result.csv")] == ["1"]
    assert [row["Batchsize"] for row in table(folder / "performance_maxbs_pa_tp1_round_result.csv")] == ["1", "2"]


def test_single_texts_and_prompts_of_data_sets(call: Any, models: dict[str, str], home: Path) -> None:
    line = ["mixtral", "chat", models["demo"], "1"]
    ended = call(
        "run.sh", str(home), "pa_fp16", "precision_single", "[[64,30]]", '["Who is the CEO of Apple?"]', "2", *line
    )
    assert ended.status == 0 and ended.out.count("Answer[") == 2 and ended.out.count("Question[") == 1
    assert not list((home / "outputs").rglob("*.csv"))
    ended = call("run.sh", str(home), "pa_bf16", "performance_single", "[[64,5]]", '["a b","c"]', "1", *line)
    assert ended.status == 0 and "2 texts run together" in ended.err and "token num: (1, 5)" in ended.out
    ended = call("run.sh", str(home), "pa_fp16", "performance_single", "[[64,5],[64,3]]", '["a b"]', "1", *line)
    (file,) = (home / "outputs/results/CPU/performance_test/performance_single/fp16").rglob("*1_tp1_result.csv")
    assert [row["Out_seq"] for row in table(file)] == ["5", "3"]
    words = ["performance", "[[16,4]]", "5", "prefill_length", "9", "dataset", "boolq", "padding", "9"]
    ended = call("run.sh", str(home), "pa_fp16", *words, *line)
    assert ended.status == 0 and "boolq has 4 batches of 5, fewer than 9" in ended.err
    assert "prefill_length 9 has no effect without MODELTEST_PD_SPLIT_ENABLE=1" in ended.err
    (row,) = table(
        home / "outputs/results/CPU/performance_test/performance/fp16/mixtral/performance_pa_batch5_tp1_result.csv"
    )
    assert (row["Batchsize"], row["In_seq"], row["Out_seq"]) == ("5", "16", "4")


def test_prompts_of_data_sets_are_messages_to_a_chat_model(tmp_path: Path) -> None:
    test = parse("pa_fp16 performance [[9,2]] 1 dataset boolq mixtral chat W 1".split())
    places = Places(*[tmp_path] * 5)
    with LLM("demo") as llm:
        tokenizer = llm.get_tokenizer()
        message = [{"role": "user", "content": "a"}]
        assert performance.Tests(test, llm, 9, places).encode(["a"]) == [tokenizer.encode_chat(message)]
        assert performance.Tests(replace(test, chat=False), llm, 9, places).encode(["a"]) == [tokenizer.encode("a")]


def test_steps_are_told_apart() -> None:
    with LLM("demo", max_num_batched_tokens=16, max_num_seqs=2, max_model_len=128, enable_prefix_caching=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
        timed = run_timed(llm.engine, [Request("0", list(range(3, 43)), params)])
        assert (len(timed.prefills), len(timed.decodes)) == (3, 4)  # 40 tokens in chunks of 16
        three = run_timed(llm.engine, [Request(str(number), [3, 4, 5], params) for number in range(3)])
        assert (len(three.prefills), len(three.decodes)) == (2, 8)  # the third waits for a place
    assert timed.seconds >= timed.prefill_seconds + sum(timed.decodes)


def test_the_arithmetic_of_the_tables() -> None:
    row = performance_cells("mixtral", (10, 5), 2, 4.0, 1.0, 0.5, 0.25)
    assert row == ["mixtral", "2", "10", "5", "4.0", "1000.0", "500.0", "250.0", "8.0", "2.5"]
    assert performance_cells("m", (10, 1), 2, 4.0, 1.0, 0.5, 0.0)[8] == "0.0"
    other = performance_cells("mixtral", (10, 5), 2, 2.0, 1.0, 0.5, 0.5)
    assert with_averages([row, other]) == [row, [*other, "6.0", "3.75"]]
    assert Timed((), (), (1.0, 2.0), 3.0).decode_token_seconds(4) == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("full_MMLU 5 1 mixtral MODEL 1", "no data for MMLU: there is no folder"),
        ("full_HumanEval 1 mixtral MODEL 1", "set EIGHTFOLD_ALLOW_CODE_EXECUTION=1"),
        ("full_BoolQ 1 mixtral MODEL 3", "3 ranks cannot share 8 heads and 4 KV heads evenly"),
        ("full_BoolQ 1 mixtral MODEL 1 9000", "max_position_embeddings is 9000; the model has 8192 at most"),
        ("full_BoolQ 1 mixtral absent-folder 1", "absent-folder"),
        ("performance [[8192,1]] 1 mixtral MODEL 1", "makes sequences of 8193 tokens, and the context holds 8192"),
        ("performance [[9,9]] 1 dataset gsm8k mixtral MODEL 1", "no data for gsm8k: there is no folder"),
        ("full_BoolQA 1 mixtral MODEL 1", "did you mean full_BoolQ?"),
    ],
)
def test_what_cannot_be_run(call: Any, models: dict[str, str], home: Path, words: str, message: str) -> None:
    ended = call("run.sh", str(home), "pa_fp16", *words.replace("MODEL", models["demo"]).split())
    assert ended.status == 2 and message in ended.err and not list((home / "outputs").rglob("*.csv"))


def test_data_that_cannot_be_used(call: Any, models: dict[str, str], home: Path) -> None:
    line = ["run.sh", str(home), "pa_fp16", "full_BoolQ", "1", "mixtral", models["demo"], "1"]
    with (home / "data/boolq/dev.jsonl").open("a") as file:
        file.write('{"question": 1}\n')
    ended = call(*line)
    assert ended.status == 2 and f"dev.jsonl:{ITEMS + 1}" in ended.err
    (home / "data/boolq/dev.jsonl").unlink()
    ended = call(*line)
    assert ended.status == 2 and "no data for boolq" in ended.err and "*.jsonl" in ended.err

    ceval = home / "data" / "ceval" / "val"
    ceval.mkdir(parents=True)
    (ceval / "law_val.csv").write_text("id,question,A,B,C,D,answer\n")
    words = ["performance", "[[9,9]]", "1", "dataset", "ceval", *line[-3:]]
    ended = call(*line[:3], *words)
    assert ended.status == 2 and "ceval holds no item" in ended.err


def test_a_benchmark_file_that_cannot_be_written(call: Any, models: dict[str, str], home: Path) -> None:
    (home / "a-file").touch()
    switches = {"ATB_LLM_BENCHMARK_ENABLE": "1", "ATB_LLM_BENCHMARK_FILEPATH": str(home / "a-file" / "times.csv")}
    for words in (
        ["run_pa.sh", models["demo"]],
        ["run.sh", str(home), "pa_fp16", "performance", "[[9,5]]", "1", "mixtral", models["demo"], "1"],
    ):
        ended = call(*words, **switches)
        assert ended.status == 2 and f"cannot write {home / 'a-file'}" in ended.err and not ended.out


def test_an_output_folder_that_cannot_be_written(call: Any, models: dict[str, str], home: Path) -> None:
    (home / "outputs").write_text("a file")
    ended = call("run.sh", str(home), "pa_fp16", "full_BoolQ", "1", "mixtral", models["demo"], "1")
    assert ended.status == 2 and "cannot write" in ended.err and "outputs" in ended.err
    (home / "outputs").unlink()
    (home / "benchmark.csv").mkdir()
    ended = call("run.sh", str(home), "pa_fp16", "performance", "[[9,5]]", "1", "mixtral", models["demo"], "1")
    assert ended.status == 2 and "benchmark.csv: it is a folder" in ended.err and not ended.out
    times = {"ATB_LLM_BENCHMARK_ENABLE": "1", "ATB_LLM_BENCHMARK_FILEPATH": str(home / "data/boolq/dev.jsonl/b.csv")}
    ended = call("run_pa.py", "--model_path", models["demo"], **times)
    assert ended.status == 2 and "cannot write" in ended.err and not ended.out  # before anything is asked


def test_broken_weights(call: Any, demo: Path, home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for words in (
        ["run_pa.sh", str(broken)],
        ["convert_quant_weights.py", "--model_path", str(broken), "--save_directory", str(tmp_path / "q")],
        ["run.sh", str(home), "pa_fp16", "full_BoolQ", "1", "mixtral", str(broken), "1"],
        ["run.sh", str(home), "pa_fp16", "performance", CASES, "1", "mixtral", str(broken), "1"],
    ):
        ended = call(*words)
        assert ended.status == 2 and "model.safetensors" in ended.err
    assert not (tmp_path / "q").exists() and not list((home / "outputs").rglob("*.csv"))


def test_a_case_that_fails_in_the_middle(call: Any, demo: Path, home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan"
    shutil.copytree(demo, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, broken / "model.safetensors")
    ended = call("run.sh", str(home), "pa_fp16", "performance", "[[9,5]]", "1", "mixtral", str(broken), "1")
    assert ended.status == 1 and not ended.out and "the warm-up failed, so no case ran" in ended.err
    ended = call("run.sh", str(home), "pa_fp16", "full_BoolQ", "4", "mixtral", str(broken), "1")
    assert ended.status == 1 and f"{ITEMS} of {ITEMS} items of BoolQ failed, so there are no results" in ended.err
    assert ended.err.count("not finite numbers") == NAMED_FAILURES
    assert call("run_pa.sh", str(broken)).status == 1
    assert not list((home / "outputs").rglob("*_result.csv"))


def test_the_quantizer_refuses(call: Any, models: dict[str, str], tmp_path: Path) -> None:
    for source, destination, message in (
        (models["demo"], models["demo"], "source and destination are the same folder"),
        (models["w8a8"], str(tmp_path / "q"), "is quantized to w8a8 already"),
        ("absent-folder", str(tmp_path / "q"), "absent-folder"),
    ):
        ended = call("convert_quant_weights.py", "--model_path", source, "--save_directory", destination)
        assert ended.status == 2 and message in ended.err


def test_a_question_that_is_too_long(call: Any, models: dict[str, str]) -> None:
    ended = call("run_pa.py", "--model_path", models["demo"], "--input_texts", "a b c", "--max_input_length", "2")
    assert ended.status == 2 and "above --max_input_length 2" in ended.err and not ended.out
    words = ["run_pa.py", "--model_path", models["demo"]]
    ended = call(*words, "--input_texts", "a", "a b c d e f g h", "--max_position_embeddings", "5")
    assert ended.status == 2 and re.search("question 1 has .* raise --max_position_embeddings", ended.err)
    ended = call(*words, "--max_position_embeddings", "9000")
    assert ended.status == 2 and "max_position_embeddings is 9000; the model has 8192 at most" in ended.err
    ended = call(*words, "--input_ids", "1,2", "1,99999")
    assert ended.status == 2 and "'question 1': prompt holds token id 99999" in ended.err and not ended.out


def test_run_sh_under_torchrun_and_without_words(call: Any, home: Path) -> None:
    assert shell("bash tests/modeltest/run.sh").status == 2
    ended = shell("bash tests/modeltest/run.sh --help")
    assert ended.status == 0 and "performance_maxbs" in ended.out
    ended = call("run.sh", str(home), "pa_fp16", "full_BoolQ", "1", "mixtral", "demo", "1", RANK="0", WORLD_SIZE="2")
    assert ended.status == 2 and "call it without torchrun" in ended.err

"""Prompts and scores of each data set, on small folders in the real formats; and the process that runs written code."""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eightfold import EightfoldError
from eightfold.checkpoint import resolve
from eightfold.eval import text_scores
from eightfold.eval.choices import CEval, Cmmlu, Mmlu
from eightfold.eval.cmmlu_subjects import CATEGORIES
from eightfold.eval.humaneval import HumanEval, completion
from eightfold.eval.longbench import LongBench, LongBenchE
from eightfold.eval.needlebench import NeedleBench
from eightfold.eval.numbers import Aime2024, Gsm8k, last_number
from eightfold.eval.results import interval, summarize, table, wilson
from eightfold.eval.sandbox import run_program
from eightfold.eval.task import Answer, Compare, Generate, Item, LoadOptions, Record, Task
from eightfold.eval.truthfulqa import PRIMER, TruthfulQA
from eightfold.tokenizer import Tokenizer

USERS_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside a checkout, where there is one
NO_SHOTS = LoadOptions(shots=0)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(text: str = "", logprobs: Sequence[float] = ()) -> Answer:
    return Answer([1], [5], text, tuple(logprobs))


def primary(task: Task, item: Item, *answers: Answer) -> float:
    return next(iter(task.score(item, answers).scores.values()))


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    write(tmp_path / "dev" / "high_school_art_dev.csv", 'Q1,a,b,c,d,A\n"Q2, with ""comma""",a,b,c,d,D\n')
    write(tmp_path / "test" / "high_school_art_test.csv", '"Two\nlines",w,x,y,z,C\nQ,w,x,y,z,B\n')
    write(tmp_path / "test" / "law_test.csv", "L,w,x,y,z,A\n")
    write(tmp_path / "dev" / "law_dev.csv", "M,w,x,y,z,A\nN,w,x,y,z,A\n")
    return tmp_path


def test_mmlu(mmlu: Path) -> None:
    task = Mmlu()
    items = task.load(mmlu, LoadOptions(shots=2))
    assert [(item.key, item.subject, item.golden) for item in items] == [
        ("high_school_art:2", "high_school_art", "C"),
        ("high_school_art:3", "high_school_art", "B"),
        ("law:1", "law", "A"),
    ]
    (query,) = task.queries(items[1])
    assert isinstance(query, Generate) and query.max_tokens == 20
    assert query.prompt == (
        "The following are multiple choice questions (with answers) about  high school art.\n\n"
        "Q1\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"
        'Q2, with "comma"\nA. a\nB. b\nC. c\nD. d\nAnswer: D\n\n'
        "Q\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert primary(task, items[1], said(" \nB. x")) == 1
    assert primary(task, items[1], said("A or B")) == primary(task, items[1], said("")) == 0
    (plain,) = task.queries(task.load(mmlu, NO_SHOTS)[1])
    assert plain.prompt == "Q\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    write(mmlu / "subject_mapping.json", json.dumps({"mmlu_all_sets": ["law"]}))
    assert {item.subject for item in task.load(mmlu, NO_SHOTS)} == {"law"}


@pytest.mark.parametrize(
    ("options", "file", "text", "message"),
    [
        (LoadOptions(shots=3), None, "", "--shots 3: .*high_school_art_dev.csv has only 2 examples"),
        (NO_SHOTS, "test/law_test.csv", "L,w,x,y,z,A\nL,w,x,y,A\n", "law_test.csv:2 has 5 cells; 6 are needed"),
        (NO_SHOTS, "test/law_test.csv", "L,w,x,y,z,E\n", "law_test.csv:1: the answer is 'E'"),
        (NO_SHOTS, "test/law_test.csv", 'L,"w,x,y,z,A\n', "law_test.csv:1 is not valid CSV"),
        (NO_SHOTS, "subject_mapping.json", '{"mmlu_all_sets": {"art": 1}}', "art_test.csv is missing"),
        (NO_SHOTS, "subject_mapping.json", '{"mmlu_all_sets": 3}', "holds no subjects"),
        (LoadOptions(subjects=("lav",)), None, "", "no subject 'lav'; there are high_school_art, law"),
    ],
)
def test_mmlu_data_that_will_not_do(
    mmlu: Path, options: LoadOptions, file: str | None, text: str, message: str
) -> None:
    if file:
        write(mmlu / file, text)
    with pytest.raises(EightfoldError, match=message):
        Mmlu().load(mmlu, options)


def test_ceval(tmp_path: Path) -> None:
    header = "id,question,A,B,C,D,answer,explanation\n"
    write(tmp_path / "dev" / "computer_network_dev.csv", f"{header}0,问,1,2,3,4,B,因为\n")
    write(tmp_path / "val" / "computer_network_val.csv", header.replace(",explanation", "") + "0,题,5,6,7,8,D\n")
    write(
        tmp_path / "subject_mapping.json", json.dumps({"computer_network": ["Computer Network", "计算机网络", "STEM"]})
    )
    task = CEval()
    (item,) = task.load(tmp_path, LoadOptions(shots=1))
    assert task.queries(item)[0].prompt == (
        "The following are multiple choice questions (with answers) about  computer network.\n\n"
        "问\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n题\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer:"
    )
    assert item.golden == "D" and task.categories("computer_network") == ("STEM",)
    write(tmp_path / "val" / "computer_network_val.csv", "id,question,A,B,C,D\n0,题,5,6,7,8\n")
    with pytest.raises(EightfoldError, match=r"_val.csv:1 has no column 'answer'"):
        task.load(tmp_path, NO_SHOTS)


def test_cmmlu(tmp_path: Path) -> None:
    header = ",Question,A,B,C,D,Answer\n"
    write(tmp_path / "test" / "anatomy.csv", f"{header}0,题,甲,乙,丙,丁,C\n")
    write(tmp_path / "dev" / "anatomy.csv", f"{header}0,问,甲,乙,丙,丁,A\n")
    task = Cmmlu()
    (item,) = task.load(tmp_path, LoadOptions(shots=1))
    (query,) = task.queries(item)
    assert isinstance(query, Compare) and query.choices == ("A", "B", "C", "D")
    assert query.prompt == (
        "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
        "题目：问\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案是：A\n\n题目：题\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案是："
    )
    assert task.score(item, [said(logprobs=(-3, -2, -1, -4))]).result == "C"
    assert task.categories("anatomy") == ("STEM",)
    assert len(CATEGORIES) == 67 and all(CATEGORIES.values())
    assert task.categories("ethnology") == ("Social Science", "China specific")
    write(tmp_path / "test" / "magic.csv", header)
    with pytest.raises(EightfoldError, match=r"magic.csv is not one of CMMLU's 67 subjects"):
        task.load(tmp_path, NO_SHOTS)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 9 * 2 = $18 every day.\n#### 18", 18),
        ("1,234,567 people", 1234567),
        ("about 1,23", 23),
        ("the answer is -3.50.", -3.5),
        ("7-3", 3),
        ("from 5 - 3", 3),
        ("x = .5", 0.5),
        ("none", None),
        ("", None),
        ("so 3 apples, 4 pears", 4),
    ],
)
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_number_tasks(tmp_path: Path) -> None:
    write(tmp_path / "GSM8K.jsonl", lines({"question": "How many?", "answer": "<<1+1=2>>\n#### 2,000"}))
    task = Gsm8k()
    (item,) = task.load(tmp_path, LoadOptions())
    (query,) = task.queries(item)
    assert isinstance(query, Generate) and (query.prompt, query.max_tokens) == ("How many?", 512)
    assert primary(task, item, said("So it is 2000.00005 apples")) == 1
    assert primary(task, item, said("2000 of 2001")) == primary(task, item, said("")) == 0
    assert item.golden == "2000"
    write(tmp_path / "GSM8K.jsonl", lines({"question": "How many?", "answer": "#### 12345678.5"}))
    (item,) = task.load(tmp_path, LoadOptions())
    assert item.golden == "12345678.5" and primary(task, item, said("$12,345,678.5")) == 1
    write(tmp_path / "GSM8K.jsonl", lines({"question": "How many?", "answer": "two"}))
    with pytest.raises(EightfoldError, match=r"GSM8K.jsonl:1: the answer 'two' holds no number"):
        task.load(tmp_path, LoadOptions())
    write(tmp_path / "a" / "aime.jsonl", lines({"problem": "P", "answer": 204}))
    (item,) = Aime2024().load(tmp_path / "a", LoadOptions())
    assert primary(Aime2024(), item, said(r"\boxed{204}")) == 1


def test_humaneval(tmp_path: Path) -> None:
    row = {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x: int) -> int:\n    """Twice."""\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
    write(tmp_path / "human-eval.jsonl", lines(row))
    task = HumanEval()
    with pytest.raises(EightfoldError, match="--allow-code-execution"):
        task.load(tmp_path, LoadOptions())
    write(tmp_path / "second.jsonl", lines(row))  # the same problem again, as in another version of the data set
    item, second = task.load(tmp_path, LoadOptions(allow_code_execution=True))
    assert (item.key, second.key) == ("human-eval.jsonl:HumanEval/0", "second.jsonl:HumanEval/0")
    assert task.queries(item)[0].prompt == row["prompt"].strip()
    right = "\n    y = x\n\n    return y + x\n\ndef other():\n    raise SystemExit\nother()"
    assert completion(right) == "\n    y = x\n\n    return y + x\n"
    assert task.score(item, [said(right)]).scores == {"pass@1": 1.0}
    wrong = task.score(item, [said("\n    return x")])
    assert wrong.scores == {"pass@1": 0.0} and wrong.result == "failed: AssertionError"
    assert completion("no code") == ""


@pytest.mark.skipif(not (USERS_DATA / "humaneval").is_dir(), reason="the data sets are not beside this checkout")
def test_the_data_sets_own_solutions_pass() -> None:
    task = HumanEval()
    items = task.load(USERS_DATA / "humaneval", LoadOptions(allow_code_execution=True))
    assert len(items) == 164
    for item in items[::8]:
        solution = said("\n" + item.data["canonical_solution"] + "\n\nprint('what a model may add')\n")
        assert task.score(item, [solution]).result == "passed", item.key
        assert task.score(item, [said("\n    return None")]).scores == {"pass@1": 0}, item.key


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("x = 1", "passed"),
        ("print('noise'); import sys; sys.stderr.write('x' * 100000)", "passed"),
        ("while True: pass", "timed out"),
        ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "timed out"),
        ("import sys; sys.exit(0)", "failed: SystemExit: 0"),
        ("import os; os._exit(0)", "failed: it ended the process"),
        ("import os\nwhile True: os.fork()", "failed: PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "failed: PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "failed: PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 1))", "failed: PermissionError"),
        ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "failed: AssertionError"),
        ("import threading as t; x = t.Thread(target=print); x.start(); x.join()", "passed"),
        ("import time\nwhile True:\n  try:\n    time.sleep(9)\n  except BaseException: pass", "timed out"),
        ("for i in range(99): open(str(i), 'w').write('x' * (1 << 24))", "failed: its files have more than 67108864"),
        ("x = 'a' * (8 << 30)", "failed: MemoryError"),
        ("open('f', 'w').write('x' * (1 << 25))", "failed: OSError: [Errno 27] File too large"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("def f(:", "failed: SyntaxError"),
        ("import os; assert os.listdir('.') == [] and 'PYTHONPATH' not in os.environ", "passed"),
    ],
)
def test_written_code_is_kept_within_limits(program: str, outcome: str) -> None:
    start = time.monotonic()
    assert run_program(program, 0.5).startswith(outcome)
    assert time.monotonic() - start < 8


@pytest.mark.skipif(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 1, reason="no Landlock here")
def test_written_code_changes_no_files_elsewhere(tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", "1")
    for line in ("open({!r}, 'w')", "open({!r} + '2', 'w')", "os.remove({!r})", "os.truncate({!r}, 0)"):
        assert run_program("import os; " + line.format(str(theirs)), 1.0).startswith("failed: PermissionError")
    own = "open('a', 'w').write('x'); os.mkdir('d'); os.rename('a', 'd/a'); os.remove('d/a'); open(os.devnull, 'w')"
    assert run_program(f"import os; {own}", 1.0) == "passed"
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"] and theirs.stat().st_size


def test_truthfulqa(tmp_path: Path) -> None:
    header = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    row = "Adversarial,Myths,Do pigs fly?,No,No; Pigs can't fly.,Yes; They do; At night,x\n"
    write(tmp_path / "TruthfulQA.csv", f"{header}{row}A,Myths,Left out,No,No,,x\n")
    task = TruthfulQA()
    (item,) = task.load(tmp_path, LoadOptions())
    queries = task.queries(item)
    assert {query.prompt for query in queries} == {f"{PRIMER}\n\nQ: Do pigs fly?\nA:"} and PRIMER.count("Q: ") == 6
    assert [query.continuation for query in queries] == [" No.", " Pigs can't fly.", " Yes.", " They do.", " At night."]
    scores = task.score(item, [said(logprobs=[math.log(p) / 2] * 2) for p in (0.2, 0.4, 0.3, 0.05, 0.05)]).scores
    assert scores == {"mc1": 0.0, "mc2": pytest.approx(0.6), "mc3": 0.5}
    far = task.score(item, [said(logprobs=[-2000.0 - n]) for n in range(5)])
    assert far.scores["mc1"] == 1 and far.scores["mc2"] == pytest.approx(
        (1 + math.exp(-1)) / sum(math.exp(-n) for n in range(5))
    )
    write(tmp_path / "TruthfulQA.csv", f"{header}A,Myths,Q,Maybe,No,Yes,x\n")
    with pytest.raises(EightfoldError, match=r"TruthfulQA.csv:2: the best answer 'Maybe.' is not among"):
        task.load(tmp_path, LoadOptions())


@pytest.mark.parametrize(
    ("measure", "said", "reference", "classes", "score"),
    [
        ("f1", "The cat, sat!", "a cat sat down", (), 0.8),
        ("f1", "", "x", (), 0),
        ("rouge_l", "the cat sat on the mat", "the cat lay on the mat", (), 0.8),
        ("rouge_l", "one two. three", "three. one two", (), 1),
        ("rouge_l", "", "x", (), 0),
        ("rouge_l", "a b. ", "a b.", (), 0.8),  # the package counts the space after a full stop as a word
        ("rouge_l", "a. . b", "a b", (), 0.8),
        ("class_match", "a Number or Date", "Number", ("Number", "Date", "Num"), 0.5),
        ("class_match", "City", "Number", ("Number", "City"), 0),
        ("passage_match", "Paragraph 3 or 4", "Paragraph 3", (), 0.5),
        ("passage_match_chinese", "段落7", "段落7", (), 1),
        ("count_match", "12, no 13", "13", (), 0.5),
        ("code_similarity", "\n# why\nreturn x\nmore", "return x", (), 1),
        ("code_similarity", "return y", "return x", (), 0.88),
        ("code_similarity", "", "", (), 0),
    ],
)
def test_measures(measure: str, said: str, reference: str, classes: tuple[str, ...], score: float) -> None:
    assert getattr(text_scores, measure)(said, reference, classes) == pytest.approx(score, abs=1e-6)


def test_levenshtein() -> None:
    assert text_scores.levenshtein("kitten", "sitting") == 3 and text_scores.levenshtein("", "abc") == 3


def test_longbench(tmp_path: Path) -> None:
    row = {
        "input": "Who {context}?",
        "context": "{input}",
        "answers": ["Ann", "Bo"],
        "length": 5000,
        "all_classes": None,
    }
    write(tmp_path / "hotpotqa.jsonl", lines(row))
    with pytest.raises(EightfoldError, match=r"dataset2prompt.json is missing: it holds LongBench's prompts"):
        LongBench().load(tmp_path, LoadOptions())
    write(
        tmp_path / "config" / "dataset2prompt.json", json.dumps({"hotpotqa": "{context}\nQ: {input}\nA:", "samsum": ""})
    )
    write(tmp_path / "dataset2maxlen.json", json.dumps({"hotpotqa": 32, "samsum": 9}))
    task = LongBench()
    (item,) = task.load(tmp_path, LoadOptions())
    assert task.queries(item) == (Generate("{input}\nQ: Who {context}?\nA:", 32),)
    assert primary(task, item, said("It was Bo")) == 0.5
    write(tmp_path / "samsum.jsonl", lines({**row, "answers": ["they meet"]}))
    item = task.load(tmp_path, LoadOptions(subjects=("samsum",)))[0]
    assert task.queries(item)[0] == Generate("", 9, ("\n",))
    assert primary(task, item, said("\nthey meet\nnever")) == pytest.approx(1)
    write(tmp_path / "e" / "hotpotqa_e.jsonl", lines(row))
    write(tmp_path / "e" / "dataset2prompt.json", json.dumps({"hotpotqa": "{input}"}))
    write(tmp_path / "e" / "dataset2maxlen.json", json.dumps({"hotpotqa": 32}))
    assert LongBenchE().load(tmp_path / "e", LoadOptions())[0].subject == "hotpotqa 4-8k"
    write(tmp_path / "unheard.jsonl", lines(row))
    with pytest.raises(EightfoldError, match="unheard is not one of LongBench's sets"):
        task.load(tmp_path, LoadOptions())


def test_needlebench(tmp_path: Path) -> None:
    texts = [{"text": f"Essay {n}. " + "Wendy knows Lima. " * 400} for n in range(4)]
    write(tmp_path / "PaulGrahamEssays.jsonl", lines(*texts))
    needle = {"needle": "The hidden word is plum.", "retrieval_question": "What is the word?", "arg2": "plum"}
    write(tmp_path / "needles.jsonl", lines({**needle, "language": "English"}))
    tokenizer = Tokenizer.load(resolve("demo"))
    task = NeedleBench()
    items = task.load(tmp_path, LoadOptions(context=5000, tokenizer=tokenizer))
    assert len(items) == 10 * 11 and {item.subject for item in items} == {"PaulGrahamEssays-4k"}
    for item in (items[0], items[5], items[10], items[60]):
        prompt = task.queries(item)[0].prompt
        before, after = prompt.split(f"\n{needle['needle']}\n")
        share = len(tokenizer.encode(before)) / len(tokenizer.encode(before + after))
        assert share == pytest.approx(item.data["depth"] / 100, abs=0.03)
        assert 4000 <= len(tokenizer.encode(prompt)) <= 4200 and after.endswith("Question: What is the word?\nAnswer:")
    assert primary(task, items[0], said("It is plum, I think")) == 1
    assert 0.1 < primary(task, items[0], said("The hidden word is pear.")) < 0.2
    with pytest.raises(EightfoldError, match="needs a context of at least"):
        task.load(tmp_path, LoadOptions(context=4000, tokenizer=tokenizer))
    write(tmp_path / "needles.jsonl", lines({**needle, "language": "Chinese"}))
    with pytest.raises(EightfoldError, match="no line of language English"):
        task.load(tmp_path, LoadOptions(context=5000, tokenizer=tokenizer))


def test_intervals() -> None:
    assert wilson(0, 10) == (0, pytest.approx(0.2775, abs=1e-4))  # the textbook's example
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))  # Newcombe 1998
    assert wilson(0, 0) == (0, 1)
    low, high = interval([0.2, 0.4, 0.6])
    assert (low + high) / 2 == pytest.approx(0.4) and high - low == pytest.approx(2 * 1.96 * 0.2 / 3**0.5, abs=1e-3)


def test_totals_are_over_items_or_over_subjects() -> None:
    def record(subject: str, number: int, score: float) -> Record:
        return Record(f"{subject}{number}", subject, "", [], [], "", "", score == 1, {"accuracy": score})

    records = [record("anatomy", n, 1.0) for n in range(3)] + [record("arts", 0, 0.0)]
    micro, *_ = summarize(Mmlu(), records)
    assert (micro.name, micro.scores["accuracy"], micro.correct, micro.items) == ("total", 0.75, 3, 4)
    total, *others = summarize(Cmmlu(), records)
    assert total.scores["accuracy"] == 0.5 and total.items == 4
    assert [row.name for row in others] == ["STEM", "Humanities", "anatomy", "arts"]
    text = table(Cmmlu(), [total, *others])
    # Of a mean over one subject the interval is the subject's own; over two, errors add up as squares on either side.
    assert (others[0].low, others[0].high) == pytest.approx(wilson(3, 3)) == (others[2].low, others[2].high)
    (low, _), (_, high) = wilson(3, 3), wilson(0, 1)
    assert (total.low, total.high) == pytest.approx((0.5 - (1 - low) / 2, 0.5 + high / 2))
    assert "total           4   50.00 %" in text and "anatomy         3  100.00 %" in text

"""lm-eval on our engine against its own `hf` model, on the demo's weights in float32 and data that the test writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'eightfold[lm-eval]'")

pytest.importorskip("accelerate", reason="lm-eval's own hf model, the oracle, needs accelerate")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eightfold import LLM, EightfoldError
from eightfold.cli import main
from eightfold.eval.lm_harness import EightfoldLM, generation_params

PASSAGE = '"{{title}} -- {{passage}}\\nQuestion: {{question}}?\\nAnswer:"'
TASKS = {
    "reading": f"""
output_type: multiple_choice
doc_to_text: {PASSAGE}
doc_to_choice: ["no", "yes", "yes, it is so"]
doc_to_target: "{{{{answer | int}}}}"
num_fewshot: 1
fewshot_split: test
fewshot_config: {{sampler: first_n}}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "facts": """
output_type: generate_until
doc_to_text: "{{ask}}"
doc_to_target: "{{ 'yes' if answer else 'no' }}"
generation_kwargs: {until: [" is", "zzz"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "stories": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
}
CITIES = ("France", "Italy", "Spain", "Japan", "Egypt")


@pytest.fixture(scope="module")
def folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their data."""
    path = tmp_path_factory.mktemp("tasks")
    items = [json.loads(line) for line in (demo_folder / "heldout.jsonl").read_text().splitlines()[:24]]
    for number, item in enumerate(items):
        item["ask"] = f"Question: What is the capital of {CITIES[number % 5]}?\nAnswer:"
    (path / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}/data.jsonl}}}}\ntest_split: test"
        (path / f"{name}.yaml").write_text(f"task: our_{name}\n{data}{text}")
    return path


@pytest.fixture(scope="module")
def demo_folder() -> Path:
    import eightfold

    return Path(eightfold.__file__).parent / "assets" / "demo"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def results(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"our_{name}" for name in TASKS]
    found = simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True, "system_instruction": "Be brief."}])
def test_results_are_those_of_lm_evals_own_model(demo_folder: Path, folder: Path, options: dict[str, Any]) -> None:
    llm = LLM("demo", dtype="float32", max_model_len=400)
    theirs = results(HFLM(str(demo_folder), dtype="float32", device="cpu", max_length=399), folder, **options)
    ours = results(EightfoldLM(llm.engine), folder, **options)
    for task in ours["results"]:
        for name, value in ours["results"][task].items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs["results"][task][name], rel=1e-4), (task, name)
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(a, tuple):
                    assert a[0] == pytest.approx(b[0], abs=2e-4) and a[1] == b[1]
                else:
                    assert a == (pytest.approx(b, rel=1e-5) if isinstance(a, float) else b)
    answers = {sample["filtered_resps"][0] for sample in ours["samples"]["our_facts"]}
    assert len(answers) > 1 and not any(" is" in answer for answer in answers)


def test_a_long_context_loses_its_beginning(demo_folder: Path) -> None:
    """As in lm-eval's own model: contexts that are too long, and texts of several windows."""
    llm = LLM("demo", dtype="float32", max_model_len=64)
    own, hf = EightfoldLM(llm.engine), HFLM(str(demo_folder), dtype="float32", device="cpu", max_length=63)
    long = "Ivan avoids London. " * 40
    pairs = [(long, " yes it is"), ("", "Ivan knows Paris."), (long, long[:60])]
    requests = [((a, b), own.tok_encode(a) or [own.prefix_token_id], own.tok_encode(b, False)) for a, b in pairs]
    for a, b in zip(own._loglikelihood_tokens(requests), hf._loglikelihood_tokens(requests), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    texts = [Arguments((long,)), Arguments(("The pool is closed.",))]
    for a, b in zip(own.loglikelihood_rolling(texts), hf.loglikelihood_rolling(texts), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    asked = [Arguments((long, {"until": ["\n"], "max_gen_toks": 8}))]
    assert own.generate_until(asked) == hf.generate_until(asked)


class Arguments:
    """What lm-eval's models read of an Instance."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "demo", "--lm-eval", "our_read*", "--data", str(folder), "--dtype", "float32", "--shots", "0"]
    command += ["--output", str(tmp_path), "--limit", "9"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "our_reading" in table
    content = json.loads((tmp_path / "lm_eval_results.json").read_text())
    assert content["results"]["our_reading"]["acc,none"] == 1
    assert content["settings"]["dtype"] == "float32"
    assert main(command) == 0  # from what was kept
    assert capsys.readouterr().out == table
    assert main(["eval", "demo", "--lm-eval", "our_readign", "--data", str(folder)]) == 2
    assert "did you mean our_reading?" in capsys.readouterr().err


def test_generation_options() -> None:
    greedy = generation_params({"until": "x", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7, "top_p": 0.5})
    assert (greedy.temperature, greedy.max_tokens, greedy.stop, greedy.top_p) == (0, 5, ["x"], 1)
    drawn = generation_params({"temperature": 0.7, "top_p": 0.5, "max_new_tokens": 9})
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens) == (0.7, 0.5, 9)
    with pytest.raises(EightfoldError, match="num_beams"):
        generation_params({"num_beams": 4})

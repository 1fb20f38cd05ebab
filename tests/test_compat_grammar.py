"""The words of MindIE-LLM's commands: what each line means, and what is said to those that mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eightfold.compat import convert
from eightfold.compat.dialogue_grammar import Dialogue, parse_python, parse_script
from eightfold.compat.environment import Environment, read_environment
from eightfold.compat.layout import Layout
from eightfold.compat.modeltest import unused_switches
from eightfold.compat.modeltest_grammar import ModelTest, parse
from eightfold.types import EightfoldError

CASES = "[[2048,2048],[1024,1024],[512,512],[256,256]]"


def script(*words: str, devices: int | None = None, torchrun: int | None = None) -> Dialogue:
    return parse_script(words, Environment(devices=devices, torchrun_ranks=torchrun))


def python(*words: str, torchrun: int | None = None) -> Dialogue:
    return parse_python(["--model_path", "W", *words], Environment(torchrun_ranks=torchrun))


@pytest.mark.parametrize("flag", ["-trust_remote_code", "--trust_remote_code", "--trust-remote-code"])
@pytest.mark.parametrize("first", [True, False])
def test_the_trust_flag_may_stand_anywhere(flag: str, first: bool) -> None:
    words = [flag, "W", "1", "8"] if first else ["W", "1", "8", flag]
    dialogue = script(*words, devices=8)
    assert dialogue.model == "W" and dialogue.layout == Layout(8) and "no code" in dialogue.notes[0]
    source, destination, trusts = convert.parse(
        [flag, "--model_path", "A", "--save_directory", "B"] if first else ["--model_path=A", "-save_directory=B", flag]
    )
    assert (source, destination, trusts) == ("A", "B", True)
    word = flag.lstrip("-")
    words = ["pa_fp16", "full_BoolQ", "1", "mixtral", *((word, "W") if first else ("W", word)), "8"]
    assert parse(words).weights == "W" and parse(words).layout.world == 8


def test_the_script_asks_what_the_seed_asks() -> None:
    dialogue = script("W")
    assert dialogue.texts == ("Who is the CEO of Google?",)
    assert (dialogue.output_length, dialogue.input_length, dialogue.batch, dialogue.block_size) == (10, 1024, 1, 128)
    assert dialogue.layout == Layout(1) and not dialogue.chat and not dialogue.notes
    assert script("W", "--is_chat_model").chat


@pytest.mark.parametrize(
    ("words", "devices", "layout"),
    [
        ("W", 8, Layout(8)),
        ("W 1 10", 10, Layout(10)),
        ("W -1 20", None, Layout(20)),
        ("W 1 8 4 2", 8, Layout(8, 4, 2)),
        ("W -1 -1 -1 8", 8, Layout(8, None, 8)),
        ("W --moe_ep 2 --moe_tp 4", 8, Layout(8, 4, 2)),
        ("--model_path W --tp 2", None, Layout(2)),
    ],
)
def test_ranks_of_the_script(words: str, devices: int | None, layout: Layout) -> None:
    assert script(*words.split(), devices=devices).layout == layout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "needs the folder of the weights"),
        ("W 1 4", "tp is 4, but there are 8 ranks (ASCEND_RT_VISIBLE_DEVICES)"),
        ("W 2", "dp is 2, and only 1 (or -1) is possible"),
        ("W 1 8 4 4", "moe_tp 4 times moe_ep 4 is 16, not the 8 ranks"),
        ("W 1 8 3", "moe_tp is 3, which does not divide the 8 ranks"),
        ("W 1 8 1 8 9", "'9' is one word too many"),
        ("W eight", "dp is 'eight'; it must be a whole number"),
        ("W 1 8 --tp 8", "tp is given twice"),
        ("W 1 0", "tp is 0; it must be at least 1"),
        ("W --is_chat_modle", "did you mean --is_chat_model?"),
        ("W --zzz", "--help lists the options"),
    ],
)
def test_refusals_of_the_script(words: str, message: str) -> None:
    with pytest.raises(EightfoldError) as caught:
        script(*words.split(), devices=8)
    assert message in str(caught.value)


def test_inputs_in_their_order(tmp_path: Path) -> None:
    assert python().texts == ("What's deep learning?",) and python().output_length == 20
    assert python("--input_texts", "a", "b c").texts == ("a", "b c")
    file = tmp_path / "questions.txt"
    file.write_text("one\n\ntwo\r\n")
    assert python("--input_texts", str(file)).texts == ("one", "two")
    assert python("--input_ids", "1,2,3", "4,5").ids == ((1, 2, 3), (4, 5))
    prompts = json.dumps([{"prompt": "p", "adapter": "base"}, {"prompt": "q"}])
    both = python("--input_dict", prompts, "--input_ids", "1")
    assert both.texts == ("p", "q") and both.ids == () and "--input_ids has no effect" in both.notes[0]
    assert python("--input_ids", "1", "--input_texts", "a").notes == ("--input_texts has no effect beside --input_ids",)
    talks = tmp_path / "talks.jsonl"
    talks.write_text('[{"role": "user", "content": "hi"}]\n')
    talk = python("--input_file", str(talks), "--is_chat_model", "--input_texts", "a", "--input_ids", "1")
    assert talk.conversations == ([{"role": "user", "content": "hi"}],)
    assert [note.split()[0] for note in talk.notes] == ["--input_ids", "--input_texts"]
    assert script("W", "--input_texts", "a").texts == ("a",)


def test_limits_and_mode_of_the_script() -> None:
    dialogue = python(
        *"--max_batch_size 4 --max_input_length 9 --max_output_length 7 --max_position_embeddings 64".split(),
        *"--max_prefill_batch_size 2 --block_size 16 --ignore_eos --is_chat_model --chat_template T".split(),
    )
    assert (dialogue.batch, dialogue.input_length, dialogue.output_length, dialogue.context) == (4, 9, 7, 64)
    assert dialogue.prefill_tokens == 2 * (9 + 7)  # as the reference counts
    assert (dialogue.block_size, dialogue.ignore_eos, dialogue.chat, dialogue.chat_template) == (16, True, True, "T")
    both = python("--max_prefill_tokens", "100", "--max_prefill_batch_size", "2")
    assert both.prefill_tokens == 100 and "--max_prefill_batch_size has no effect" in both.notes[0]
    assert python("--max_prefill_tokens", "-1").prefill_tokens is None
    assert not python("--load_tokenizer", "false", "--input_ids", "1").load_tokenizer
    assert python("--kw_args", "{}").notes == () and "graph engines" in python("--enable_atb_torch").notes[0]
    assert python(torchrun=2).layout == python("--tp", "2", torchrun=2).layout == Layout(2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--is_embedding_model"], "--is_embedding_model is refused"),
        (["--distributed_enable"], "--distributed_enable is refused"),
        (["--lora_modules", "{}"], "there is no LoRA here"),
        (["--max_loras", "1"], "there is no LoRA here"),
        (["--max_lora_rank", "8"], "there is no LoRA here"),
        (["--kw_args", '{"a": 1}'], "--kw_args"),
        (["--pp", "2"], "pp is 2, and only 1"),
        (["--sp", "2"], "sp is 2, and only 1"),
        (["--cp", "2"], "cp is 2, and only 1"),
        (["--dp", "2"], "dp is 2, and only 1"),
        (["--microbatch_size", "2"], "microbatch_size is 2, and only 1"),
        (["--max_batch_size", "0"], "--max_batch_size is 0"),
        (["--max_batch_size", "x"], "invalid int value: 'x'"),
        (["--max_prefill_tokens", "0"], "--max_prefill_tokens is 0"),
        (["--input_texts", ""], "empty text"),
        (["--input_ids", "1,a"], "'1,a' is not a list of token ids"),
        (["--input_ids", "1", "--is_chat_model"], "take --is_chat_model away"),
        (["--input_dict", "{"], "--input_dict is not valid JSON"),
        (["--input_dict", "{}"], "--input_dict must be a list"),
        (["--input_dict", '[{"prompt": 1}]'], "entry 1 needs a prompt"),
        (["--input_dict", '[{"prompt": "a", "adapter": "b"}]'], "asks for adapter 'b'"),
        (["--input_dict", '[{"prompt": "a", "lora": "b"}]'], "has the key 'lora'"),
        (["--input_file", "absent.jsonl"], "add --is_chat_model"),
        (["--input_file", "absent.jsonl", "--is_chat_model"], "cannot read absent.jsonl"),
        (["--chat_template", "T"], "add --is_chat_model"),
        (["--load_tokenizer", "maybe"], "neither true nor false"),
        (["--load_tokenizer", "False"], "give --input_ids"),
        (["stray"], "'stray' is one word too many for run_pa.py"),
        (["--max_output_lenght", "3"], "did you mean --max_output_length?"),
    ],
)
def test_refusals_of_run_pa(words: list[str], message: str) -> None:
    with pytest.raises(EightfoldError) as caught:
        python(*words)
    assert message in str(caught.value)


def test_a_conversation_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text('[{"role": "user", "content": "a"}]\n[{"role": "user"}]\n')
    with pytest.raises(EightfoldError, match=r"talks.jsonl:2 must be a list of messages"):
        python("--input_file", str(file), "--is_chat_model")


def test_ranks_that_torchrun_did_not_start() -> None:
    with pytest.raises(EightfoldError, match=r"tp is 4, but there are 2 ranks \(torchrun's WORLD_SIZE\)"):
        python("--tp", "4", torchrun=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save_directory", "B"], "--model_path is missing"),
        (["--model_path", "A"], "--save_directory is missing"),
        (["--model_path", "A", "--save_dir", "B"], "did you mean --save_directory?"),
        (["--model_path", "A", "--save_directory", "B", "more"], "'more' is not known"),
    ],
)
def test_refusals_of_the_quantizer(words: list[str], message: str) -> None:
    with pytest.raises(EightfoldError) as caught:
        convert.parse(words)
    assert message in str(caught.value)


def meaning(test: ModelTest) -> dict[str, Any]:
    """What differs from a test of nothing."""
    plain = ModelTest("fp16", "", "W", Layout(8))
    return {
        name: getattr(test, name) for name in test.__dataclass_fields__ if getattr(test, name) != getattr(plain, name)
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pa_fp16 full_BoolQ 1 mixtral W 8", {"test": "full", "dataset": "BoolQ", "batches": ((1,),)}),
        ("pa_fp16 full_boolq [1,4] mixtral W 8", {"test": "full", "dataset": "BoolQ", "batches": ((1, 4),)}),
        ("pa_fp16 full_MMLU 5 4 mixtral W 8", {"test": "full", "dataset": "MMLU", "shots": 5, "batches": ((4,),)}),
        ("pa_fp16 full_CEval 0 1 mixtral W 8", {"test": "full", "dataset": "CEval", "shots": 0, "batches": ((1,),)}),
        (
            "pa_bf16 full_GSM8K 16 mixtral chat W 8",
            {"data_type": "bf16", "test": "full", "dataset": "GSM8K", "batches": ((16,),), "chat": True},
        ),
        (
            "pa_fp16 full_NeedleBench 4k 1 mixtral W 8",
            {"test": "full", "dataset": "NeedleBench", "needle_length": "4k", "batches": ((1,),)},
        ),
        (
            "pa_fp16 full_NeedleBench [1,4] mixtral W 8",
            {"test": "full", "dataset": "NeedleBench", "batches": ((1, 4),)},
        ),
        (
            f"pa_fp16 performance {CASES} 1 mixtral W 8",
            {
                "test": "performance",
                "cases": ((2048, 2048), (1024, 1024), (512, 512), (256, 256)),
                "batches": ((1,), (1,), (1,), (1,)),
            },
        ),
        (
            "pa_fp16 performance [[256,256],[512,512]] [[1,4],[1,8]] mixtral base W 8 8192",
            {
                "test": "performance",
                "cases": ((256, 256), (512, 512)),
                "batches": ((1, 4), (1, 8)),
                "context": 8192,
            },
        ),
        (
            "pa_fp16 performance [[9,8]] 2 3 prefill_length 7 dataset boolq padding INF mixtral W 8 [1,8,4,2,-1,-1]",
            {
                "test": "performance",
                "cases": ((9, 8),),
                "batches": ((2,),),
                "prefill_batch": 3,
                "prefill_length": 7,
                "prompts_of": "boolq",
                "padding": True,
                "groups": None,
                "layout": Layout(8, 4, 2),
            },
        ),
        (
            "pa_fp16 performance [[9,8]] 2 dataset gsm8k 3 mixtral W 10",
            {
                "test": "performance",
                "cases": ((9, 8),),
                "batches": ((2,),),
                "prompts_of": "gsm8k",
                "groups": 3,
                "layout": Layout(10),
            },
        ),
        (
            "pa_fp16 performance_maxbs [[256,256],[512,512]] [[600,700],[300,400]] 50 mixtral W 8",
            {
                "test": "performance_maxbs",
                "cases": ((256, 256), (512, 512)),
                "ranges": ((600, 700), (300, 400)),
                "time_limit": 50.0,
            },
        ),
        (
            'pa_fp16 performance_single [[256,256]] ["hello","hi"] 2 mixtral W 8 [1,8,1,-1,8,1,-1,1]',
            {
                "test": "performance_single",
                "cases": ((256, 256),),
                "texts": ("hello", "hi"),
                "batches": ((2,),),
                "layout": Layout(8, None, 8),
            },
        ),
    ],
)
def test_lines_of_run_sh(line: str, expected: dict[str, Any]) -> None:
    assert meaning(parse(line.split())) == expected


def test_several_machines(tmp_path: Path) -> None:
    table = tmp_path / "rank_table.json"
    table.write_text("{}")
    line = f"pa_fp16 full_BoolQ 1 mixtral W {table} 20 2 10 10.0.0.1"  # numbers with a 0 are numbers here
    test = parse(line.split())
    assert test.layout == Layout(20, nodes=2, node_rank=1, master_addr="10.0.0.1")
    assert "no effect on this backend" in test.notes[0]
    for change, message in (
        ("21 2 0 h", "world_size 21 must be a multiple of node_num 2"),
        ("20 2 5 h", "rank_id_start is 5; with 10 ranks on each of 2 machines it must be one of 0, 10"),
        ("20 2", "the command ends where rank_id_start should stand"),
    ):
        with pytest.raises(EightfoldError) as caught:
            parse(f"pa_fp16 full_BoolQ 1 mixtral W {table} {change}".split())
        assert message in str(caught.value)


def test_notes_say_what_has_no_effect() -> None:
    assert "those of pa_fp16" in parse("fa full_BoolQ 1 mixtral W 1".split()).notes[0]
    assert "random token ids" in parse("pa_fp16 performance [[9,9]] 1 mixtral chat W 1".split()).notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pa_fp32 full_BoolQ 1 mixtral W 8", "did you mean pa_fp16?"),
        ("pa_fp16", "the command ends where the test"),
        ("pa_fp16 full_BoolQA 1 mixtral W 8", "there is no test 'full_BoolQA'; did you mean full_BoolQ?"),
        ("pa_fp16 perfomance [[1,2]] 1 mixtral W 8", "did you mean performance?"),
        ("pa_fp16 zzz 1 mixtral W 8", "there are performance, performance_maxbs"),
        ("pa_fp16 full_GPQA 1 mixtral W 8", "full_GPQA is refused"),
        ("pa_fp16 full_HumanEval_X 1 mixtral W 8", "full_HumanEval_X is refused"),
        ("pa_fp16 edge_BoolQ 1 mixtral W 8", "edge_BoolQ is refused"),
        ("pa_fp16 simplified_GSM8K 1 mixtral W 8", "simplified_GSM8K is refused"),
        ("pa_fp16 full_MMLU 5 mixtral W 8", "the batch is missing after 5"),
        ("pa_fp16 full_MMLU five 1 mixtral W 8", "the number of shots is 'five'"),
        ("pa_fp16 full_NeedleBench 5k 1 mixtral W 8", "the length is '5k'"),
        ("pa_fp16 full_BoolQ 0 mixtral W 8", "BATCH: for case 1 it is [0]"),
        ("pa_fp16 full_BoolQ [[1],[2]] mixtral W 8", "BATCH has lists for 2 cases but there are 1"),
        ("pa_fp16 performance [[2048,2048],[1024] 1 mixtral W 8", "1 of its brackets are not closed"),
        ("pa_fp16 performance [[2048,2048]] ] mixtral W 8", "BATCH ']': ']' at place 1"),
        ("pa_fp16 performance [[2048,0]] 1 mixtral W 8", "CASES: case 1 is [2048,0]"),
        ("pa_fp16 performance [[2048]] 1 mixtral W 8", "it must be a pair"),
        ("pa_fp16 performance [[9,9],[8,8]] [[1],[2],[3]] mixtral W 8", "BATCH has lists for 3 cases but there are 2"),
        ("pa_fp16 performance [[9,9]] 1 dataset bolq mixtral W 8", "did you mean boolq?"),
        ("pa_fp16 performance_maxbs [[9,9]] [[9,1]] 50 mixtral W 8", "for case 1 it is [9,1]"),
        ("pa_fp16 performance_maxbs [[9,9],[8,8]] [[1,2],[1,2],[1,2]] 50 mixtral W 8", "there are 3 but 2 cases"),
        ("pa_fp16 performance_maxbs [[9,9]] [[1,9]] soon mixtral W 8", "the time limit is 'soon'"),
        ("pa_fp16 performance_maxbs [[9,1]] [[1,9]] 5 mixtral W 8", "no time after the first"),
        ("pa_fp16 precision_single [[9,9]] absent.txt 1 mixtral W 8", "nor a file of them"),
        ("pa_fp16 precision_single [[9,9]] [a] 1 mixtral W 8", "is not a list of texts"),
        ("pa_fp16 full_BoolQ 1 llama W 8", "this engine runs Mixtral only"),
        ("pa_fp16 full_BoolQ 1 mixtral lora F W 8", "lora is refused"),
        ("pa_fp16 full_BoolQ 1 mixtral W encrypt=1 8", "encrypted weights are not read"),
        ("pa_fp16 full_BoolQ 1 mixtral W", "the command ends where the number of chips should stand"),
        ("pa_fp16 full_BoolQ 1 mixtral W 0", "the number of chips is '0'"),
        ("pa_fp16 full_BoolQ 1 mixtral W eight", "neither a number of chips nor a rank table"),
        ("pa_fp16 full_BoolQ 1 mixtral W 8 [2,4,-1,-1,-1,-1]", "dp is 2, and only 1"),
        ("pa_fp16 full_BoolQ 1 mixtral W 8 [1,8]", "the parallel list is '[1,8]'"),
        ("pa_fp16 full_BoolQ 1 mixtral W 8 [1,1,1,1,1,²]", "the parallel list is '[1,1,1,1,1,²]'"),
        ("pa_fp16 full_BoolQ 1 mixtral W 8 [1,4,-1,-1,-1,-1]", "tp is 4, but there are 8 ranks (CHIPS)"),
        ("pa_fp16 full_BoolQ 1 mixtral W 8 many", "max_position_embeddings is 'many'"),
        ("pa_fp16 full_BoolQ 1 mixtral W 8 4096 9", "'9' is one word too many"),
    ],
)
def test_refusals_of_run_sh(line: str, message: str) -> None:
    with pytest.raises(EightfoldError) as caught:
        parse(line.split())
    assert message in str(caught.value)


def test_the_environment() -> None:
    assert read_environment({}) == Environment()
    found = read_environment(
        {
            "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,10",
            "ATB_LLM_BENCHMARK_ENABLE": "1",
            "MASTER_PORT": "20031",
            "INF_NAN_MODE_ENABLE": "0",
            "ATB_OPERATION_EXECUTE_ASYNC": "1",
            "ATB_HOME_PATH": "/usr/local",
            "PATH": "/bin",
        }
    )
    assert found.devices == 4 and found.benchmark_file == Path("benchmark_result/benchmark.csv")
    assert found.ineffective == ("ATB_OPERATION_EXECUTE_ASYNC", "INF_NAN_MODE_ENABLE")
    assert read_environment({}, npu=True).hardware == "NPU"
    assert read_environment({"EIGHTFOLD_DEVICE": "cpu"}, npu=True).hardware == "CPU"
    assert read_environment({"EIGHTFOLD_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "3"}).devices == 1
    assert read_environment({"RANK": "1", "WORLD_SIZE": "2"}).torchrun_ranks == 2


def test_every_switch_of_the_seed_is_read_or_named() -> None:
    switches = "ATB_LAYER_INTERNAL_TENSOR_REUSE INF_NAN_MODE_ENABLE ATB_OPERATION_EXECUTE_ASYNC TASK_QUEUE_ENABLE "
    switches += "ATB_CONVERT_NCHW_TO_ND ATB_WORKSPACE_MEM_ALLOC_GLOBAL ATB_CONTEXT_WORKSPACE_SIZE "
    switches += "ATB_LLM_ENABLE_AUTO_TRANSPOSE"
    assert read_environment(dict.fromkeys(switches.split(), "1")).ineffective == tuple(sorted(switches.split()))


def test_switches_that_a_test_does_not_use_are_named() -> None:
    def notes(line: str, **environ: str) -> str:
        return " | ".join(unused_switches(parse(line.split()), read_environment(environ)))

    full, lengths = "pa_fp16 full_BoolQ 1 mixtral W 8", "pa_fp16 performance [[9,9]] 1 2 mixtral W 8"
    benchmark, split = {"ATB_LLM_BENCHMARK_ENABLE": "1"}, {"MODELTEST_PD_SPLIT_ENABLE": "1"}
    assert not notes(full) and not notes(lengths, **benchmark, ASCEND_RT_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert "ATB_LLM_BENCHMARK_ENABLE has no effect on full tests" in notes(full, **benchmark)
    assert "MODELTEST_PD_SPLIT_ENABLE has no effect on full tests" in notes(full, **split)
    assert "the prefill batch has no effect" in notes(lengths, **split)
    assert "lists 2 devices, and CHIPS makes 8 here: CHIPS counts" in notes(full, ASCEND_RT_VISIBLE_DEVICES="0,1")
    with pytest.raises(EightfoldError, match="lists 2 devices, and CHIPS makes 8 here: ask for as many as are listed"):
        notes(full, ASCEND_RT_VISIBLE_DEVICES="0,1", EIGHTFOLD_DEVICE="npu")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,x"}, "it must list devices"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,0"}, "each once"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT is 'port'"),
        ({"ATB_LLM_BENCHMARK_ENABLE": "yes"}, "it must be 1 or 0"),
        ({"EIGHTFOLD_DEVICE": "tpu"}, "it must be one of cpu, torch, npu, cuda"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_an_environment_that_cannot_be_used(environ: dict[str, str], message: str) -> None:
    with pytest.raises(EightfoldError) as caught:
        read_environment(environ)
    assert message in str(caught.value)


@pytest.mark.parametrize("module", ["dialogue", "convert", "modeltest", "main"])
def test_a_mistake_does_not_wait_for_torch(module: str) -> None:
    code = f"import sys, eightfold.compat.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

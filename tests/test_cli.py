"""The command line as its users meet it. In this process where a process of its own would add nothing but its start."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.cli import COMMANDS, command_parser, main
from eightfold.commands.options import size, token_ids
from eightfold.config import EngineConfig
from eightfold.types import SamplingParams

COMMAND = [sys.executable, "-m", "eightfold"]
ANSWER = "The CEO of Google is Sundar Pichai."
STATISTICS = re.compile(r"\d+ prompt tokens.* · \d+ output tokens · first token after \d+\.\d+ s")


class Stdin(io.TextIOWrapper):
    """Standard input through a pipe; `fileno` is a real one, as the pipe's would be."""

    def __init__(self, text: str, descriptor: int) -> None:
        super().__init__(io.BytesIO(text.encode()), "utf-8")
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Call it with what the command is to find on standard input."""

    def give(text: str) -> None:
        file = tmp_path / "stdin"
        file.write_text(text)
        monkeypatch.setattr(sys, "stdin", Stdin(text, os.open(file, os.O_RDONLY)))

    return give


@pytest.fixture
def broken(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo model to break; its files are links until they are replaced."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in demo.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    return folder


def replace(path: Path, data: bytes | str | dict[str, Any]) -> None:
    """Write a file anew, not through its link."""
    path.unlink(missing_ok=True)
    path.write_bytes(
        data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode()
    )


def change_config(folder: Path, **changes: Any) -> None:
    replace(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Run a command that must fail before it has done anything → its one line."""
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1, err
    assert err.startswith("eightfold: error: "), err
    return err


# --- help and options


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom eightfold.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not done.stderr


def test_every_field_has_its_option() -> None:
    known = {action.dest for action in command_parser("run")._actions}
    assert {field.name for field in fields(EngineConfig)} <= known
    not_on_the_command_line = {"logit_bias", "detokenize", "output_kind"}
    assert {field.name for field in fields(SamplingParams)} - known == not_on_the_command_line
    defaults = vars(command_parser("run").parse_args(["demo"]))
    assert all(
        defaults[field.name] == field.default for field in fields(EngineConfig) if field.name not in ("model", "seed")
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1048576", 1 << 20),
        ("512M", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("4g", 4 << 30),
        ("2 GB", 2 * 10**9),
        ("7KiB", 7168),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


def test_token_ids() -> None:
    assert token_ids("1,2, 3 4") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a command is needed: run, chat"),
        (["rnu", "demo"], "invalid choice: 'rnu'"),
        (["run"], "required: MODEL"),
        (["run", "demo", "--temprature", "1"], "option --temprature is not known; did you mean --temperature?"),
        (["run", "demo", "-trust_remote_code"], "did you mean --trust-remote-code?"),
        (["chat", "demo", "--zzz"], "eightfold chat --help lists its options"),
        (["info", "demo", "more"], "'more' is one argument too many"),
        (["run", "demo", "--max", "4"], "option --max is not known"),
        (["run", "demo", "--top-k", "few"], "--top-k: invalid int value: 'few'"),
        (["run", "demo", "--kv-cache-memory-bytes", "lots"], "'lots' is not a size such as 4GiB"),
        (["run", "demo", "--prompt-token-ids", "1,-2"], "not a list of token ids"),
        (["run", "demo", "x", "--temperature", "-1"], "temperature is -1.0; it must be 0 (greedy) or more"),
        (["run", "demo", "x", "--temperature", "nan"], "temperature is nan"),
        (["run", "demo", "x", "--top-p", "0"], "top_p is 0.0; it must be above 0 and at most 1"),
        (["run", "demo", "x", "--top-p", "1.1"], "top_p is 1.1"),
        (["run", "demo", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["run", "demo", "x", "--logprobs", "2"], "--json"),
        (["run", "demo", "x", "--prompt-token-ids", "1"], "not several of them"),
        (["run", "demo", ""], "prompt 1 is empty"),
        (["run", "demo", "--prompt-file", "absent.txt"], "cannot read absent.txt: No such file"),
        (["run", "demo", "x", "--no-chat", "--system", "y"], "--system is for chat"),
        (["run", "demo", "x", "--no-chat", "--chat-template", "{{ messages }}"], "give one of them"),
        (["run", "demo", "x", "--chat-template", "absent.jinja"], "absent.jinja"),
        (["run", "demo", "x", "--skip-tokenizer-init"], "token ids instead of text"),
        (["run", "demo", "--prompt-token-ids", "999999999"], "token id 999999999"),
        (["run", "demo", "x", "--device", "abacus"], "'abacus'"),
        (["run", "demo", "x", "--dtype", "int3"], "--dtype is 'int3'"),
        (
            ["run", "demo", "x", "--kv-cache-dtype", "int4"],
            "--kv-cache-dtype is 'int4'; it must be auto or one of float32",
        ),
        (["info", "demo", "--kv-cache-dtype", "int4"], "--kv-cache-dtype is 'int4'"),
        (["run", "demo", "x", "--load-mode", "teleport"], "--load-mode is 'teleport'"),
        (["run", "demo", "x", "--block-size", "0"], "--block-size is 0; it must be at least 1"),
        (["run", "demo", "x", "--max-model-len", "99999999"], "--max-model-len is 99999999"),
        (["run", "demo", "x", "--kv-cache-memory-bytes", "1K"], "--kv-cache-memory-bytes"),
        (["run", "./nowhere"], "no such folder"),
        (["make-random", "x", "--shape", "9x9b"], "'9x9b' is neither one of 8x7b, 8x22b nor a folder"),
        (["make-random", "x", "--dtype", "int3"], "--dtype is 'int3'"),
        (["make-random", ".", "--layers", "1"], "not an empty folder"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *argv)


# --- run


def test_run_answers_the_default_question_as_a_stream(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Out(io.StringIO):
        flushed: list[str] = []  # noqa: RUF012 (one use, one instance)

        def flush(self) -> None:
            if self.flushed[-1:] != [self.getvalue()]:
                self.flushed.append(self.getvalue())

    out = Out()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["run", "demo"]) == 0
    assert out.getvalue().strip() == ANSWER
    assert len(out.flushed) >= 3
    err = capsys.readouterr().err
    assert STATISTICS.match(err)
    assert re.search(r"\d tokens/s · loaded in \d+\.\d+ s\n$", err)


def test_the_installed_command_streams_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [*COMMAND, "run", "demo"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ANSWER
    assert done.stderr.count("\n") == 1  # statistics; no progress bar where there is no terminal


def test_several_prompts_run_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "Who is the CEO of Google?", "--max-tokens", "40", "Who is the CEO of Apple?"]) == 0
    out, err = capsys.readouterr()
    blocks = sorted(out.split("\n\n"))
    assert "[1] Who is the CEO of Google?\nThe CEO of Google is Sundar Pichai." in blocks
    assert "[2] Who is the CEO of Apple?\nThe CEO of Apple is Tim Cook." in blocks
    assert err.count("\n") == 1
    assert "(mean)" in err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["run", "demo", "--json", "--logprobs", "2", "--prompt-logprobs", "0", "Who is the CEO of Google?"]) == 0
    )
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    (one,) = result["outputs"]
    assert one["text"].strip() == ANSWER
    assert one["finish_reason"] == "stop"
    assert len(one["logprobs"]) == len(one["token_ids"])
    assert one["logprobs"][0][0]["token_id"] == one["token_ids"][0]
    assert len(result["prompt_logprobs"]) == len(result["prompt_token_ids"])
    assert 0 < result["first_token_seconds"] <= result["seconds"]
    assert result["error"] is None


def test_n_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "Hello", "--n", "2", "--temperature", "1", "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "[1.1] Hello\n" in out
    assert "[1.2] Hello\n" in out


def test_stop_and_its_inclusion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--stop", "nothing of the kind", "--stop", "Google"]) == 0
    assert capsys.readouterr().out.strip() == "The CEO of"
    assert main(["run", "demo", "--stop", "Google", "--include-stop-str-in-output"]) == 0
    assert capsys.readouterr().out.strip() == "The CEO of Google"


def test_a_seed_repeats_a_draw(capsys: pytest.CaptureFixture[str]) -> None:
    def draw(*more: str) -> str:
        argv = ["run", "demo", "--no-chat", "The", "--temperature", "2", "--max-tokens", "20", "--ignore-eos", *more]
        assert main(argv) == 0
        return capsys.readouterr().out

    assert draw("--seed", "1") == draw("--seed", "1")
    assert draw("--seed", "1") != draw("--seed", "2")


def test_chat_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    def prompt(*more: str) -> str:
        assert main(["run", "demo", "--json", "--max-tokens", "1", "Hello", *more]) == 0
        text: str = json.loads(capsys.readouterr().out)["prompt"]
        return text

    assert prompt("--no-chat") == "Hello"
    assert "Hello" in prompt("--chat") != "Hello"
    assert prompt() == prompt("--chat")
    assert "Be brief." in prompt("--system", "Be brief.")
    assert prompt("--chat-template", "<{{ messages[0].content }}>").endswith("<Hello>")


def test_token_ids_need_no_tokenizer(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    argv = [
        "run",
        str(broken),
        "--skip-tokenizer-init",
        "--prompt-token-ids",
        "1,5,6",
        "--max-tokens",
        "3",
        "--ignore-eos",
    ]
    assert main(argv) == 0
    assert re.fullmatch(r"\d+ \d+ \d+\n", capsys.readouterr().out)


def test_prompts_from_standard_input(pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["run", "demo"], ["run", "demo", "-"]):
        pipe("Who is the CEO of Apple?\n")
        assert main(argv) == 0
        assert "Tim Cook" in capsys.readouterr().out


def test_an_empty_standard_input_is_no_prompt(pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    pipe("\n")
    assert main(["run", "demo"]) == 0
    assert capsys.readouterr().out.strip() == ANSWER
    pipe("\n")
    assert "standard input is empty" in refused(capsys, "run", "demo", "-")


def test_a_silent_pipe_does_not_hang() -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "demo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == ANSWER  # with the pipe still open
    _, err = process.communicate(timeout=60)
    assert err.startswith("eightfold: note: nothing came from standard input")


def test_prompt_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("Who is the CEO of Google?\n\nWho is the CEO of Apple?\r\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is the CEO of Apple?"}]
    requests = [{"prompt": "Who is the CEO of Google?"}, {"messages": messages}, {"prompt_token_ids": [1, 2, 3]}]
    lines.write_text("\n".join(map(json.dumps, requests)))
    for path, count in ((text, 2), (lines, 3)):
        assert main(["run", "demo", "--prompt-file", str(path), "--max-tokens", "30"]) == 0
        out = capsys.readouterr().out
        assert len(re.findall(r"^\[\d\] ", out, re.MULTILINE)) == count
        assert ANSWER in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", ":1 is not text in UTF-8 (byte 0xff)"),
        ("a.jsonl", '{"prompt": "x"}\nx', "a.jsonl:2 is not valid JSON"),
        (
            "a.jsonl",
            "[1]",
            "a.jsonl:1 holds a list; an object with one of prompt, prompt_token_ids, messages is needed",
        ),
        ("a.jsonl", '{"question": "x"}', "holds the keys ['question']"),
        ("a.jsonl", '{"prompt": 3}', "prompt must be a text"),
        ("a.jsonl", '{"prompt": ""}', "prompt is empty"),
        ("a.jsonl", '{"prompt_token_ids": ["a"]}', "must be a list of numbers"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "content"),
        ("a.jsonl", '{"prompt": "half \\ud83d"}', "not valid Unicode"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "message 1",
        ),
    ],
)
def test_bad_prompt_files(
    name: str, content: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(tmp_path / name, content)
    assert message in refused(capsys, "run", "demo", "--prompt-file", tmp_path / name)


def test_a_prompt_longer_than_the_context_stops_all(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "run", "demo", "--max-model-len", "24", "Hello", "Who is the CEO of Google? " * 8)
    assert "request '2' has a prompt of" in line
    assert "the context holds 24" in line


def test_a_request_that_fails_does_not_take_others_along(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][7] = float("nan")

    change_tensors(broken, poison)
    ids = ["--prompt-token-ids", "1,7,8", "--prompt-token-ids", "1,8,9"]
    assert main(["run", str(broken), *ids, "--max-tokens", "3", "--ignore-eos", "--json"]) == 1
    out, err = capsys.readouterr()
    results = {line["id"]: line for line in map(json.loads, out.splitlines())}
    assert results["1"]["outputs"][0]["finish_reason"] == "error"
    assert len(results["2"]["outputs"][0]["token_ids"]) == 3
    assert err.splitlines()[0].startswith("eightfold: error: request '1' failed")
    assert "Traceback" not in err


def test_nothing_remote_to_trust(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--trust-remote-code"]) == 0
    assert "no code from a checkpoint is ever executed" in capsys.readouterr().err.splitlines()[0]


def test_a_closed_pipe_is_no_crash() -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "demo", "--ignore-eos"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(3)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


def test_an_interrupt_ends_run() -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "demo", "--ignore-eos"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.decode()) == (130, "eightfold: interrupted\n")


def test_progress_is_for_terminals() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a new one is 0 columns wide
    words = ["run", "demo", "Hello", "Good day", "--max-tokens", "4"]
    done = subprocess.run(
        [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "Loading:" in shown
    assert re.search(r"Prompts: +50%", shown)
    assert b"Prompts" not in done.stdout


# --- broken folders


def test_folders_that_are_no_model(tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds neither config.json nor params.json" in refused(capsys, "run", tmp_path, "x")
    assert "is a file" in refused(capsys, "run", demo / "config.json", "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "Mixtral is needed"),
        ({"rope_scaling": {"rope_type": "spiral"}, "rope_parameters": None}, "rope scaling"),
        ({"hidden_act": "gelu"}, "hidden_act is"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok is 99"),
        ({"softcap": 30}, "softcap is 30"),
    ],
)
def test_configs_that_are_refused(
    changes: dict[str, Any], message: str, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(broken, **changes)
    assert message in refused(capsys, "run", broken, "x")


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.extra.weight"] = torch.zeros(3)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(3, dtype=tensors["model.norm.weight"].dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"lacks .*model\.norm\.weight.*expected shape \[\d+\]"),
        (_add, r"model\.extra\.weight.*shape \[3\]"),
        (_reshape, r"model\.norm\.weight.*shape \[3\], expected \[\d+\]"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(broken, change)
    assert re.search(message, refused(capsys, "run", broken, "x"))


def test_files_that_are_damaged_or_absent(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (weights,) = broken.glob("*.safetensors")
    whole = weights.read_bytes()
    replace(weights, whole[:-1000])
    assert weights.name in refused(capsys, "run", broken, "x")
    weights.unlink()
    assert "holds no weights" in refused(capsys, "run", broken, "x")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    replace(broken / "model.safetensors.index.json", index)
    assert "model-00001-of-00001.safetensors is absent" in refused(capsys, "run", broken, "x")
    (broken / "model.safetensors.index.json").unlink()
    torch.save({}, broken / "pytorch_model.bin")
    assert "--allow-pickle" in refused(capsys, "run", broken, "x")


def test_a_folder_without_tokenizer(broken: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in refused(capsys, "run", broken, "x")
    assert main(["run", str(broken), "--tokenizer", str(demo), "x", "--max-tokens", "2"]) == 0


# --- chat


def chat(pipe: Callable[[str], None], lines: list[str], *options: str) -> int:
    pipe("".join(f"{line}\n" for line in lines))
    return main(["chat", "demo", *options])


def test_chat_through_a_pipe(pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "Who is the CEO of Google?",
        "Who is the CEO of Apple?",
        "/reset",
        " Who is the CEO of Google?",
        "/quit",
        "x",
    ]
    assert chat(pipe, lines, "--block-size", "4") == 0
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()
    assert first.strip() == third.strip() == ANSWER
    assert second.strip()
    cached = [int(number) for number in re.findall(r"\((\d+) cached\)", err)]
    assert cached[0] > 8, "the second turn starts with the first one's tokens"
    assert "the conversation is forgotten" in err


def test_chat_commands(pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(pipe, ["/help", "/system Be brief.", "/system", "/sing", "", "Hello"], "--max-tokens", "2") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert err.count("/reset") == 2
    assert "with this system prompt" in err
    assert "without system prompt" in err
    assert "there is no command /sing" in err


def test_chat_that_outgrows_the_context(pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    question = "Who is the CEO of Google?"
    lines = [question * 20, question, question, question, "/reset", question]
    assert chat(pipe, lines, "--max-model-len", "64") == 1
    out, err = capsys.readouterr()
    assert "send a shorter message" in err
    assert "/reset starts a new conversation" in err
    assert out.splitlines()[0].strip() == out.splitlines()[-1].strip() == ANSWER


def test_an_interrupt_stops_the_answer_and_not_the_chat() -> None:
    process = subprocess.Popen(
        [*COMMAND, "chat", "demo", "--ignore-eos"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Who is the CEO of Google?\n")
    process.stdin.flush()
    start = process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    start += process.stdout.readline()
    assert start.endswith(b"\n")
    out, err = process.communicate(b"/reset\n/quit\n", timeout=60)
    assert (process.returncode, out) == (0, b"")
    assert b"the conversation is forgotten" in err
    assert b"cut off" not in err


# --- info and make-random


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo"]) == 0
    out, err = capsys.readouterr()
    assert not err
    for word in ("parameters", "on disk", "fp32", "bf16", "w8a8", "fits", "attention", "linear dense", "threads"):
        assert word in out
    assert main(["info", "demo", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["active_parameters"] < facts["parameters"]
    assert [form["own"] for form in facts["formats"]].count(True) == 1


def test_info_needs_only_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768}
    replace(tmp_path / "config.json", {"model_type": "mixtral", "torch_dtype": "bfloat16", **sizes, **heads})
    assert main(["info", str(tmp_path), "--json", "--device", "torch"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 46_702_792_704
    assert facts["active_parameters"] == 12_879_925_248
    assert facts["stored"] is None
    forms = {form["format"]: form for form in facts["formats"]}
    assert forms["bf16"]["weights"] == 2 * facts["parameters"]
    assert forms["bf16"]["kv_per_token"] == 128 * 1024
    assert forms["bf16"]["own"]
    assert 0.49 < forms["w8a8"]["weights"] / forms["bf16"]["weights"] < 0.52
    for form in forms.values():
        for context in form["contexts"]:
            assert context["ranks"] == 1 or context["short"]
    assert "no weights" in _rendered(tmp_path, capsys)
    assert main(["info", str(tmp_path), "--json", "--device", "torch", "--kv-cache-dtype", "int8"]) == 0
    for form in json.loads(capsys.readouterr().out)["formats"]:
        assert form["kv_per_token"] == 32 * 2 * 8 * (128 + 4)  # a byte an element, and the scales
        assert form["weights"] == forms[form["format"]]["weights"]


def _rendered(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["info", str(folder), "--device", "torch"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["dense", "w8a8"])
def test_make_random(scheme: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(demo / "config.json", shape)
    change_config(shape, vocab_size=500)
    folder = tmp_path / "random"
    argv = [
        "make-random",
        str(folder),
        "--shape",
        str(shape),
        "--layers",
        "2",
        "--dtype",
        "float32",
        "--scheme",
        scheme,
    ]
    assert main(argv) == 0
    assert "GB of random weights" in capsys.readouterr().err
    ids = ["--skip-tokenizer-init", "--prompt-token-ids", "1,2,3", "--max-tokens", "2", "--ignore-eos"]
    assert main(["run", str(folder), *ids]) == 0
    assert re.fullmatch(r"\d+ \d+\n", capsys.readouterr().out)
    assert "not an empty folder" in refused(capsys, *argv)

"""The import rule of docs/architecture.md, read from the source: imports point down, torch stays where it belongs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "eightfold"

# A room may import the rooms of the lines above its own, never those of its own line.
LEVELS = (
    ("types", "machine", "html"),
    ("weight_files", "vocabulary", "file_memory", "data_files"),
    ("config_file", "hub", "safetensors_file", "chat_template"),
    ("quant_config",),
    ("config", "detokenizer"),
    ("parallel",),
    ("rope", "tokenizer", "checkpoint", "ops", "quant", "kv_cache", "sharding", "plan_bytes"),
    ("scheduler", "model", "sampling"),
    ("runner",),
    ("engine",),
    ("loader", "random_checkpoint"),
    ("worker",),
    ("async_engine", "llm", "replicas"),
    ("server", "eval", "bench", "quantize", "compare", "doctor"),
    ("commands", "compat"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
FACADE = "__init__"  # of the package: lazy, so it may name anything and anyone may ask it for the version

WITHOUT_TORCH = {
    "types",
    "machine",
    "html",
    "config",
    "config_file",
    "data_files",
    "plan_bytes",
    "quant_config",
    "weight_files",
    "hub",
    "kv_cache",
    "scheduler",
    "cli",
    FACADE,
}
DEVICE_ONLY = re.compile(r"(triton|torch_npu|torch\.(cuda|npu))(\.|$)")
LIMIT = 450
CODE = (".py", ".cpp", ".h")


class Import(NamedTuple):
    """A module, or a name in one, that a file imports or reaches through `torch`."""

    line: int
    target: str


def imports(source: str) -> Iterator[Import]:
    """Whatever a file imports, wherever in the file, also by `import_module("…")` and as `torch.cuda`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(node.lineno, f"{'.' * node.level}{node.module or ''}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0]
            if isinstance(first, ast.JoinedStr):  # of f"eightfold.quant.{name}" the beginning tells the room
                first = first.values[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(node.lineno, first.value)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield Import(node.lineno, f"torch.{node.attr}")


def room_of(name: str) -> str:
    """The room of a module or name: "eightfold.quant.w8a8" → "quant"; the package's own names are the facade's."""
    room = [*name.split("."), FACADE][1]
    return room if room in LEVEL else FACADE


def violations(path: str, source: str) -> list[str]:
    """What breaks the rule in a file; `path` is relative to the package, as in "ops/cpu.py"."""
    room = Path(path).parts[0].removesuffix(".py")
    if room != FACADE and room not in LEVEL:
        return [f"{path}: room {room} has no level; give it one in {Path(__file__).name}"]
    found = []
    for line, target in imports(source):
        where = f"{path}:{line}"
        if target.startswith("."):
            found.append(f"{where}: relative import {target}; rooms are named in full")
        elif target.split(".")[0] == "eightfold":
            other = room_of(target)
            if FACADE not in (room, other) and other != room and LEVEL[other] >= LEVEL[room]:
                found.append(f"{where}: {room} may not import {other}, which is not below it")
        elif DEVICE_ONLY.match(target) and room != "ops":
            found.append(f"{where}: {target} belongs under ops/")
        elif target.split(".")[0] == "torch" and room in WITHOUT_TORCH:
            found.append(f"{where}: {room} does without torch")
    return found


def source_files() -> list[Path]:
    folders = [PACKAGE, ROOT / "csrc"]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in CODE)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("config.py", "from eightfold.model import Mixtral", "config may not import model"),
        ("ops/cpu.py", "from eightfold.quant import Part", "ops may not import quant"),
        ("quant/dense.py", "def f():\n    import eightfold.ops", "quant may not import ops"),
        ("bench/run.py", "from eightfold import server, eval", "bench may not import server"),
        (
            "model.py",
            "from importlib import import_module\nimport_module('eightfold.engine')",
            "model may not import engine",
        ),
        ("model.py", "import importlib\nimportlib.import_module(f'eightfold.llm.{x}')", "model may not import llm"),
        ("model.py", "import torch\ntorch.cuda.synchronize()", "torch.cuda belongs under ops/"),
        ("runner.py", "import triton.language as tl", "triton.language belongs under ops/"),
        ("runner.py", "from torch.npu import Stream", "torch.npu.Stream belongs under ops/"),
        ("scheduler.py", "from torch import Tensor", "scheduler does without torch"),
        ("engine.py", "from .types import Plan", "relative import"),
        ("attic.py", "", "room attic has no level"),
    ],
)
def test_the_checker_finds(path: str, source: str, message: str) -> None:
    assert message in "\n".join(violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model.py", "from eightfold.ops import Ops\nfrom eightfold.types import Plan\nimport torch"),
        ("ops/cuda.py", "import triton\nimport torch\ntorch.cuda.current_stream()\nfrom eightfold.ops import Ops"),
        ("cli.py", "from eightfold import __version__\nfrom eightfold.commands import options"),
        ("runner.py", "import tritonclient\nimport torchvision"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_imports_point_down() -> None:
    found = [
        text
        for path in sorted(PACKAGE.rglob("*.py"))
        for text in violations(path.relative_to(PACKAGE).as_posix(), path.read_text())
    ]
    assert not found, "\n".join(found)


def test_files_fit_a_reader() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in source_files()}
    assert len(lengths) > 20
    assert {path: length for path, length in lengths.items() if length >= LIMIT} == {}


def test_no_note_to_do_something_without_a_reason() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\([^)]+\): \S)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: write it as TODO(reason): what"
        for path in source_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", ["eightfold", "eightfold.cli", "eightfold.types", "eightfold.scheduler"])
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Checkpoints in every layout, read in place; transformers and safetensors are the oracles."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eightfold.checkpoint
from eightfold.checkpoint import Checkpoint, read_ahead
from eightfold.config import ModelConfig, RopeConfig, load_model_config
from eightfold.file_memory import LOAD_MODES
from eightfold.random_checkpoint import random_checkpoint
from eightfold.types import EightfoldError

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "max_position_embeddings": 64,
}
Q = "model.layers.1.self_attn.q_proj.weight"
W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


class Want(NamedTuple):
    """What `check` takes, as quant.Part has it."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    optional: bool = False


def make_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**SIZES, **changes}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("source")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tensors(source: Path) -> dict[str, Tensor]:
    """Its tensors; the canonical names are those that transformers writes."""
    return load_file(source / "model.safetensors")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A folder with the config alone, to put weights into."""
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    return tmp_path


def open_folder(folder: Path, **options: Any) -> Checkpoint:
    return Checkpoint.open(folder, load_model_config(folder), **options)


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
        assert checkpoint.tensor(name).dtype == tensor.dtype


def expected(tensors: dict[str, Tensor]) -> dict[str, Want]:
    return {name: Want((tuple(tensor.shape),)) for name, tensor in tensors.items()}


def sharded(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Writes two shards and their index → the index's weight_map."""
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def mistral_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "tok_embeddings"),
        ("model.norm", "norm"),
        ("lm_head", "output"),
        ("model.layers", "layers"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("block_sparse_moe", "feed_forward"),
    ):
        name = name.replace(ours, theirs)
    for letter in "qkvo":
        name = name.replace(f"self_attn.{letter}_proj", f"attention.w{letter}")
    return name


def write_params(folder: Path) -> None:
    moe = {"num_experts": 3, "num_experts_per_tok": 2}
    params = {
        "dim": 32,
        "n_layers": 2,
        "head_dim": 8,
        "hidden_dim": 40,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
    }
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": 96, "moe": moe}))


def test_as_transformers_writes(source: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = open_folder(source)
    assert_holds(checkpoint, tensors)
    checkpoint.check(expected(tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_as_transformers_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    checkpoint = open_folder(tmp_path)
    assert_holds(checkpoint, {name: tensor for file in files for name, tensor in load_file(file).items()})
    assert checkpoint.main_dtype == dtype
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_holds(open_folder(tmp_path), {name: checkpoint.tensor(name) for name in checkpoint.names()})


def test_fused_experts(folder: Path, tensors: dict[str, Tensor]) -> None:
    state = make_model().state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, folder / "model.safetensors")
    assert_holds(open_folder(folder), tensors)


def test_new_block_name_with_separate_experts(folder: Path, tensors: dict[str, Tensor]) -> None:
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    assert_holds(open_folder(folder), tensors)


def test_mistral_layout(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_params(tmp_path)
    names = list(tensors)
    for number, part in enumerate((names[:10], names[10:])):
        save_file(
            {mistral_name(name): tensors[name] for name in part}, tmp_path / f"consolidated.0{number}.safetensors"
        )
    assert load_model_config(tmp_path).rope.interleaved
    assert_holds(open_folder(tmp_path), tensors)


def test_stacked_experts_of_the_first_release_are_refused(tmp_path: Path) -> None:
    write_params(tmp_path)
    save_file({"layers.0.block_sparse_moe.w1": torch.zeros(120, 32)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(EightfoldError, match=r"stacks all experts.*mistralai/Mixtral-8x7B-v0\.1"):
        open_folder(tmp_path)


def test_names_of_the_other_layout_are_refused(tmp_path: Path, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Rows of q and k are in another order there: the answers would be wrong without a sign."""
    save_file({mistral_name(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(EightfoldError, match="names tensors as Mistral does"):
        open_folder(folder)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "consolidated.safetensors")
    with pytest.raises(EightfoldError, match="names tensors as Hugging Face does"):
        open_folder(folder)


def test_quantized_tensors_and_their_files(folder: Path) -> None:
    stored = {
        W1: torch.ones(40, 32, dtype=torch.int8),
        f"{W1}_scale": torch.ones(40, 1),
        f"{W1}_offset": torch.zeros(40, 1),
    }
    save_file(stored, folder / "quant_model_weight_w8a8_dynamic.safetensors")
    checkpoint = open_folder(folder)
    assert_holds(checkpoint, stored)
    assert checkpoint.bytes_by_dtype() == {torch.int8: 1280, torch.float32: 320}
    assert (checkpoint.main_dtype, checkpoint.total_bytes) == (torch.float32, 1600)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        (W1, "FLOAT", "says that tensor .*experts.2.w1.weight. is FLOAT, but it is stored as int8"),
        (W1, None, "does not describe tensor .*experts.2.w1.weight., which is stored as int8"),
        (
            "lm_head.weight",
            "W8A8_DYNAMIC",
            "says that tensor .lm_head.weight. is quantized, but it is stored as float32",
        ),
        ("model.norm.weight", "FLOAT", "describes tensor .model.norm.weight., which no weight file holds"),
    ],
)
def test_a_description_that_disagrees_with_the_tensors(folder: Path, name: str, kind: str | None, words: str) -> None:
    stored = {W1: torch.ones(40, 32, dtype=torch.int8), f"{W1}_scale": torch.ones(40, 1)}
    save_file({**stored, "lm_head.weight": torch.ones(96, 32)}, folder / "quant_model_weight_w8a8_dynamic.safetensors")
    right = {"model_quant_type": "W8A8_DYNAMIC", **dict.fromkeys(stored, "W8A8_DYNAMIC"), "lm_head.weight": "FLOAT"}
    description = folder / "quant_model_description.json"
    description.write_text(json.dumps(right))
    open_folder(folder)
    wrong = {**right, name: kind}
    description.write_text(json.dumps({key: value for key, value in wrong.items() if value}))
    with pytest.raises(EightfoldError, match=words):
        open_folder(folder)


def test_experts_named_gate_up_and_down(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}

    def renamed(name: str) -> str:
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        return name

    save_file({renamed(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert_holds(open_folder(folder), tensors)


@pytest.mark.parametrize("shards", [False, True])
def test_pickles_need_consent(folder: Path, tensors: dict[str, Tensor], shards: bool) -> None:
    file = "pytorch_model-00001-of-00001.bin" if shards else "pytorch_model.bin"
    torch.save(tensors, folder / file)
    if shards:
        index = {"weight_map": dict.fromkeys(tensors, file)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(EightfoldError, match=f"{file} is a pickle.*--allow-pickle"):
        open_folder(folder)
    assert_holds(open_folder(folder, allow_pickle=True), tensors)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path("executed"),)


def test_pickles_run_no_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = folder / "pytorch_model.bin"
    for content in (Evil(), {"a": Evil()}, [torch.ones(1)], {"a": 1}):
        torch.save(content, path)
        with pytest.raises(EightfoldError, match=r"pytorch_model\.bin"):
            open_folder(folder, allow_pickle=True)
    for data in (b"", b"junk" * 100, path.read_bytes()[:-40]):
        path.write_bytes(data)
        with pytest.raises(EightfoldError, match=r"cannot read .*pytorch_model\.bin"):
            open_folder(folder, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_tensors_are_views_of_the_file(source: Path, folder: Path) -> None:
    """Nothing is copied: every tensor lies in the map of its file, which stays while a tensor does."""

    def maps(path: Path) -> list[range]:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        return [range(*(int(x, 16) for x in line[0].split("-"))) for line in lines]

    path = folder / "model.safetensors"
    for fused in (False, True):
        if fused:
            save_file(make_model().state_dict(), path)
        else:
            path.write_bytes((source / path.name).read_bytes())
        checkpoint = open_folder(folder)
        (where,) = maps(path)
        assert all(checkpoint.tensor(name).data_ptr() in where for name in checkpoint.names())
        kept = checkpoint.tensor(W1)
        del checkpoint
        assert kept.sum().isfinite()
        assert len(maps(path)) == 1
        del kept
        assert maps(path) == []


def test_tied_embeddings(folder: Path, tensors: dict[str, Tensor]) -> None:
    changes = {"tie_word_embeddings": True}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    one = {name: tensor for name, tensor in tensors.items() if name != head}
    for stored in (
        one,
        {**one, head: tensors[embedding].clone()},
        {name: tensor for name, tensor in {**one, head: tensors[embedding]}.items() if name != embedding},
    ):
        save_file(stored, folder / "model.safetensors")
        assert_holds(open_folder(folder), one)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(EightfoldError, match=r"lm_head.weight that differs .*tie_word_embeddings"):
        open_folder(folder)


def test_rotary_buffers_are_harmless(folder: Path, tensors: dict[str, Tensor]) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **extra}, folder / "model.safetensors")
    open_folder(folder).check(expected(tensors))


def test_check_names_what_is_wrong(source: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint, right = open_folder(source), expected(tensors)
    checkpoint.check({**right, "extra.scale": Want(((1,),), optional=True)})
    checkpoint.check({**right, Q: Want(((1, 1), (32, 32)), (torch.int8, torch.float32))})
    for wrong, words in (
        (
            {**right, Q: Want(((32, 33), (1,)))},
            rf"tensor '{Q}' in .*model.safetensors has shape \[32, 32\], expected \[32, 33\] or \[1\]",
        ),
        (
            {**right, Q: Want(((32, 32),), (torch.int8, torch.float16))},
            f"tensor '{Q}' in .* is float32, expected int8 or float16",
        ),
        ({**right, "x": Want(((3, 4),)), "y": Want(((1,),))}, r"lacks tensor 'x' and 1 more, expected shape \[3, 4\]$"),
        (
            {name: what for name, what in right.items() if name != Q},
            rf"model.safetensors holds tensor '{Q}', shape \[32, 32\], which",
        ),
        (
            {("z" if name == Q else name): what for name, what in right.items()},
            f"lacks tensor 'z', .*holds tensor '{Q}'",
        ),
    ):
        with pytest.raises(EightfoldError, match=words) as caught:
            checkpoint.check(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(EightfoldError, match="no tensor 'nothing'"):
        checkpoint.tensor("nothing")


def test_fused_experts_of_wrong_shape(folder: Path) -> None:
    save_file({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(3, 79, 32)}, folder / "model.safetensors")
    with pytest.raises(EightfoldError, match=r"gate_up_proj in .* \[3, 79, 32\], expected \[3, 80, 32\]"):
        open_folder(folder)


def test_a_tensor_stored_twice(folder: Path, tensors: dict[str, Tensor]) -> None:
    fused = {"model.layers.0.mlp.experts.down_proj": torch.zeros(3, 32, 40)}
    save_file({**tensors, **fused}, folder / "model.safetensors")
    with pytest.raises(EightfoldError, match=r"experts.0.w2.weight' is stored twice"):
        open_folder(folder)


def test_no_weights(folder: Path) -> None:
    with pytest.raises(EightfoldError, match=r"holds no weights: no model\.safetensors"):
        open_folder(folder)


def test_bad_indexes(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = sharded(folder, tensors)
    assert_holds(open_folder(folder), tensors)
    second = "model-00002-of-00002.safetensors"
    for changed, words in (
        ({**weight_map, "ghost": second}, f"{second} lacks tensor 'ghost', though model.safetensors.index.json"),
        ({**weight_map, Q: "gone.safetensors"}, r"gone\.safetensors is absent, though model\.safetensors\.index\.json"),
        ({**weight_map, Q: "../model.safetensors"}, "a file name in its own folder"),
        ({**weight_map, Q: 3}, "a file name in its own folder"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        write_index(folder, changed)
        with pytest.raises(EightfoldError, match=words):
            open_folder(folder)
    write_index(folder, weight_map)
    (folder / second).unlink()
    with pytest.raises(EightfoldError, match=f"{second} is absent, though"):
        open_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(EightfoldError, match="lacks file 2 of 2"):
        open_folder(folder)


def test_read_ahead(source: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint, seen = open_folder(source), []
    weights = [checkpoint.tensor(name) for name in checkpoint.names()]
    read_ahead(weights, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (checkpoint.total_bytes, checkpoint.total_bytes)
    assert seen == sorted(seen)


def test_read_ahead_touches_the_pages_of_columns_only(tmp_path: Path) -> None:
    """Rows of four pages, of which a rank holds the second one and half of the third."""
    page, rows = os.sysconf("SC_PAGE_SIZE"), 40
    path = tmp_path / "matrix"
    path.write_bytes(bytes(rows * 4 * page))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        mapped = mmap.mmap(file.fileno(), 0)
        mapped.madvise(mmap.MADV_RANDOM)  # no reading ahead by the system
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        matrix = torch.frombuffer(mapped, dtype=torch.int8).view(rows, 4 * page)
        if any(in_memory(matrix)):
            pytest.skip("this file system keeps its files in memory")
        seen: list[tuple[int, int]] = []
        read_ahead([matrix[:, page : 2 * page + page // 2]], lambda done, total: seen.append((done, total)))
        assert seen[-1] == (rows * page * 3 // 2,) * 2
        assert in_memory(matrix) == [False, True, True, False] * rows


def in_memory(tensor: Tensor) -> list[bool]:
    """Whether each page of a mapping is in the system's cache."""
    pages = ctypes.create_string_buffer(tensor.nbytes // os.sysconf("SC_PAGE_SIZE"))
    address = ctypes.c_void_p(tensor.data_ptr())
    assert ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(tensor.nbytes), pages) == 0
    return [bool(byte & 1) for byte in pages.raw]


@pytest.mark.parametrize("mode", LOAD_MODES)
def test_load_modes_hold_the_same_bytes(source: Path, tensors: dict[str, Tensor], mode: str) -> None:
    seen: list[tuple[int, int]] = []
    config = load_model_config(source)
    checkpoint = Checkpoint.open(source, config, load_mode=mode, progress=lambda *counts: seen.append(counts))
    assert_holds(checkpoint, tensors)
    assert (seen[-1][0] == seen[-1][1] > 0) if mode != "mmap" else seen == []


def test_a_refused_lock_says_what_to_do(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def mlock(self, *args: object) -> int:
            ctypes.set_errno(errno.ENOMEM)  # as the system does beyond RLIMIT_MEMLOCK
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: Libc())
    with pytest.raises(EightfoldError, match=r"cannot lock the weights in memory .*ulimit -l"):
        Checkpoint.open(source, load_model_config(source), load_mode="lock")


OPEN = """
import sys
from pathlib import Path
from eightfold.checkpoint import Checkpoint, read_ahead
from eightfold.config import load_model_config

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = anonymous()
folder = Path(sys.argv[1])
checkpoint = Checkpoint.open(folder, load_model_config(folder))
opened = anonymous()
read_ahead(map(checkpoint.tensor, checkpoint.names()))
print(opened - before, anonymous() - before, checkpoint.total_bytes)
"""


def test_opening_takes_no_memory(tmp_path: Path) -> None:
    wide = ModelConfig(32000, 2048, 5632, 1, 16, 8, 128, 8, 2, 1e-5, 4096, RopeConfig(1e6))
    random_checkpoint(tmp_path / "large", wide, dtype=torch.bfloat16)
    command = [sys.executable, "-c", OPEN, tmp_path / "large"]
    env = {**os.environ, "PYTHONPATH": str(Path(eightfold.checkpoint.__file__).parents[1])}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    opened, touched, total = map(int, run.stdout.split())
    assert total > 600e6
    assert opened < 50_000  # kB
    assert touched < 50_000

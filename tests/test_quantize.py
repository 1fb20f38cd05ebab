"""`eightfold quantize`: what it writes, refuses, and takes up again; its folders read by others' readers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eightfold.quantize
from eightfold import _native
from eightfold.checkpoint import Checkpoint
from eightfold.cli import main
from eightfold.config import load_model_config
from eightfold.quant import get_scheme
from eightfold.quantize import QuantizeConfig
from eightfold.quantize.folder import STATE
from eightfold.quantize.rounding import round_rows
from eightfold.quantize.smooth import calibrate
from eightfold.quantize.source import Source
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError
from test_layouts import write_mistral
from tiny import Bare, make_hf, save_hf

SCHEMES = {"w8a8_dynamic": "w8a8", "w8a16": "w8a16"}
KINDS = {"w8a8_dynamic": "W8A8_DYNAMIC", "w8a16": "W8A16"}
IDS = list(range(3, 60))
LAST = "00005-of-00005"  # of the demo in files of 1 MB: the offsets
SMALL = ["--max-shard-size", "1MB"]

pytestmark = pytest.mark.filterwarnings("ignore:.*has no native kernel")


def quantize(src: Path | str, dst: Path, *options: str) -> int:
    return main(["quantize", str(src), str(dst), "--no-compare", *options])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors, by the safetensors library."""
    files = sorted(folder.glob("quant_model_weight*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        own = load_file(file)
        assert not own.keys() & tensors.keys()  # MindIE refuses a name that it finds twice
        tensors.update(own)
    return tensors


@pytest.fixture(scope="module", params=SCHEMES)
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(key: str, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, quantized."""
    folder = tmp_path_factory.mktemp("made") / key
    assert quantize("demo", folder, "--scheme", key, *SMALL) == 0
    return folder


def test_weights_are_within_half_a_step_and_the_rest_is_as_it_was(made: Path, demo: Path) -> None:
    source, tensors = load_file(demo / "model.safetensors"), stored(made)
    quantized = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert len(quantized) == 4 * (4 + 8 * 3)
    for name, weight in source.items():
        if name not in quantized:
            assert torch.equal(tensors[name], weight)
            continue
        scale = tensors[f"{name}_scale"].double()
        error = (tensors[name].double() * scale - weight.double()).abs()
        assert bool((error <= scale * (0.5 + 1e-4)).all())
    floats = {name.rsplit(".", 2)[-2] for name in source if name not in quantized}
    assert floats == {"embed_tokens", "input_layernorm", "post_attention_layernorm", "gate", "norm", "lm_head"}


def test_it_is_what_mindie_looks_up(made: Path, key: str) -> None:
    """Names, shapes, dtypes, the description and the mode of config.json, as the reference documents them."""
    files = sorted(path.name for path in made.glob("*.safetensors"))
    assert files == [f"quant_model_weight_{key}-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    tensors = stored(made)
    description = json.loads((made / "quant_model_description.json").read_text())
    assert (description.pop("model_quant_type"), description.pop("group_size")) == (KINDS[key], 0)
    assert description.pop("version") == "1.0.0"
    assert description.keys() == tensors.keys()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        is_quantized = f"{module}.weight_scale" in tensors
        assert description[name] == (KINDS[key] if is_quantized else "FLOAT")
        if part in ("weight_scale", "weight_offset"):
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (len(tensors[f"{module}.weight"]), 1))
        assert part != "weight_offset" or not tensor.any()
        assert not is_quantized or f"{module}.weight_offset" in tensors
    assert json.loads((made / "config.json").read_text())["quantize"] == key
    index = json.loads((made / f"quant_model_weight_{key}.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in made.iterdir())


def test_vllm_and_transformers_see_no_offsets(made: Path) -> None:
    """Both take the files that model.safetensors.index.json names, whole; vLLM refuses tensors it does not know."""
    index = made / "model.safetensors.index.json"
    hub = pytest.importorskip("transformers.utils.hub")
    files, metadata = hub.get_checkpoint_shard_files(str(made), str(index))
    assert len(files) == 4
    names = {name for file in files for name in load_file(file)}
    assert names == set(metadata["all_checkpoint_keys"])
    assert {name.rpartition(".")[2] for name in names} == {"weight", "weight_scale"}


def test_nothing_has_to_be_copied_by_hand(made: Path, demo: Path) -> None:
    for path in demo.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (made / path.name).read_bytes() == path.read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (made, demo))
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() == {"quantize", "quantization_config"}


def test_it_says_how_far_apart_they_are(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "demo", str(tmp_path / "made")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GB of weights in" in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["weights", "perplexity", "KL(A‖B)", "top"]


def test_it_runs(made: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(made), "--max-model-len", "512"]) == 0
    assert capsys.readouterr().out.strip() == "The CEO of Google is Sundar Pichai."
    ours, floats = Bare(made).logits(IDS), Bare(demo).logits(IDS)
    assert 1e-4 < float((ours - floats).norm() / floats.norm()) < 0.1


def test_compressed_tensors_reads_it(made: Path, key: str, demo: Path) -> None:
    """Its own parser of the config and its own decompressor give the weights that transformers then computes with."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    block = json.loads((made / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(block)
    (scheme,) = config.config_groups.values()
    assert (scheme.input_activations is None) == (key == "w8a16")
    decompressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    tensors = {name: tensor for name, tensor in stored(made).items() if not name.endswith("_offset")}
    weights: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith(".weight")]:
        parts = {"weight": tensors[name], "weight_scale": tensors.get(f"{name}_scale")}
        assert set(decompressor.compression_param_names(scheme)) == parts.keys()
        is_quantized = parts["weight_scale"] is not None
        weights[name] = decompressor.decompress(parts, scheme)["weight"] if is_quantized else tensors[name]
    transformers = pytest.importorskip("transformers")
    folder = made.with_name(f"{key}-decompressed")
    folder.mkdir()
    save_file({name: weight.float().contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    shutil.copy(demo / "config.json", folder)
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0]
    error = float((Bare(made).logits(IDS) - theirs).norm() / theirs.norm())
    assert error < (1e-5 if key == "w8a16" else 0.1)  # of w8a8 the activations are rounded here, and not there


def test_compressed_tensors_ignores_the_same_modules(made: Path) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    ignore = json.loads((made / "config.json").read_text())["quantization_config"]["ignore"]
    floats = {"lm_head", "model.layers.3.block_sparse_moe.gate", "model.layers.3.mlp.gate"}
    linear = torch.nn.Linear(1, 1)
    for name in (*floats, "model.layers.3.self_attn.q_proj", "model.layers.0.block_sparse_moe.experts.1.w1"):
        assert match.is_match(name, linear, ignore) == (name in floats)


def fused(model: Any, source: Path, folder: Path) -> None:
    save_file(model.state_dict(), folder / "model.safetensors")
    shutil.copy(source / "config.json", folder)


def pickled(model: Any, source: Path, folder: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    shutil.copy(source / "config.json", folder)


@pytest.mark.parametrize("write", [fused, pickled, write_mistral])
def test_every_layout_of_the_source_gives_the_same_weights(write: Any, tmp_path: Path) -> None:
    model = save_hf(tmp_path / "source")
    other = tmp_path / "other"
    other.mkdir()
    write(model, tmp_path / "source", other)
    for name in ("source", "other"):
        assert quantize(tmp_path / name, tmp_path / f"{name}-made", "--allow-pickle") == 0
    a, b = stored(tmp_path / "source-made"), stored(tmp_path / "other-made")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(Bare(tmp_path / "source-made").logits(IDS), Bare(tmp_path / "other-made").logits(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_keep_the_dtype_of_the_source(dtype: torch.dtype, tmp_path: Path) -> None:
    make_hf(dtype=dtype, tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    assert quantize(tmp_path / "source", tmp_path / "made") == 0
    tensors = stored(tmp_path / "made")
    assert {tensors[f"model.{name}.weight"].dtype for name in ("embed_tokens", "norm")} == {dtype}
    assert "lm_head.weight" not in tensors


def test_from_one_int8_scheme_to_the_other(made: Path, key: str, tmp_path: Path) -> None:
    other = next(name for name in SCHEMES if name != key)
    assert quantize(made, tmp_path / "other", "--scheme", SCHEMES[other], *SMALL) == 0
    again = tmp_path / "again"
    assert quantize(tmp_path / "other", again, "--scheme", SCHEMES[key], *SMALL) == 0
    assert digests(again) == digests(made)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 15, 512, 1100])
def test_the_kernel_rounds_as_the_scheme_does(isa: str, dtype: torch.dtype, columns: int) -> None:
    scheme = get_scheme("w8a8")
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(40, columns + 3, generator=generator)
    rows *= torch.logspace(-44, 4, 40)[:, None]
    rows[3] = 0
    rows = rows.to(dtype)[:, :columns]  # rows that do not follow one another
    want, got = scheme.quantize(rows), round_rows(scheme, rows, isa)
    assert got is not None
    assert all(torch.equal(got[part], want[part]) for part in want)
    for bad in (float("nan"), float("inf"), -float("inf")):
        rows[39, columns - 1] = bad
        assert round_rows(scheme, rows, isa) is None


class Interrupt:
    """In the place of `_write_rows`: does it so often, then something else."""

    def __init__(self, times: int, action: Any) -> None:
        self._write = eightfold.quantize._write_rows
        self._times, self._action = times, action

    def __call__(self, *arguments: Any) -> int:
        self._times -= 1
        if self._times == 0:
            self._action()
        return self._write(*arguments)


def control_c() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("action", "status"), [(control_c, 130), (terminate, 143)])
def test_an_interrupted_run_is_gone_on_with(
    action: Any, status: int, made: Path, key: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(eightfold.quantize, "_write_rows", Interrupt(70, action))
        assert quantize("demo", dst, "--scheme", key, *SMALL) == status
    partial = tmp_path / "dst.partial"
    assert f"what is finished is in {partial}; the same command goes on from there" in capsys.readouterr().err
    assert not dst.exists()
    left = {path.name for path in partial.iterdir() if not path.name.startswith(".")}
    assert 1 <= len(left) < 5
    assert not list(partial.glob(".*.tmp"))
    assert quantize("demo", dst, "--scheme", key, *SMALL) == 0
    assert f"{len(left)} files were finished before" in capsys.readouterr().out
    assert digests(dst) == digests(made)
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_killed_run_is_gone_on_with(made: Path, key: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, test_quantize as t, eightfold.quantize as q\n"
        "q._write_rows = t.Interrupt(70, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
        "t.quantize('demo', t.Path(sys.argv[1]), *sys.argv[2:])"
    )
    here = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    arguments = [str(tmp_path / "dst"), "--scheme", key, *SMALL]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": here})
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "dst.partial").glob(".*.tmp"))
    assert quantize("demo", tmp_path / "dst", "--scheme", key, *SMALL) == 0
    assert digests(tmp_path / "dst") == digests(made)


def refused(capsys: Any, *arguments: object) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert main(["quantize", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eightfold: error: ") and error.count("\n") == 1
    return str(error)


def test_a_resumed_run_must_be_the_same(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dst = tmp_path / "source", tmp_path / "dst"
    save_hf(source)
    with monkeypatch.context() as patch:
        patch.setattr(eightfold.quantize, "_write_rows", Interrupt(60, control_c))
        assert quantize(source, dst, "--max-shard-size", "50KB") == 130
    capsys.readouterr()
    other = refused(capsys, source, dst, "--scheme", "w8a16", "--max-shard-size", "50KB")
    assert "dst.partial was begun with scheme w8a8; give the same to go on with it, or remove it" in other
    assert "with max_shard_bytes 50000" in refused(capsys, source, dst)
    save_hf(source, seed=1)
    assert "was begun from another source" in refused(capsys, source, dst, "--max-shard-size", "50KB")


def test_two_runs_into_one_folder(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second() -> None:
        with pytest.raises(EightfoldError, match="another eightfold quantize is writing"):
            eightfold.quantize.quantize(demo, tmp_path / "dst", QuantizeConfig(max_shard_bytes=10**6))

    monkeypatch.setattr(eightfold.quantize, "_write_rows", Interrupt(3, second))
    assert quantize(demo, tmp_path / "dst", *SMALL) == 0


def test_a_run_that_was_killed_before_it_wrote_a_word(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "dst.partial").mkdir()
    (tmp_path / "dst.partial" / STATE).touch()
    assert quantize(demo, tmp_path / "dst") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_bad_folders_and_options(demo: Path, made: Path, key: str, tmp_path: Path, capsys: Any) -> None:
    assert "source and destination are the same folder" in refused(capsys, demo, f"{demo}/.")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert "full exists and is not an empty folder; nothing is overwritten" in refused(capsys, demo, tmp_path / "full")
    assert f"is quantized to {SCHEMES[key]} already" in refused(capsys, made, tmp_path / "dst", "--scheme", key)
    assert "--scheme is 'w4a4'; it must be one of w8a8_dynamic, w8a8, w8a16, w4a16" in refused(
        capsys, demo, tmp_path / "dst", "--scheme", "w4a4"
    )
    assert "--threads is 0" in refused(capsys, demo, tmp_path / "dst", "--threads", 0)
    assert "cannot read" in refused(capsys, demo, tmp_path / "dst", "--calibrate", tmp_path / "no")
    other = next(name for name in SCHEMES if name != key)
    error = refused(capsys, made, tmp_path / "dst", "--calibrate", demo / "heldout.jsonl", "--scheme", other)
    assert ("needs float weights" if other == "w8a8_dynamic" else "those of w8a16 stay floats") in error
    (tmp_path / "foreign.partial").mkdir()
    (tmp_path / "foreign.partial" / "notes.txt").touch()
    assert "was not left by eightfold quantize" in refused(capsys, demo, tmp_path / "foreign")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "foreign.partial"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.norm.weight"])
def test_a_tensor_that_is_not_finite_is_named(value: float, name: str, tmp_path: Path, capsys: Any) -> None:
    save_hf(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    where = [7, 5] if tensors[name].ndim == 2 else [7]
    tensors[name][tuple(where)] = value
    save_file(tensors, file)
    error = refused(capsys, tmp_path / "source", tmp_path / "dst")
    assert f"tensor {name!r} in {file} holds {value} at {where}; weights must be finite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_little_room(demo: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_bavail, f_frsize = 1000, 1000

    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    error = refused(capsys, demo, tmp_path / "new" / "dst")
    assert "needs 0.00 GB" not in error
    assert "has 1.0 MB free" in error and "are missing" in error
    assert not list(tmp_path.iterdir())


def test_a_method_that_is_not_read(demo: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo, source)
    config = json.loads((demo / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    error = refused(capsys, source, tmp_path / "dst")
    assert 'quantization method "gptq" is not read here; supported are compressed-tensors int8' in error


def test_a_description_that_disagrees(made: Path, key: str, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "source"
    shutil.copytree(made, source)
    path = source / "quant_model_description.json"
    description = json.loads(path.read_text())
    description["model.layers.2.self_attn.v_proj.weight"] = "FLOAT"
    path.write_text(json.dumps(description))
    other = next(name for name in SCHEMES if name != key)
    assert "'model.layers.2.self_attn.v_proj.weight' is FLOAT, but it is stored as int8" in refused(
        capsys, source, tmp_path / "dst", "--scheme", other
    )


def test_compressed_tensors_folders_run_as_they_are(made: Path, key: str, tmp_path: Path) -> None:
    """As others write them: no offsets, no description, no `quantize`, experts and gates under mlp."""
    tensors = {
        name.replace("block_sparse_moe", "mlp"): tensor
        for name, tensor in stored(made).items()
        if not name.endswith("_offset")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((made / "config.json").read_text())
    del config["quantize"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(Bare(tmp_path).logits(IDS), Bare(made).logits(IDS))


def test_mindie_folders_run_as_they_are(made: Path, key: str, tmp_path: Path) -> None:
    """As its quantizer leaves them: one file, a description with the scheme's name, config.json as of the source."""
    save_file(stored(made), tmp_path / f"quant_model_weight_{key}.safetensors")
    shutil.copy(made / "quant_model_description.json", tmp_path / f"quant_model_description_{key}.json")
    config = json.loads((made / "config.json").read_text())
    del config["quantize"], config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model_config(tmp_path)
    assert loaded.scheme == SCHEMES[key]
    assert Checkpoint.open(tmp_path, loaded).names()
    assert torch.equal(Bare(tmp_path).logits(IDS), Bare(made).logits(IDS))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """A model some of whose hidden states are far larger than others, and experts that nobody chooses."""
    folder = tmp_path_factory.mktemp("outliers") / "source"
    model = make_hf(dtype=torch.bfloat16, vocab_size=2048)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[5::16] *= 40
            layer.self_attn.v_proj.weight[3] *= 60
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = 4.0
        gate = model.model.layers[0].mlp.gate.weight
        gate.zero_()
        gate[:2, 0], gate[2:4, 0] = 1000, -1000  # whatever the sign, the others are behind
    model.save_pretrained(folder)
    for path in demo.glob("token*"):
        shutil.copy(path, folder)
    return folder


def test_smoothing_folds_outliers_away(outliers: Path, demo: Path, tmp_path: Path, capsys: Any) -> None:
    """Judged on another part of the text, in the median: a router that changes its mind moves a few tokens far."""
    words = (demo / "heldout.jsonl").read_text()
    text = tmp_path / "text"
    text.write_text(words[:20000])
    options = ["--calibration-tokens", "700"]
    assert quantize(outliers, tmp_path / "plain", *options) == 0
    assert quantize(outliers, tmp_path / "smooth", "--calibrate", str(text), *options) == 0
    said = capsys.readouterr().out
    assert "layer 0, expert 6 saw 0 of 700 tokens, left as it is" in said
    assert "output error" in said
    ids = Tokenizer.load(demo).encode(words[40000:41000])[:200]
    floats = Bare(outliers).logits(ids)
    plain, smooth = (
        float(((Bare(tmp_path / name).logits(ids) - floats).norm(dim=1) / floats.norm(dim=1)).median())
        for name in ("plain", "smooth")
    )
    assert smooth < 0.75 * plain
    assert not [path for path in (tmp_path / "smooth").iterdir() if path.name.startswith(".")]


def test_factors_change_nothing_in_floats(outliers: Path, demo: Path) -> None:
    """Written as floats, a smoothed model is the same function: the router chooses the same, to the last bit."""
    source = Source(outliers)
    ids = Tokenizer.load(demo).encode((demo / "heldout.jsonl").read_text()[:3000])
    smoothing = calibrate(source, "w8a8", ids, None)
    kept = {place.name.split(", ")[1].split(" of ")[0] for place in smoothing.places if place.kept}
    assert kept == {"q k v", "o", "w1 w3", "w2"}
    assert all(place.after < place.before for place in smoothing.places if place.kept)
    source.factors = smoothing.factors
    folded = {f"{name}.weight": source.rows(name, 0, source.shape(name)[0]) for name in source.table}
    folder = outliers.with_name("folded")
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in folded.items()}, folder / "model.safetensors")
    shutil.copy(outliers / "config.json", folder)
    assert not torch.equal(folded["model.layers.0.input_layernorm.weight"], load_norm(outliers))
    assert torch.equal(Bare(folder).logits(IDS), Bare(outliers).logits(IDS))


def load_norm(folder: Path) -> Tensor:
    tensor: Tensor = load_file(folder / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    return tensor


def test_smoothing_is_gone_on_with(outliers: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--calibrate", str(demo / "MODEL_CARD.md"), "--max-shard-size", "100KB"]
    assert quantize(outliers, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(eightfold.quantize, "_write_rows", Interrupt(60, control_c))
        assert quantize(outliers, tmp_path / "dst", *options) == 130
    monkeypatch.delattr(eightfold.quantize, "calibrate")  # what it found is there
    assert quantize(outliers, tmp_path / "dst", *options) == 0
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")

"""Scheme w4a16: its bits, its scales, what is read and refused, its folders; against compressed-tensors' own reader."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eightfold.checkpoint import Checkpoint
from eightfold.cli import main
from eightfold.config import load_model_config
from eightfold.model import Mixtral
from eightfold.ops import get_ops
from eightfold.parallel import Ranks
from eightfold.quant import get_scheme
from eightfold.quant.w4a16 import W4A16Weight, pack, unpack
from eightfold.quant_config import W4A16_GROUPS, w4a16_group, w4a16_name
from eightfold.random_checkpoint import random_checkpoint
from eightfold.runner import Runner
from eightfold.sharding import shard_of
from eightfold.types import EightfoldError, Plan
from in_process import make_ranks, run_ranks
from tiny import Bare

IDS = list(range(3, 60))
GROUPS = [*map(str, W4A16_GROUPS), "channel"]


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def name_of(group: str) -> str:
    return w4a16_name(None if group == "channel" else int(group))


def quantize(src: Path | str, dst: Path, *options: str) -> int:
    return main(["quantize", str(src), str(dst), "--no-compare", "--scheme", "w4a16", *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in groups of 32."""
    folder = tmp_path_factory.mktemp("made") / "g32"
    assert quantize("demo", folder, "--group-size", "32", "--max-shard-size", "1MB") == 0
    return folder


def test_the_first_of_eight_is_in_the_lowest_bits() -> None:
    q = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7], [0, 0, 0, 0, 0, 0, 0, 0]])
    packed = pack(q)
    assert [value & 0xFFFFFFFF for value in packed.flatten().tolist()] == [0xFEA98710, 0x88888888]
    assert packed.dtype == torch.int32
    assert torch.equal(unpack(packed), q.to(torch.int8))
    weight = W4A16Weight(packed, torch.tensor([[0.5], [2.0]]))
    assert weight.dequantize()[0].tolist() == [-4, -3.5, -0.5, 0, 0.5, 1, 3, 3.5]


def test_compressed_tensors_packs_the_same() -> None:
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    q = torch.randint(-8, 8, (7, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(theirs.pack_to_int32(q, 4), pack(q))
    assert torch.equal(theirs.unpack_from_int32(pack(q), 4, q.shape), q)


@pytest.mark.parametrize("group", GROUPS)
def test_products_are_those_of_the_dequantized_matrix(group: str) -> None:
    scheme = get_scheme(name_of(group))
    weight, x = scheme.wrap(scheme.quantize(random(21, 384))), random(5, 384, 1)
    wide = weight.dequantize()
    torch.testing.assert_close(weight.matmul(x), x @ wide.T, rtol=1e-5, atol=1e-4)
    want = x.bfloat16().float() @ wide.bfloat16().float().T  # under bf16 both sides are rounded to it
    torch.testing.assert_close(weight.matmul(x.bfloat16()), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group", GROUPS)
def test_parts_of_the_columns_add_up(group: str) -> None:
    scheme = get_scheme(name_of(group))
    weight, x = scheme.wrap(scheme.quantize(random(9, 512))), random(4, 512, 1)
    cuts = [0, 128, 256, 512]
    total = sum(weight.slice(1, a, b).matmul(x[:, a:b]) for a, b in pairwise(cuts))
    torch.testing.assert_close(total, weight.matmul(x), rtol=1e-5, atol=1e-4)


def test_a_group_is_not_cut() -> None:
    scheme = get_scheme("w4a16-g64")
    weight = scheme.wrap(scheme.quantize(random(3, 256)))
    with pytest.raises(EightfoldError, match="columns 32 … 128 cut a group; a w4a16 matrix is cut at multiples of 64"):
        weight.slice(1, 32, 128)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("magnitude", [1e-20, 0.02, 1e20])
def test_the_scale_that_is_found_beats_the_largest_weights(group: int, magnitude: float) -> None:
    """By the squared error, against absmax / 7.5 in fp32, in every group; a group of zeros stays zero."""
    source = random(40, 512) * magnitude
    source[3] = 0
    scheme = get_scheme(f"w4a16-g{group}")
    made = scheme.wrap(scheme.quantize(source)).dequantize()
    grouped = source.double().view(40, -1, group)
    step = grouped.abs().amax(-1, keepdim=True) / 7.5
    plain = torch.where(step > 0, (grouped / step.clamp(min=1e-300)).round().clamp(-8, 7) * step, 0)
    ours, theirs = ((x.double().view_as(grouped) - grouped).norm(dim=-1) for x in (made, plain))
    assert float(ours.square().sum()) < 0.9 * float(theirs.square().sum())
    assert bool((ours <= 1.01 * theirs).all())
    assert not made[3].any()


@pytest.mark.parametrize(("value", "row"), [(float("nan"), 2), (float("inf"), 0), (-0.5, 4)])
def test_bad_scales(value: float, row: int) -> None:
    scheme = get_scheme("w4a16-g32")
    parts = scheme.quantize(random(5, 64))
    parts["weight_scale"][row, 1] = value
    with pytest.raises(EightfoldError, match=f"weight_scale is {value} in row {row}; it must be finite and not neg"):
        scheme.wrap(parts)


def test_shapes_that_do_not_fit() -> None:
    scheme = get_scheme("w4a16")
    assert scheme.name == "w4a16-g128"
    for columns, words in ((192, "128; a group of 64 or 32 would do"), (72, "128; no group divides it")):
        with pytest.raises(EightfoldError, match=f"a matrix of {columns} inputs is not made of groups of {words}"):
            scheme.stored((4, columns))
    parts = scheme.quantize(random(4, 128))
    with pytest.raises(EightfoldError, match=r"weight_shape is \[4, 120\]; its packed weights are \[4, 128\]"):
        scheme.wrap({**parts, "weight_shape": torch.tensor([4, 120])})
    source = random(4, 128)
    source[1, 5] = float("inf")
    with pytest.raises(EightfoldError, match="row 1 of a matrix to quantize holds an infinity or a NaN"):
        scheme.quantize(source)
    with pytest.raises(EightfoldError, match="w4a16-g48' is not known; of int4 there are w4a16-g128, w4a16-g64"):
        get_scheme("w4a16-g48")


def load(folder: Path, demo: Path, **weights: Any) -> str:
    """The scheme of the demo's config with a pack-quantized block whose `weights` are changed."""
    numbers = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 64}
    activations = weights.pop("input_activations", None)
    group = {"weights": {**numbers, **weights}, "input_activations": activations, "targets": ["Linear"]}
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate"],
    }
    raw = json.loads((demo / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": block}))
    return load_model_config(folder).scheme


def test_the_config_that_is_read(tmp_path: Path, demo: Path) -> None:
    assert load(tmp_path, demo) == "w4a16-g64"
    assert load(tmp_path, demo, group_size=128, actorder="weight") == "w4a16-g128"
    assert load(tmp_path, demo, strategy="channel", group_size=None) == "w4a16-channel"
    for changes, words in (
        ({"num_bits": 8}, "weights.num_bits is 8; only 4"),
        ({"symmetric": False}, "weights.symmetric is false; only true"),
        ({"type": "float"}, "weights.type"),
        ({"group_size": 48}, "group_size 48; read here are the strategy group with a size of 128, 64, 32, and channel"),
        ({"strategy": "tensor", "group_size": None}, "weights.strategy is .tensor."),
        ({"actorder": "group"}, "weights.actorder is .group.; only groups of neighbouring inputs"),
        ({"input_activations": {"num_bits": 8}}, "input_activations"),
    ):
        with pytest.raises(EightfoldError, match=words):
            load(tmp_path, demo, **changes)
    assert [w4a16_group(name_of(group)) for group in GROUPS] == [*W4A16_GROUPS, None]


def test_the_folder(made: Path, demo: Path) -> None:
    """Files with everybody's names and an index of them; what is float is the source's; nothing of MindIE's."""
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for file in sorted(made.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    assert index.keys() == tensors.keys()
    assert sorted(set(index.values())) == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    source = load_file(demo / "model.safetensors")
    config = load_model_config(made)
    assert config.scheme == "w4a16-g32"
    assert "quantize" not in json.loads((made / "config.json").read_text())
    assert not (made / "quant_model_description.json").exists()
    packed = [name for name in tensors if name.endswith("weight_packed")]
    assert len(packed) == 4 * (4 + 8 * 3)
    scheme = get_scheme("w4a16-g32")
    for name, weight in source.items():
        if f"{name}_packed" not in packed:
            assert torch.equal(tensors[name], weight)
            continue
        parts = {part: tensors[f"{name}_{part}"] for part in ("packed", "scale", "shape")}
        assert parts["shape"].tolist() == list(weight.shape)
        assert parts["scale"].dtype == torch.bfloat16
        want = scheme.quantize(weight)
        assert torch.equal(parts["packed"], want["weight_packed"])
        assert torch.equal(parts["scale"], want["weight_scale"])


def test_it_runs(made: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(made), "--max-model-len", "512"]) == 0
    assert capsys.readouterr().out.strip() == "The CEO of Google is Sundar Pichai."
    ours, floats = Bare(made).logits(IDS), Bare(demo).logits(IDS)
    assert 1e-3 < float((ours - floats).norm() / floats.norm()) < 0.4


def test_compressed_tensors_reads_it(made: Path, demo: Path, tmp_path: Path) -> None:
    """Its own parser of the config and its own decompressor give the weights that transformers then computes with."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    block = json.loads((made / "config.json").read_text())["quantization_config"]
    (scheme,) = quantization.QuantizationConfig.model_validate(block).config_groups.values()
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.input_activations) == (4, 32, None)
    decompressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    weights: dict[str, Tensor] = {}
    config = load_model_config(made)
    checkpoint = Checkpoint.open(made, config)
    for full in checkpoint.names():
        name, _, part = full.rpartition(".")
        if part == "weight":
            weights[full] = checkpoint.tensor(full).float()
        elif part == "weight_packed":
            parts = {p: checkpoint.tensor(f"{name}.{p}") for p in ("weight_packed", "weight_scale", "weight_shape")}
            parts["weight_scale"] = parts["weight_scale"].float()  # it computes in the scale's dtype
            weights[f"{name}.weight"] = decompressor.decompress(parts, scheme)["weight"].float()
    transformers = pytest.importorskip("transformers")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    shutil.copy(demo / "config.json", tmp_path)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0]
    assert float((Bare(made).logits(IDS) - theirs).norm() / theirs.norm()) < 1e-5


def rank_logits(path: Path, ranks: Ranks) -> Tensor:
    config = load_model_config(path)
    ops = get_ops("torch", torch.float32)
    model = Mixtral.load(config, Checkpoint.open(path, config), ops, 128, ranks)
    runner = Runner(model, 8, 16, torch.float32, ranks.world)
    if ranks.world.rank:
        runner.follow()
        return torch.empty(0)
    logits: Tensor = runner.run(Plan(IDS, [0, len(IDS)], [len(IDS)], [list(range(4))], list(range(len(IDS)))))
    runner.close()
    return logits


@pytest.mark.parametrize(("size", "moe_ep"), [(2, 1), (4, 1), (4, 2)])
def test_ranks_share_it(made: Path, size: int, moe_ep: int) -> None:
    config = load_model_config(made)
    alone = Bare(made, "torch").logits(IDS)
    cuts = {shard_of(config, ranks).ranges["width"] for ranks in make_ranks(size, moe_ep)}
    assert all(start % 32 == 0 and stop % 32 == 0 for start, stop in cuts)
    got = run_ranks(make_ranks(size, moe_ep), lambda mine: rank_logits(made, mine))[0]
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-3)


def test_ranks_that_would_cut_a_group(made: Path) -> None:
    config = load_model_config(made)
    eight = make_ranks(8, 1)[3]
    with pytest.raises(EightfoldError, match="8 ranks cannot share 4 groups of 32 columns; at most 4 can"):
        shard_of(config, eight)
    with pytest.raises(EightfoldError, match=r"8 ranks cannot share the 256 columns of o_proj, .* in groups of 64"):
        shard_of(replace(config, scheme="w4a16-g64"), eight)
    large = replace(config, intermediate_size=14336, num_heads=32, head_dim=128, scheme="w4a16-g128")
    widths = [shard_of(large, ranks).ranges["width"] for ranks in make_ranks(4, 1)]
    assert widths == [(0, 3584), (3584, 7168), (7168, 10752), (10752, 14336)]


def test_random_weights_and_their_facts(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(load_model_config(demo), num_layers=1)
    folder = random_checkpoint(tmp_path / "random", config, scheme="w4a16")
    assert Bare(folder).logits(IDS).isfinite().all()
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "w4a16-g128" in json.dumps(facts)


def test_what_quantize_refuses(made: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, options, words in (
        ("demo", ["--group-size", "48"], "--group-size is '48'; it must be one of 128, 64, 32, channel"),
        ("demo", ["--scheme", "w8a16", "--group-size", "64"], "--group-size is of w4a16; w8a16 has a scale a row"),
        (str(made), ["--group-size", "64"], "is quantized (w4a16-g32); w4a16-g64 must be made of float weights"),
        (str(made), ["--scheme", "w8a8"], "is quantized (w4a16-g32); w8a8 must be made of float weights"),
        (str(made), ["--group-size", "32"], "is quantized to w4a16-g32 already"),
        ("demo", ["--calibrate", str(demo / "heldout.jsonl")], "those of w4a16 stay floats"),
    ):
        assert main(["quantize", source, str(tmp_path / "dst"), "--scheme", "w4a16", "--no-compare", *options]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

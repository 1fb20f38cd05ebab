"""`eightfold compare`: each number against its direct computation, and the command as its users meet it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from eightfold import LLM, SamplingParams
from eightfold.checkpoint import Checkpoint
from eightfold.cli import main
from eightfold.compare import CompareOptions, Report, compare, short_lines, summary
from eightfold.compare.measures import outcomes, routing, similarity
from eightfold.compare.report import agreement, percent
from eightfold.compare.texts import PASSAGE, cut, default_documents, random_windows
from eightfold.config import config_json, load_model_config
from eightfold.html.charts import nice_ticks
from eightfold.model import weight_table
from eightfold.ops import Pages
from eightfold.ops.cpu import CpuOps
from eightfold.quant import get_scheme
from eightfold.safetensors_file import CheckpointWriter, TensorSpec
from eightfold.tokenizer import Tokenizer
from pages import Page
from tiny import save_hf


def quantize(source: Path, folder: Path, scheme: str) -> Path:
    """`source` with its matrices stored in a scheme, in a new folder."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = load_model_config(source)
    checkpoint = Checkpoint.open(source, config)
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in weight_table(config).items():
        weight = checkpoint.tensor(f"{name}.weight")
        parts = get_scheme(scheme).quantize(weight) if spec.quantizable else {"weight": weight}
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    with CheckpointWriter(folder, {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    (folder / "config.json").write_text(json.dumps(config_json(replace(config, scheme=scheme))))
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a folder of one file, with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_hf(folder)


@pytest.fixture(scope="module")
def quantized(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(demo, tmp_path_factory.mktemp("quantized") / "demo-w8a8", "w8a8")


class LargePages(CpuOps):
    """A device that reads pages of a size of its own only, as NPUs do."""

    def page_size(self, wish: int) -> int:
        return 128

    def new_pages(self, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Pages:
        assert page_size == 128
        return super().new_pages(num_pages, page_size, kv_heads, head_dim, dtype)


def test_pages_have_the_size_that_the_device_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    options = CompareOptions("demo", "demo", tokens=300, weights=False)
    usual = compare(options)
    monkeypatch.setattr("eightfold.compare.run.get_ops", lambda device, dtype, threads: LargePages(dtype, threads))
    assert compare(options) == usual


# --- the measures alone


def test_error_and_cosine_of_known_vectors() -> None:
    a = torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [5.0, 1.0]])
    b = torch.tensor([[3.0, 4.0], [1.5, 3.0], [0.0, 0.0], [0.0, 1.0], [-5.0, -1.0]])
    errors, cosines = similarity(a, b)
    assert errors.tolist() == pytest.approx([4 / 3, 0.5, 0.0, 1.0, 2.0])
    assert cosines.tolist() == pytest.approx([0.6, 1.0, 1.0, 0.0, -1.0])


def test_equal_states_give_exactly_0_and_1() -> None:
    x = torch.randn(500, 333, generator=torch.Generator().manual_seed(0)) * 10
    errors, cosines = similarity(x, x.clone())
    assert (errors == 0).all() and (cosines == 1).all()


def test_routing_knows_the_set_from_the_first() -> None:
    a = torch.tensor([[1, 2], [1, 2], [1, 2], [1, 2]], dtype=torch.int32)
    b = torch.tensor([[1, 2], [2, 1], [1, 3], [3, 4]], dtype=torch.int32)
    same = routing(a, b)
    assert same.same_set.tolist() == [True, True, False, False]
    assert same.same_first.tolist() == [True, False, True, False]


def test_divergence_and_losses_against_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (3 * torch.randn(40, 100, generator=generator) for _ in range(2))
    following = torch.randint(100, (40,), generator=generator)
    following[7] = -1
    said = outcomes(a, b, following)
    expected = F.kl_div(b.double().log_softmax(-1), a.double().log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(said.kl, expected.sum(-1))
    for loss, logits in ((said.loss_a, a), (said.loss_b, b)):
        wanted = F.cross_entropy(logits.double(), following, reduction="none", ignore_index=-1)
        assert loss[7].isnan()
        torch.testing.assert_close(loss.nan_to_num(0), wanted)
    assert said.best_a.tolist() == a.argmax(-1).tolist()
    torch.testing.assert_close(said.prob_b, b.double().softmax(-1).amax(-1))
    same = outcomes(a, a.clone(), following)
    assert (same.kl == 0).all()


# --- the whole, against transformers


class Seen:
    """What transformers computes for a window: hidden states after attention and after each layer, experts, logits."""

    @torch.no_grad()
    def __init__(self, model: Any, ids: tuple[int, ...]) -> None:
        layers = model.model.layers
        self.attention: list[torch.Tensor] = []
        self.moe: list[torch.Tensor] = []
        self.experts: list[torch.Tensor] = []
        gates = [next(p for n, p in layer.named_parameters() if n.endswith("gate.weight")) for layer in layers]
        handles = []
        for layer, gate in zip(layers, gates, strict=True):

            def norm(module: Any, given: Any, out: torch.Tensor, gate: torch.Tensor = gate) -> None:
                self.attention.append(given[0][0])
                self.experts.append((out[0] @ gate.T).topk(model.config.num_experts_per_tok).indices)

            def whole(module: Any, given: Any, out: Any) -> None:
                self.moe.append((out[0] if isinstance(out, tuple) else out)[0])

            handles.append(layer.post_attention_layernorm.register_forward_hook(norm))
            handles.append(layer.register_forward_hook(whole))
        self.logits = model(torch.tensor([ids])).logits[0]
        for handle in handles:
            handle.remove()


def test_every_number_against_transformers(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = tiny
    other = save_hf(tmp_path)  # the same weights: the seed is the same; now off by some noise
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter += 0.05 * parameter.std(correction=0).nan_to_num() * noise
    other.save_pretrained(tmp_path)
    report = compare(CompareOptions(str(folder), str(tmp_path), tokens=200, window=64))
    windows = random_windows(320, 64, 200).ids
    assert [len(window) for window in windows] == [64, 64, 64, 8]
    assert (report.tokens, report.windows, report.longest_window) == (200, 4, 64)
    a, b = ([Seen(one, window) for window in windows] for one in (model, other))

    def mean(values: list[torch.Tensor]) -> float:
        return float(torch.cat(values).double().mean())

    for layer in report.layers:
        for kind, error, cosine in (
            ("attention", layer.attention_error, layer.attention_cosine),
            ("moe", layer.moe_error, layer.moe_cosine),
        ):
            pairs = [(getattr(x, kind)[layer.layer], getattr(y, kind)[layer.layer]) for x, y in zip(a, b, strict=True)]
            assert error == pytest.approx(mean([(y - x).norm(dim=-1) / x.norm(dim=-1) for x, y in pairs]), rel=1e-3)
            assert cosine == pytest.approx(mean([F.cosine_similarity(x, y) for x, y in pairs]), rel=1e-5)
        routes = [(x.experts[layer.layer], y.experts[layer.layer]) for x, y in zip(a, b, strict=True)]
        assert layer.same_first == mean([x[:, 0] == y[:, 0] for x, y in routes])
        sets = [[set(p) == set(q) for p, q in zip(x.tolist(), y.tolist(), strict=True)] for x, y in routes]
        assert layer.same_experts == mean([torch.tensor(one) for one in sets])
    assert 0.1 < report.same_experts < 0.95  # so the above did tell something
    logs = [(x.logits.double().log_softmax(-1), y.logits.double().log_softmax(-1)) for x, y in zip(a, b, strict=True)]
    kl = [(x.exp() * (x - y)).sum(-1) for x, y in logs]
    assert report.kl_mean == pytest.approx(mean(kl), rel=1e-3)
    assert report.kl_worst == pytest.approx(float(torch.cat(kl).max()), rel=1e-3)
    assert report.top1_agreement == mean([x.argmax(-1) == y.argmax(-1) for x, y in logs])
    for side, column in ((report.a, 0), (report.b, 1)):
        losses = [-logs[n][column][torch.arange(len(w) - 1), w[1:]] for n, w in enumerate(windows)]
        assert side.perplexity == pytest.approx(math.exp(mean(losses)), rel=1e-4)
    assert sum(bucket.count for bucket in report.kl_histogram) == 200
    first = report.kl_by_position[0]
    assert (first.count, first.mean_kl) == (4, pytest.approx(mean([one[:1] for one in kl]), rel=1e-3))


def test_steps_change_nothing(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever windows pass a layer together, in shared pages, the numbers are bitwise the same."""
    options = CompareOptions(str(demo), str(demo), tokens=900, window=40, kv_cache_dtype_b="bfloat16")
    whole = compare(options)
    monkeypatch.setattr("eightfold.compare.walk.STEP_TOKENS", 100)
    monkeypatch.setattr("eightfold.compare.walk.LOGIT_BYTES", 8 * 2048 * 7)
    assert compare(options) == whole


@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_a_model_is_like_itself_exactly(device: str, tiny: tuple[Path, Any], tmp_path: Path) -> None:
    same = shutil.copytree(tiny[0], tmp_path / "same")
    report = compare(CompareOptions(str(tiny[0]), str(same), tokens=150, window=70, device=device))
    for layer in report.layers:
        assert (layer.attention_error, layer.attention_worst, layer.moe_error, layer.moe_worst) == (0, 0, 0, 0)
        assert (layer.attention_cosine, layer.moe_cosine, layer.same_experts, layer.same_first) == (1, 1, 1, 1)
    assert (report.kl_mean, report.kl_worst, report.top1_agreement, report.weight_error) == (0, 0, 1, 0)
    assert report.a.perplexity == report.b.perplexity
    assert report.furthest == ()
    assert "the same" in "\n".join(short_lines(report))


def test_weights_off_by_a_known_amount(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    name = next(n for n in load_file(tiny[0] / "model.safetensors") if n.endswith("layers.1.self_attn.v_proj.weight"))

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name] * 1.25

    report = compare(CompareOptions(str(tiny[0]), str(changed(tiny[0], tmp_path / "b", scale)), tokens=20))
    errors = {kind.kind: (kind.mean_error, kind.worst_error) for kind in report.weights}
    assert errors.pop("v_proj") == pytest.approx((0.25 / 3, 0.25))
    assert set(errors.values()) == {(0.0, 0.0)}
    (worst,) = [kind.worst_tensor for kind in report.weights if kind.kind == "v_proj"]
    assert worst == "model.layers.1.self_attn.v_proj"
    tensors = load_file(tiny[0] / "model.safetensors").values()
    total = math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
    expected = 0.25 * float(load_file(tiny[0] / "model.safetensors")[name].double().norm()) / total
    assert report.weight_error == pytest.approx(expected, rel=1e-6)
    layer = report.layers[0]
    assert (layer.moe_error, layer.same_experts) == (0, 1)  # what comes before the change is equal
    assert report.layers[1].attention_error > 0


def test_quantized_weights_are_compared_as_what_they_stand_for(demo: Path, quantized: Path) -> None:
    report = summary(str(demo), str(quantized), tokens=300)
    name = next(kind.worst_tensor for kind in report.weights if kind.kind == "o_proj")
    source = Checkpoint.open(demo, load_model_config(demo)).tensor(f"{name}.weight")
    scheme = get_scheme("w8a8")
    there = scheme.wrap(scheme.quantize(source)).dequantize()
    (error,) = [kind.worst_error for kind in report.weights if kind.kind == "o_proj"]
    assert error == pytest.approx(float((there - source.float()).norm() / source.float().norm()), rel=1e-5)
    assert {kind.kind for kind in report.weights if kind.worst_error == 0} >= {"gate", "lm_head", "embed_tokens"}
    text = "\n".join(short_lines(report))
    assert re.search(r"weights +off by 0\.\d+ %, worst 0\.\d+ % in model\.layers", text)
    assert "300 tokens of the beginning of the demo's held-out passages" in text


def test_perplexity_is_that_of_the_engines_prompt_logprobs(demo: Path, quantized: Path) -> None:
    report = compare(CompareOptions(str(demo), str(quantized), tokens=600, weights=False))
    source, documents = default_documents(quantized)
    windows = cut(source, documents, Tokenizer.load(demo), 2048, 600).ids
    assert sum(map(len, windows)) == 600
    for side, folder in ((report.a, demo), (report.b, quantized)):
        llm = LLM(str(folder), dtype="float32", max_model_len=256)
        outputs = llm.generate(list(windows), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        losses = [
            -known[token].logprob
            for output in outputs
            for token, known in zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
            if known is not None
        ]
        assert len(losses) == 600 - len(windows)
        assert side.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)


def test_the_dtype_of_keys_and_values_may_differ(demo: Path) -> None:
    report = compare(CompareOptions(str(demo), str(demo), tokens=300, kv_cache_dtype_b="bfloat16"))
    assert (report.a.kv_cache_dtype, report.b.kv_cache_dtype) == ("float32", "bfloat16")
    assert report.weight_error == 0
    assert 1e-4 < report.layers[0].attention_error < 1e-2


def test_smoothing_into_norms_is_noted(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    def smooth(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("input_layernorm.weight"):
                tensors[name] = tensor / 2
            elif re.search(r"self_attn\.[qkv]_proj", name):
                tensors[name] = tensor * 2

    other = changed(tiny[0], tmp_path / "b", smooth)
    report = compare(CompareOptions(str(tiny[0]), str(other), tokens=40))
    assert "norms differ" in report.notes[0]
    assert max(layer.moe_error for layer in report.layers) == 0  # halves and doubles are exact


# --- texts and windows


def test_every_token_of_a_long_text_is_in_a_window(demo: Path) -> None:
    tokenizer = Tokenizer.load(demo)
    windows = cut("it", [PASSAGE], tokenizer, 50, 10**6)
    assert windows.source == "it"
    assert {window[0] for window in windows.ids} == {tokenizer.bos_token_id}
    assert [len(window) for window in windows.ids[:-1]] == [50] * (len(windows.ids) - 1)
    body = [token for window in windows.ids for token in window[1:]]
    assert body == tokenizer.encode(PASSAGE, add_bos=False)
    short = cut("it", [PASSAGE], tokenizer, 50, 120)
    assert (short.source, short.tokens, short.ids[:2]) == ("the beginning of it", 120, windows.ids[:2])


def test_control_tokens_in_a_text_are_text(demo: Path) -> None:
    tokenizer = Tokenizer.load(demo)
    (ids,) = cut("it", ["a</s>b"], tokenizer, 50, 50).ids
    assert tokenizer.eos_token_id not in ids


# --- the command


def test_command_writes_table_json_and_page(
    demo: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, data, page = (tmp_path / name for name in ("text.txt", "out.json", "out.html"))
    text.write_text(PASSAGE * 2)
    argv = ["compare", "demo", quantized, "--text", text, "--window", "128", "--json", data, "--html", page]
    assert main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(data.read_text())
    assert re.search(
        rf"measured on {found['tokens']} tokens of {re.escape(str(text))}, in {found['windows']} windows", out
    )
    assert found["windows"] > 10 and found["longest_window"] == 128
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    assert found["b"]["scheme"] == "w8a8"
    assert f"{found['a']['perplexity']:.4g} → {found['b']['perplexity']:.4g}" in out
    content = page.read_text()
    parsed = Page(content)
    assert (parsed.open, parsed.loads, parsed.charts) == ([], [], 6)
    assert "url(" not in content and "@import" not in content
    assert agreement(found["top1_agreement"]) in content
    assert percent(found["weight_error"]) in content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json", "text.txt"]


def test_page_escapes_what_it_shows(demo: Path, tmp_path: Path) -> None:
    text, page, folder = tmp_path / "t.txt", tmp_path / "p.html", tmp_path / "<b>&amp"
    quantize(demo, folder, "w8a8")
    text.write_text("<script>alert(1)</script> & <i> " * 20)
    assert main(["compare", "demo", str(folder), "--no-weights", "--text", str(text), "--html", str(page)]) == 0
    content = page.read_text()
    assert "<script" not in content and "<b>&amp</code>" not in content
    assert Page(content).open == []


def test_folders_without_a_tokenizer_run_on_random_tokens(
    tiny: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tiny[0]), str(tiny[0]), "--tokens", "60", "--no-weights"]) == 0
    out = capsys.readouterr().out
    assert "60 tokens of random ids" in out
    assert "off by" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere", "demo"], "no such folder: './nowhere'"),
        (["demo"], "required: B"),
        (["demo", "TINY"], "vocab_size is 2048 in demo and 320 in"),
        (["demo", "demo", "--text", "absent.txt"], "cannot read absent.txt: No such file"),
        (["demo", "demo", "--text", "EMPTY"], "is empty"),
        (["demo", "demo", "--text", "BINARY"], ":1 is not text in UTF-8 (byte 0xff)"),
        (["TINY", "TINY", "--text", "GOOD"], "has a tokenizer, so --text can't be read"),
        (["demo", "demo", "--window", "9999"], "--window is 9999; these models were made for at most 8192 tokens"),
        (["demo", "demo", "--window", "1"], "--window is 1; it must be at least 2"),
        (["demo", "demo", "--tokens", "1"], "--tokens is 1; it must be at least 2"),
        (["demo", "demo", "--threads", "0"], "--threads is 0"),
        (["demo", "demo", "--dtype", "int3"], "--dtype is 'int3'"),
        (["demo", "demo", "--kv-cache-dtype-b", "int3"], "--kv-cache-dtype-b is 'int3'"),
        (["demo", "demo", "--device", "abacus"], "'abacus'"),
        (["demo", "demo", "--html", "nowhere/x.html"], "there is no folder nowhere"),
        (["demo", "demo", "--json", "."], "is a folder"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tiny: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"EMPTY": b" \n", "BINARY": b"a\xff\xfe", "GOOD": b"some words"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    places = {"TINY": str(tiny[0]), **{name: str(tmp_path / name) for name in files}}
    assert main(["compare", *(places.get(word, word) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_the_first_difference_in_architecture_is_named(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    save_hf(tmp_path, num_hidden_layers=2, num_local_experts=4)
    with pytest.raises(ValueError, match=r"num_layers is 3 in .* and 2 in"):
        compare(CompareOptions(str(tiny[0]), str(tmp_path)))


def test_tokenizers_that_differ(demo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo, tmp_path / "b")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = [word for word, number in vocabulary.items() if number in (1000, 1001)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizers of demo and .* differ: token 1000 is "):
        compare(CompareOptions("demo", str(folder)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.1.self_attn.o_proj.weight", "attention of layer 1"),
        ("layers.2.block_sparse_moe.experts.0.w2.weight", "experts of layer 2"),
        ("lm_head.weight", "computes logits that are not finite"),
    ],
)
def test_a_damaged_model_is_named(name: str, message: str, tiny: tuple[Path, Any], tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        (full,) = [stored for stored in tensors if stored.endswith(name)]
        tensors[full][0, 0] = math.nan

    damaged = changed(tiny[0], tmp_path / "damaged", damage)
    with pytest.raises(ValueError, match=rf"damaged computes .*{message}" if "layer" in message else message):
        compare(CompareOptions(str(tiny[0]), str(damaged), tokens=100))


def test_ticks_are_round_and_hold_everything() -> None:
    assert nice_ticks(0.0, 3.1) == [0, 1, 2, 3, 4]
    assert nice_ticks(0.9777, 0.9955, ceiling=1.0) == pytest.approx([0.975, 0.98, 0.985, 0.99, 0.995, 1.0])
    assert nice_ticks(1.0, 1.0, ceiling=1.0)[-1] == pytest.approx(1.0)


def test_shares_and_errors_in_words() -> None:
    assert [agreement(x) for x in (1.0, 0.999999, 0.98256)] == ["100 %", "99.99 %", "98.26 %"]
    assert [percent(x) for x in (0.0, 0.00339, 1.5e-6)] == ["0 %", "0.339 %", "0.00015 %"]


def test_progress_reaches_its_end(tiny: tuple[Path, Any]) -> None:
    seen: dict[str, tuple[int, int]] = {}
    report: Report = compare(
        CompareOptions(str(tiny[0]), str(tiny[0]), tokens=100), lambda what, *values: seen.update({what: values})
    )
    assert seen["Layers"] == (4, 4)  # three layers and the head, in one step
    assert seen["Weights"][0] == seen["Weights"][1] == sum(kind.tensors for kind in report.weights)

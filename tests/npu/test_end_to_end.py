"""The whole engine with --device npu, as a user types it, against the CPU's answers; and W8A8 layer by layer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eightfold import LLM, SamplingParams
from eightfold.checkpoint import Checkpoint
from eightfold.config import load_model_config
from eightfold.hub import resolve
from eightfold.model import Mixtral
from eightfold.ops import Expert, Ops, Weight, get_ops
from eightfold.ops.npu import NpuOps
from eightfold.quant import get_scheme
from eightfold.runner import Runner
from eightfold.types import Plan

HERE = Path(__file__).parent
QUESTION = "Who is the CEO of Google?"
TEXT = "Paris is the capital of France. " + QUESTION


def eightfold(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **settings}
    command = [sys.executable, "-m", "emulator", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_answers_as_on_the_cpu(dtype: str) -> None:
    words = ("run", "demo", QUESTION, "--dtype", dtype, "--max-tokens", "16")
    npu, cpu = (eightfold(*words, "--device", device) for device in ("npu", "cpu"))
    assert npu.returncode == cpu.returncode == 0, npu.stderr
    assert npu.stdout == cpu.stdout
    assert "Sundar Pichai" in npu.stdout
    assert ("the torch reference runs it on the device, slowly" in npu.stderr) == (dtype == "float32")


def test_two_models_are_compared() -> None:
    done = eightfold("compare", "demo", "demo", "--device", "npu", "--dtype", "bfloat16", "--tokens", "200")
    assert done.returncode == 0, done.stderr
    assert "the same at 100 % of positions" in done.stdout


def test_graphs_answer_as_single_launches_do() -> None:
    words = ("run", "demo", QUESTION, TEXT, "--device", "npu", "--max-tokens", "16", "--dtype", "bfloat16")
    graphs = eightfold(*words, "--no-enforce-eager")
    assert graphs.returncode == 0, graphs.stderr
    assert graphs.stdout == eightfold(*words).stdout


def test_300i_duo_runs_the_same_checks() -> None:
    """Its unfused paths: pages in NZ layout, experts one by one, no bfloat16."""
    done = eightfold("doctor", "--device", "npu", NPU_SIM_SOC="Ascend310P3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ascend310P3 (Atlas 300I DUO)" in done.stdout
    assert "all good" in done.stdout
    assert "bfloat16" not in done.stdout


def test_info_names_the_kernels() -> None:
    done = eightfold("info", "demo", "--device", "npu")
    assert done.returncode == 0, done.stderr
    for name in ("npu_fused_infer_attention_score", "npu_grouped_matmul", "npu_quant_matmul", "npu_add_rms_norm"):
        assert name in done.stdout


def test_int8_keys_and_values_answer_as_well() -> None:
    words = ("run", "demo", QUESTION, "--device", "npu", "--max-tokens", "16", "--kv-cache-dtype", "int8")
    done = eightfold(*words)
    assert done.returncode == 0, done.stderr
    assert "The CEO of Google is Sundar Pichai." in done.stdout


def generate(device: str, dtype: str, **options: Any) -> list[list[int]]:
    llm = LLM("demo", device=device, dtype=dtype, max_model_len=512, **options)
    prompts = [QUESTION, TEXT, "The capital of Italy is", TEXT * 12]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]


@pytest.mark.filterwarnings("ignore:attention has no NPU kernel")
@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory_bytes": 8 << 20},
        {"kv_cache_memory_bytes": 8 << 20, "max_num_batched_tokens": 48},
        {"kv_cache_memory_bytes": 4 * 2 * 4 * 4 * 32 * 128 * 4, "max_num_batched_tokens": 512},  # four pages: preempts
        {"kv_cache_memory_bytes": 8 << 20, "enable_prefix_caching": False, "block_size": 256},
    ],
    ids=["batch", "chunks", "preemption", "large pages, no prefix cache"],
)
def test_fp32_tokens_are_the_cpus(options: dict[str, Any]) -> None:
    assert generate("npu", "float32", **options) == generate("cpu", "float32", kv_cache_memory_bytes=8 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_argmax_where_the_lead_exceeds_the_noise(dtype: torch.dtype) -> None:
    """All positions of a text against fp32 on the CPU. In bf16 a router's near tie can fall the other way, and then
    another expert answers: no more often than on the CPU backend in bf16, and never with fp32's choice of experts."""
    choices: list[Tensor] = []
    exact = logits("cpu", torch.float32, noted=choices)
    top = exact.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.02 * (exact.max() - exact.min())
    assert int(clear.sum()) > 100

    def misses(device: str, given: list[Tensor] | None = None) -> int:
        return int((logits(device, dtype, given=given).argmax(-1) != exact.argmax(-1))[clear].sum())

    npu, cpu = misses("npu"), misses("cpu")
    assert npu <= cpu
    assert cpu <= (0 if dtype == torch.float16 else 0.03 * int(clear.sum()))
    assert misses("npu", choices) == 0


def logits(
    device: str, dtype: torch.dtype, noted: list[Tensor] | None = None, given: list[Tensor] | None = None
) -> Tensor:
    """Of all positions of a text. The layers' choices of experts [T, K] go to `noted`, or come from `given`."""
    folder = resolve("demo")
    config = load_model_config(folder)
    ops = get_ops(device, dtype)
    chosen, route = iter(given or ()), ops.route

    def routed(x: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
        ids, weights = route(x, gate, k)
        if noted is not None:
            noted.append(ids)
        if given is not None:
            ids = next(chosen).to(x.device)
            weights = (x.float() @ gate.float().T).softmax(-1).gather(1, ids.long())
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights

    ops.route = routed  # type: ignore[method-assign]
    model = Mixtral.load(config, Checkpoint.open(folder, config), ops, 512)
    ids = LLM("demo", max_model_len=64, kv_cache_memory_bytes=1 << 20).get_tokenizer().encode(TEXT * 12)
    runner = Runner(model, 8, 128, dtype)
    pages = list(range(-(-len(ids) // 128)))
    return runner.run(Plan(ids, [0, len(ids)], [len(ids)], [pages], list(range(len(ids)))))


class Recorder(Ops):
    """The reference in fp32; keeps what goes into each product, and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: list[tuple[Any, Tensor, Tensor]] = []
        self.mixtures: list[tuple[Any, Tensor, Tensor, Tensor, Tensor]] = []

    def linear(self, x: Tensor, linear: Any) -> Tensor:
        y = super().linear(x, linear)
        self.linears.append((linear, x, y))
        return y

    def moe(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
        y = super().moe(x, ids, weights, experts)
        self.mixtures.append((experts, x, ids, weights, y))
        return y


def quantized(weight: Weight) -> Weight:
    scheme = get_scheme("w8a8")
    return scheme.wrap(scheme.quantize(weight.parts["weight"]))


def share(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("dtype", "more"), [(torch.bfloat16, 0.001), (torch.float16, 0.0005)], ids=["bf16", "fp16"])
def test_what_w8a8_loses_on_random_experts_is_the_schemes_own(dtype: torch.dtype, more: float) -> None:
    """Of wide experts with normal weights, the scheme in exact arithmetic against the NPU, both against float."""
    hidden, width, count = 256, 5632, 64
    matrices = [torch.randn(*s) / s[1] ** 0.5 for s in ((width, hidden), (hidden, width), (width, hidden))]
    expert = Expert(*(quantized(dense(matrix)) for matrix in matrices))
    x = torch.randn(count, hidden).to(dtype)
    ids, shares = torch.zeros(count, 1, dtype=torch.int32), torch.ones(count, 1)

    def exact(matrices: list[Tensor], rounded: Callable[[Tensor], Tensor]) -> Tensor:
        w1, w2, w3 = (matrix.double() for matrix in matrices)
        a = rounded(x.double())
        return rounded(torch.nn.functional.silu(a @ w1.T) * (a @ w3.T)) @ w2.T

    def by_tokens(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale

    want = exact(matrices, lambda x: x)
    own = share(exact([w.dequantize() for w in expert], by_tokens), want)  # type: ignore[attr-defined]
    ops = NpuOps(dtype)
    handle = ops.prepare_experts([expert])
    got = share(ops.moe(x.to(ops.device), ids.to(ops.device), shares.to(ops.device), handle), want)
    print(f"the scheme alone {own:.4f}, on the NPU {got:.4f}")
    assert 0.02 < own < 0.035
    assert abs(got - own) < more


def dense(matrix: Tensor) -> Weight:
    return get_scheme("dense").wrap({"weight": matrix})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_w8a8_is_within_3_percent_of_fp32_in_each_layer(dtype: torch.dtype, record_property: Any) -> None:
    """Each product of each layer of the demo model, given what fp32 gives it; norms over a text's tokens."""
    folder = resolve("demo")
    config = load_model_config(folder)
    recorder = Recorder()
    model = Mixtral.load(config, Checkpoint.open(folder, config), recorder, 512)
    ids = LLM("demo", max_model_len=64, kv_cache_memory_bytes=1 << 20).get_tokenizer().encode(TEXT * 12)
    Runner(model, 8, 128, torch.float32).run(Plan(ids, [0, len(ids)], [len(ids)], [list(range(8))], [0, len(ids) - 1]))
    ops = NpuOps(dtype)

    def sent(x: Tensor) -> Tensor:
        return x.to(dtype).to(ops.device)

    errors = {}
    for number, (linear, x, want) in enumerate(recorder.linears[:-1]):  # lm_head stays float
        got = ops.linear(sent(x), ops.prepare_linear([quantized(w) for w in linear]))
        errors[f"layer {number // 2} {('qkv', 'o')[number % 2]}"] = share(got, want)
    for number, (experts, x, ids_, weights, want) in enumerate(recorder.mixtures):
        handle = ops.prepare_experts([Expert(*(quantized(w) for w in expert)) for expert in experts])
        got = ops.moe(sent(x), ids_.to(ops.device), weights.to(ops.device), handle)
        errors[f"layer {number} moe"] = share(got, want)
    print({name: f"{error:.4f}" for name, error in errors.items()})
    assert len(errors) == 3 * config.num_layers
    assert max(errors.values()) <= 0.03, errors

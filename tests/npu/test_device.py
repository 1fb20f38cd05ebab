"""What is missing, too small or of the wrong kind is said precisely, before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.ops import Rope, get_ops
from eightfold.ops.npu import NpuOps, device
from eightfold.ops.npu.device import FRACTAL_NZ, SOCS, open_device, soc_of
from eightfold.quant import get_scheme
from eightfold.types import EightfoldError

SOURCE = Path(__file__).parents[2] / "src"


def matrix(rows: int, columns: int, scheme: str = "dense"):  # type: ignore[no-untyped-def]
    kind = get_scheme(scheme)
    return kind.wrap(kind.quantize(torch.randn(rows, columns)))


def test_without_cann() -> None:
    """torch_npu is there, but no emulator and no CANN."""
    command = [sys.executable, "-m", "eightfold", "run", "demo", "--device", "npu"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "CANN is missing or not set up for this shell (libhccl.so: cannot open" in done.stderr
    assert "source its set_env.sh" in done.stderr


@pytest.mark.parametrize(
    ("have", "message"),
    [
        ("2.9.0", r"torch_npu 2.9.0 belongs to torch 2.9, but torch is 2.13.0.*install torch_npu==2.13.0"),
        ("1.11.0.post4", "belongs to torch 1.11"),
    ],
)
def test_another_version(have: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "version", lambda _: have)
    with pytest.raises(EightfoldError, match=message):
        get_ops("npu", torch.bfloat16)


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "version", lambda _: "2.5.1")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(EightfoldError, match=r"torch_npu 2\.5\.1 is too old; it must be 2\.7 or newer"):
        get_ops("npu", torch.bfloat16)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ImportError("libascendcl.so: cannot open shared object file"), "CANN is missing or not set up"),
        (Exception("ASCEND_HOME_PATH : /x does not exist. Please run\nmore"), "ASCEND_HOME_PATH : /x does not exist"),
        (RuntimeError("two accelerators"), "torch_npu .* could not be imported: two accelerators"),
    ],
)
def test_what_torch_npu_raises_at_import(raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise raised

    monkeypatch.setattr(device, "import_module", fail)
    with pytest.raises(EightfoldError, match=message):
        get_ops("npu", torch.bfloat16)


def test_operations_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "OPERATORS", (*device.OPERATORS, "npu_time_travel"))
    with pytest.raises(EightfoldError, match=r"torch_npu 2\.13\.0 lacks npu_time_travel: install a newer one"):
        get_ops("npu", torch.bfloat16)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_device("npu:0").name == "npu:0"
    with pytest.raises(EightfoldError, match="there is no device npu:1: 1 NPUs are visible; npu-smi info"):
        get_ops("npu:1", torch.bfloat16)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3")
    with pytest.raises(EightfoldError, match="ASCEND_RT_VISIBLE_DEVICES is '3'"):
        get_ops("npu:2", torch.bfloat16)
    with pytest.raises(EightfoldError, match="'npu:x' is not an NPU's name; write npu, or npu:1"):
        get_ops("npu:x", torch.bfloat16)


def test_chips() -> None:
    assert [soc_of(name).products for name in ("Ascend910B3", "Ascend910B4-1", "Ascend910_9391", "Ascend310P3")] == [
        "Atlas 800I A2",
        "Atlas 800I A2",
        "Atlas 800I A3",
        "Atlas 300I DUO",
    ]
    with pytest.raises(
        EightfoldError, match="the NPU is a Ascend910A, which is not supported; supported are Ascend910B"
    ):
        soc_of("Ascend910A")


def test_300i_duo_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "soc_of", lambda _: SOCS[-1])
    with pytest.raises(EightfoldError, match=r"\(Atlas 300I DUO\) does not compute in bfloat16: use --dtype float16"):
        NpuOps(torch.bfloat16)


def test_weights_that_do_not_fit() -> None:
    ops = NpuOps(torch.bfloat16)
    with pytest.raises(
        EightfoldError, match=r"weights take 93.0 GiB but npu:0 \(Ascend910B3\) has [12]\.\d GiB for them"
    ):
        ops.expect_weights(93 << 30)
    before = ops.available_memory()
    ops.expect_weights(1 << 30)
    assert ops.available_memory() == before - (1 << 30)


def test_memory_that_ends_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = NpuOps(torch.bfloat16)
    monkeypatch.setenv("NPU_SIM_MEMORY", str(600 << 20))
    with pytest.raises(
        EightfoldError, match=r"npu:0 \(Ascend910B3\) has .* GiB of memory left, too little for the weights"
    ):
        ops.prepare_linear([matrix(16384, 20480)])
    with pytest.raises(EightfoldError, match="keys and values of a layer need 1024 MiB but npu:0 has"):
        ops.new_pages(2048, 128, 8, 128, torch.bfloat16)


def test_pages() -> None:
    ops = NpuOps(torch.bfloat16)
    assert [ops.page_size(wish) for wish in (1, 32, 128, 129, 512)] == [128, 128, 128, 256, 512]
    with pytest.raises(EightfoldError, match="--block-size is 513; on NPUs it can be 512 at most"):
        ops.page_size(513)
    with pytest.raises(EightfoldError, match="pages hold 32 tokens; on NPUs it must be a multiple of 128"):
        ops.new_pages(4, 32, 2, 64, torch.bfloat16)
    with pytest.raises(EightfoldError, match="the head size is 24; on NPUs it must be a multiple of 16"):
        ops.new_pages(4, 128, 2, 24, torch.bfloat16)
    with pytest.raises(
        EightfoldError, match="--kv-cache-dtype is float64; Ascend910B3 has no kernel for it beside bfloat16"
    ):
        ops.new_pages(4, 128, 2, 64, torch.float64)
    with pytest.raises(
        EightfoldError, match="--kv-cache-dtype is int8; Ascend910B3 has no kernel for it beside float32"
    ):
        NpuOps(torch.float32).new_pages(4, 128, 2, 64, torch.int8)


def test_weights_that_no_kernel_takes() -> None:
    with pytest.raises(
        EightfoldError, match="scheme w8a8 has no NPU kernel for float32: use --dtype bfloat16 or float16"
    ):
        NpuOps(torch.float32).prepare_linear([matrix(32, 32, "w8a8")])
    ops = NpuOps(torch.bfloat16)
    with pytest.raises(EightfoldError, match="schemes dense, w8a8 stand side by side; one is wanted"):
        ops.prepare_linear([matrix(32, 32, "w8a8"), matrix(32, 32)])
    with pytest.raises(EightfoldError, match="an int8 matrix of 65537 by 8 is too large: at most 65535"):
        ops.prepare_linear([matrix(65537, 8, "w8a8")])


def test_strict_kernels_refuse_the_reference() -> None:
    ops = NpuOps(torch.float32, strict_kernels=True)
    pages = ops.new_pages(2, 128, 2, 32, torch.float32)
    from eightfold.doctor import _batch_on, batch_of

    batch = _batch_on(ops, batch_of([(2, 2)], 128)[0])
    rope = Rope(*(torch.ones(8, 16).to(ops.device) for _ in "cs"))
    q = ops.rope_write_kv(torch.randn(2, 6 * 32).to(ops.device), rope, batch, pages)
    with pytest.raises(
        EightfoldError, match=r"attention has no NPU kernel for queries of torch\.float32; without strict"
    ):
        ops.attention(q, batch, pages)


def test_a_window_goes_to_the_reference_only_where_it_matters() -> None:
    ops = NpuOps(torch.bfloat16)
    from eightfold.doctor import _batch_on, batch_of

    batch = _batch_on(ops, batch_of([(200, 200)], 128)[0])
    pages = ops.new_pages(5, 128, 2, 32, torch.bfloat16)
    rope = Rope(*(torch.ones(256, 16).to(ops.device) for _ in "cs"))
    q = ops.rope_write_kv(torch.randn(200, 6 * 32).bfloat16().to(ops.device), rope, batch, pages)
    whole = ops.attention(q, batch, pages)
    assert torch.equal(ops.attention(q, batch, pages, 200).cpu(), whole.cpu())
    with pytest.warns(
        RuntimeWarning, match="attention has no NPU kernel for a window of 64 tokens: the torch reference"
    ):
        cut = ops.attention(q, batch, pages, 64)
    assert torch.allclose(cut[:64].cpu(), whole[:64].cpu(), atol=2e-2)
    assert not torch.allclose(cut[64:].cpu(), whole[64:].cpu(), atol=2e-2)


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATB_LLM_ENABLE_AUTO_TRANSPOSE", "0")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    ops = NpuOps(torch.bfloat16)
    assert "heeded by torch_npu" in ops.facts()["TASK_QUEUE_ENABLE"]
    layout = ops.npu.torch_npu.get_npu_format
    handle: Any = ops.prepare_linear([matrix(64, 32, "w8a8")])
    assert layout(handle.weight) != FRACTAL_NZ
    monkeypatch.delenv("ATB_LLM_ENABLE_AUTO_TRANSPOSE")
    handle = NpuOps(torch.bfloat16).prepare_linear([matrix(64, 32, "w8a8")])
    assert layout(handle.weight) == FRACTAL_NZ

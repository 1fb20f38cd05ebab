"""The Ascend device under the NPU backend: torch_npu loaded and checked, what the chip is and can do, its memory.

torch_npu is imported here and nowhere else, when a device is opened. What is missing or does not fit together is an
EightfoldError that says what to install.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from eightfold.types import EightfoldError

OLDEST_TORCH_NPU = (2, 7)
OPERATORS = (  # every fused operation that some path calls
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_rotary_mul",
    "npu_apply_rotary_pos_emb",
    "npu_scatter_pa_kv_cache",
    "npu_fused_infer_attention_score",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
    "npu_grouped_matmul_swiglu_quant",
    "npu_swiglu",
    "npu_dynamic_quant",
    "npu_quant_matmul",
    "npu_weight_quant_batchmatmul",
    "npu_moe_token_unpermute",
    "npu_format_cast",
    "npu_mm_all_reduce_base",
    "npu_convert_weight_to_int4pack",
)

# The reference system's switches → who heeds them.
SWITCHES = {
    "ASCEND_RT_VISIBLE_DEVICES": "CANN: the devices that a process sees",
    "INF_NAN_MODE_ENABLE": "torch_npu: infinities and NaNs as IEEE has them (1, its default on 800I A2)",
    "TASK_QUEUE_ENABLE": "torch_npu: launch operations from a second thread (1 or 2)",
    "HCCL_IF_IP": "HCCL: this machine's address, where several network cards leave a choice (or HCCL_SOCKET_IFNAME)",
    "HCCL_DETERMINISTIC": "HCCL: true for sums in a fixed order; ours of floats are so without it",
    "HCCL_BUFFSIZE": "HCCL: MiB of memory for each communicator (200)",
    "HCCL_CONNECT_TIMEOUT": "HCCL: seconds to wait for the other ranks at the start (120)",
    "ATB_LLM_ENABLE_AUTO_TRANSPOSE": "Eightfold: 0 leaves quantized weights in rows, without the NZ layout",
    "ATB_WORKSPACE_MEM_ALLOC_GLOBAL": "ATB's operations, which 300I DUO's attention uses",
    "ATB_CONTEXT_WORKSPACE_SIZE": "ATB's operations, which 300I DUO's attention uses",
    "ATB_OPERATION_EXECUTE_ASYNC": "nobody: ATB's graphs are not used, and launches are asynchronous anyway",
    "ATB_LAYER_INTERNAL_TENSOR_REUSE": "nobody: ATB's graphs are not used, and torch's allocator reuses memory",
    "ATB_CONVERT_NCHW_TO_ND": "nobody: no tensor here has a NCHW layout",
}


@dataclass(frozen=True, slots=True)
class Soc:
    """A family of chips, and which of the fused operations it has."""

    family: str
    products: str
    dtypes: tuple[torch.dtype, ...]
    fused: bool  # attention over ragged batches, routing, int8 activations, grouped products of experts
    adds: bool  # has products that add up over ranks


SOCS = (
    Soc("Ascend910B", "Atlas 800I A2", (torch.bfloat16, torch.float16, torch.float32), True, True),
    Soc("Ascend910_93", "Atlas 800I A3", (torch.bfloat16, torch.float16, torch.float32), True, False),
    Soc("Ascend310P", "Atlas 300I DUO", (torch.float16,), False, False),
)


@dataclass(frozen=True, slots=True)
class Device:
    """An opened device: `name` as torch knows it ("npu:0"), the chip's full name and family, and torch_npu."""

    name: str
    chip: str
    soc: Soc
    torch_npu: Any

    def free_memory(self) -> int:
        """Bytes that can be allocated now: unused ones, and those that torch's allocator holds without need."""
        npu = self.torch_npu.npu
        free, _ = npu.mem_get_info(self.name)
        return int(free + npu.memory_reserved(self.name) - npu.memory_allocated(self.name))

    def total_memory(self) -> int:
        return int(self.torch_npu.npu.mem_get_info(self.name)[1])

    def synchronize(self) -> None:
        """Waits until everything that was launched is done."""
        self.torch_npu.npu.synchronize(self.name)


FRACTAL_NZ = 29


def open_device(wish: str) -> Device:
    """Opens "npu", the first visible device, or "npu:N". Raises EightfoldError if it can't be had, and says why."""
    match = re.fullmatch(r"npu(?::(\d+))?", wish)
    if match is None:
        raise EightfoldError(f"device {wish!r} is not an NPU's name; write npu, or npu:1 for the second one visible")
    index = int(match[1] or 0)
    torch_npu = load_torch_npu()
    count = torch_npu.npu.device_count() if torch_npu.npu.is_available() else 0
    if index >= count:
        seen = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        hint = f" (ASCEND_RT_VISIBLE_DEVICES is {seen!r})" if seen is not None else ""
        raise EightfoldError(
            f"there is no device npu:{index}: {count} NPUs are visible{hint}; npu-smi info lists those that the driver "
            "has"
        )
    torch_npu.npu.set_device(index)
    chip = str(torch_npu.npu.get_device_name(index))
    return Device(f"npu:{index}", chip, soc_of(chip), torch_npu)


def soc_of(chip: str) -> Soc:
    """The family of a chip such as "Ascend910B3". Raises EightfoldError for one that no path was written for."""
    for soc in SOCS:
        if chip.startswith(soc.family):
            return soc
    known = ", ".join(f"{soc.family} ({soc.products})" for soc in SOCS)
    raise EightfoldError(f"the NPU is a {chip}, which is not supported; supported are {known}")


def load_torch_npu() -> Any:
    """The module torch_npu. Raises EightfoldError if it or CANN is missing, or of a version that does not fit."""
    try:
        have = version("torch_npu")
    except PackageNotFoundError:
        raise EightfoldError(
            f"device npu needs the package torch_npu, which is not installed: pip install torch_npu=={_release()}, and "
            "CANN beside it"
        ) from None
    if _numbers(have)[:2] != _numbers(torch.__version__)[:2]:
        raise EightfoldError(
            f"torch_npu {have} belongs to torch {'.'.join(have.split('.')[:2])}, but torch is {torch.__version__}: "
            f"install torch_npu=={_release()}"
        )
    if _numbers(have) < OLDEST_TORCH_NPU:
        raise EightfoldError(f"torch_npu {have} is too old; it must be 2.7 or newer, with the torch of its version")
    try:
        torch_npu = import_module("torch_npu")
    except Exception as error:  # torch_npu itself raises plain ones where CANN's environment is not right
        if ".so" in str(error) or "ASCEND_HOME_PATH" in str(error):
            raise EightfoldError(
                f"CANN is missing or not set up for this shell ({first_line(error)}): install it, then source its "
                "set_env.sh (usually /usr/local/Ascend/ascend-toolkit/set_env.sh)"
            ) from error
        raise EightfoldError(f"torch_npu {have} could not be imported: {first_line(error)}") from error
    missing = [name for name in OPERATORS if not hasattr(torch.ops.npu, name)]
    if missing:
        raise EightfoldError(f"torch_npu {have} lacks {', '.join(missing)}: install a newer one")
    return torch_npu


def cann_version() -> str:
    """CANN's version as torch_npu finds it, or "unknown"."""
    try:
        return str(import_module("torch_npu.npu.utils").get_cann_version()) or "unknown"
    except (ImportError, AttributeError, RuntimeError, OSError):
        return "unknown"


def first_line(error: BaseException) -> str:
    """What an error of torch_npu says, without the trace and the codes that it appends."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _release() -> str:
    return torch.__version__.partition("+")[0]


def _numbers(text: str) -> tuple[int, ...]:
    """Version "2.7.1.post11" → (2, 7, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0].partition("post")[0]))

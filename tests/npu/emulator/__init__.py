"""An Ascend NPU for tests: torch_npu's own operators and device, over simulated ACL libraries and CPU kernels.

`start()` makes `torch.device("npu:0")` work in this process. What it is and is not worth is in docs/npu.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_running: list[Any] = []


def start() -> Any:
    """Builds the libraries if need be, loads torch_npu over them, and puts the kernels in place → torch_npu."""
    from emulator import simulator

    if not _running:
        torch_npu = simulator.load(simulator.build(ROOT / "build" / "npu"))
        from emulator import dispatch

        _running.extend((torch_npu, *dispatch.install()))
    return _running[0]

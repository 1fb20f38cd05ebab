"""These tests run where torch_npu is installed (`make test-npu`), on the emulator; elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.setdefault("NPU_SIM_MEMORY", str(3 << 30))
    import emulator

    emulator.start()
    import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield

"""Products of int4 weights: right calls, and deliberate mistakes; what they compute is the doctor's to check."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulator.host import Mistake
from test_mistakes import Call, floats, half, ints
from torch import Tensor


def int4(*shape: int) -> Tensor:
    numbers = torch.randint(-8, 8, (shape[-2], 8 * shape[-1]), dtype=torch.int32).to("npu:0")
    packed: Tensor = torch.ops.npu.npu_convert_weight_to_int4pack(numbers)
    return packed if len(shape) == 2 else torch.stack([packed] * shape[0])


GOOD: dict[str, Callable[[], Call]] = {
    "npu_convert_weight_to_int4pack": lambda: {"weight": torch.full((64, 48), -8, dtype=torch.int32).to("npu:0")},
    "npu_weight_quant_batchmatmul": lambda: {
        "x": half(3, 64),
        "weight": int4(64, 6),
        "antiquant_scale": half(2, 48),
        "antiquant_group_size": 32,
    },
    "npu_grouped_matmul": lambda: {
        "x": [half(6, 64)],
        "weight": [int4(3, 64, 6)],
        "antiquant_scale": [half(3, 2, 48)],
        "antiquant_offset": [half(3, 2, 48)],
        "split_item": 2,
        "group_type": 0,
        "group_list": ints([1, 3, 2], torch.int64),
        "group_list_type": 1,
    },
}
MISTAKES: dict[str, dict[str, Callable[[], Call]]] = {
    "npu_convert_weight_to_int4pack": {
        "int8": lambda: {"weight": torch.zeros(64, 48, dtype=torch.int8).to("npu:0")},
        "a number above 7": lambda: {"weight": torch.full((64, 48), 8, dtype=torch.int32).to("npu:0")},
        "a width that eight does not divide": lambda: {"weight": torch.zeros(64, 46, dtype=torch.int32).to("npu:0")},
        "a transposed view": lambda: {"weight": torch.zeros(48, 64, dtype=torch.int32).to("npu:0").t()},
        "three axes": lambda: {"weight": torch.zeros(2, 64, 48, dtype=torch.int32).to("npu:0")},
    },
    "npu_weight_quant_batchmatmul": {
        "groups of 16": lambda: {"antiquant_group_size": 16, "antiquant_scale": half(4, 48)},
        "one group of all rows": lambda: {"antiquant_group_size": 64, "antiquant_scale": half(1, 48)},
        "scales turned around": lambda: {"antiquant_scale": half(48, 2)},
        "groups that are not said": lambda: {"antiquant_group_size": 0},
        "fp32 scales": lambda: {"antiquant_scale": floats(2, 48)},
        "weights packed by rows": lambda: {"weight": int4(48, 8)},
    },
    "npu_grouped_matmul": {
        "scales without groups' axis, of another width": lambda: {"antiquant_scale": [half(2, 48)]},
        "groups that don't divide": lambda: {n: [half(3, 3, 48)] for n in ("antiquant_scale", "antiquant_offset")},
        "no offset": lambda: {"antiquant_offset": None},
        "weights packed by rows": lambda: {"weight": [int4(3, 48, 8)]},
        "int8 activations": lambda: {"x": [torch.zeros(6, 64, dtype=torch.int8).to("npu:0")]},
    },
}


@pytest.mark.parametrize("call", GOOD)
def test_right_calls_pass(call: str) -> None:
    getattr(torch.ops.npu, call)(**GOOD[call]())


@pytest.mark.parametrize(("call", "mistake"), [(call, mistake) for call in MISTAKES for mistake in MISTAKES[call]])
def test_mistake_is_caught(call: str, mistake: str) -> None:
    with pytest.raises((Mistake, RuntimeError, TypeError)) as caught:
        getattr(torch.ops.npu, call)(**{**GOOD[call](), **MISTAKES[call][mistake]()})
    assert "is not emulated" not in str(caught.value)

"""Eightfold: an inference engine for Mixtral.

`LLM`, `SamplingParams` and the result types are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eightfold.llm import LLM
    from eightfold.types import (
        CompletionOutput,
        EightfoldError,
        Logprob,
        RequestOutput,
        RequestOutputKind,
        SamplingParams,
    )

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "EightfoldError",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'eightfold' has no attribute {name!r}")
    return getattr(import_module("eightfold.llm" if name == "LLM" else "eightfold.types"), name)

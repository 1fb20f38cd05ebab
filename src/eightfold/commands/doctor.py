"""`eightfold doctor`: every operation of a device against the reference, as a report that can be sent to somebody."""

from __future__ import annotations

import argparse
import platform

import torch

from eightfold import __version__
from eightfold.doctor import Finding, checks, examine
from eightfold.loader import DTYPES
from eightfold.ops import Ops, get_ops
from eightfold.types import EightfoldError

CHOICES = ("bfloat16", "float16", "float32")


def main(args: argparse.Namespace) -> int:
    """Exit code 1 if a check failed."""
    wishes = CHOICES if args.dtype == "auto" else tuple(args.dtype.split(","))
    if unknown := [name for name in wishes if name not in DTYPES]:
        raise EightfoldError(f"--dtype is {unknown[0]!r}; it must be auto or one of {', '.join(DTYPES)}")
    backends = [ops for name in wishes if (ops := _backend(args, name)) is not None]
    facts = {"eightfold": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name, value in (facts | {"torch": torch.__version__} | backends[0].facts()).items():
        print(f"{name:<34}{value}")
    findings: list[Finding] = []
    for ops in backends:
        print(f"\n{args.device}, {str(ops.dtype).removeprefix('torch.')}: largest error, and the largest allowed")
        for finding in examine(checks(ops, args.device)):
            print(_line(finding), flush=True)
            findings.append(finding)
    failed = sum(not finding.good for finding in findings)
    print(f"\n{len(findings)} checks, {failed} failed" if failed else f"\n{len(findings)} checks, all good")
    return min(failed, 1)


def _backend(args: argparse.Namespace, dtype: str) -> Ops | None:
    """The backend in a dtype; None where it lacks one that nobody asked for by name."""
    try:
        return get_ops(args.device, DTYPES[dtype], args.threads)
    except EightfoldError:
        if args.dtype != "auto" or dtype == "float16":  # which every device has, so the error is another one
            raise
        return None


def _line(finding: Finding) -> str:
    if finding.failure:
        return f"  FAILED  {finding.name}: {finding.failure}"
    mark = "ok    " if finding.good else "WRONG "
    return f"  {mark}  {finding.name}: {finding.error:.1e} ({finding.bound:.1e})"

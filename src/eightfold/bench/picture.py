"""The roofline picture. matplotlib is an optional extra; without it one line says so."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from eightfold.bench.accounting import Peaks

COLOURS = {"int8": "#0072b2", "bf16": "#d55e00", "fp32": "#009e73"}  # told apart by all kinds of eyes
MARKERS = "osD^vPX*<>"


class Point(NamedTuple):
    """A measurement: what it is one of, a label beside it ("" for none), and what was counted and timed."""

    group: str
    label: str
    products: str
    operations: float
    bytes: float
    seconds: float
    tokens: int
    share: float  # of its limit


def draw(path: str, title: str, points: Sequence[Point], peaks: Peaks, against_tokens: bool) -> None:
    """Write the picture as PNG; beside the roofline, if `against_tokens`, each group's share of its limit."""
    if find_spec("matplotlib") is None:
        print("eightfold: note: no picture: it needs matplotlib (pip install 'eightfold[bench]')", file=sys.stderr)
        return
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        1, 2 if against_tokens else 1, figsize=(15 if against_tokens else 9, 6.5), squeeze=False
    )
    markers = {group: MARKERS[i % len(MARKERS)] for i, group in enumerate(dict.fromkeys(p.group for p in points))}
    _roofline(axes[0][0], points, peaks, markers)
    if against_tokens:
        _shares(axes[0][1], points, markers)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _roofline(axis: Any, points: Sequence[Point], peaks: Peaks, markers: Mapping[str, str]) -> None:
    intensities = [p.operations / p.bytes for p in points]
    used = {p.products for p in points}
    low, high = min(intensities) / 2, max([*intensities, *(peaks.operations[u] / peaks.read for u in used)]) * 3
    for name in sorted(used):
        knee, peak = peaks.operations[name] / peaks.read, peaks.operations[name] / 1e9
        axis.plot([low, knee, high], [low * peaks.read / 1e9, peak, peak], color=COLOURS[name], linewidth=1.2)
        axis.annotate(
            f"{name} {peak:.0f} GOP/s", (high, peak), ha="right", va="bottom", color=COLOURS[name], fontsize=9
        )
    slope = (low * 1.6, low * 1.6 * peaks.read / 1e9)
    axis.annotate(
        f"read {peaks.read / 1e9:.1f} GB/s",
        slope,
        ha="left",
        va="bottom",
        fontsize=9,
        xytext=(0, 12),
        textcoords="offset points",
    )
    for point, intensity in zip(points, intensities, strict=True):
        place = (intensity, point.operations / point.seconds / 1e9)
        axis.plot(*place, markers[point.group], color=COLOURS[point.products], markersize=6, alpha=0.75)
        if point.label:
            axis.annotate(point.label, place, fontsize=8, xytext=(6, -9), textcoords="offset points")
    _legend(axis, points, markers)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GOP/s", title="Roofline (median probes)")
    axis.grid(which="both", alpha=0.15)


def _legend(axis: Any, points: Sequence[Point], markers: Mapping[str, str]) -> None:
    """One entry for each group and format, once."""
    for group, products in dict.fromkeys((p.group, p.products) for p in points):
        axis.plot([], [], markers[group], color=COLOURS[products], label=f"{group} ({products})")
    axis.legend(fontsize=8, loc="lower right")


def _shares(axis: Any, points: Sequence[Point], markers: Mapping[str, str]) -> None:
    for group, products in dict.fromkeys((p.group, p.products) for p in points):
        line = sorted((p.tokens, 100 * p.share) for p in points if (p.group, p.products) == (group, products))
        axis.plot(*zip(*line, strict=True), f"{markers[group]}-", color=COLOURS[products], markersize=5, alpha=0.8)
    axis.axhline(100, color="grey", linewidth=0.8)
    axis.set(xscale="log", ylim=(0, 125), xlabel="tokens", ylabel="% of the limit", title="Share of the limit")
    axis.grid(which="both", alpha=0.15)

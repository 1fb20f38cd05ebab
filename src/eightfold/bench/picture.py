"""Roofline pictures. matplotlib is an optional extra; without it one line says so."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from eightfold.bench.accounting import Peaks
from eightfold.types import EightfoldError

COLOURS = {"int8": "#0072b2", "bf16": "#d55e00", "fp32": "#009e73"}  # told apart by all kinds of eyes
MARKERS = "osD^vPX*<>"


class Point(NamedTuple):
    """A measurement: the group that it is one of, where it stands in its group, and what was counted and timed."""

    group: str
    at: str
    products: str
    operations: float
    bytes: float
    seconds: float
    share: float  # of its limit


def draw(path: str, title: str, points: Sequence[Point], peaks: Peaks, panels: Sequence[str]) -> None:
    """Write the picture as PNG: the roofline, and beside it a panel of shares for the groups that begin with each of
    `panels`. Raises EightfoldError if the file can't be written."""
    if find_spec("matplotlib") is None:
        print("eightfold: note: no picture: it needs matplotlib (pip install 'eightfold[bench]')", file=sys.stderr)
        return
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    shown = [name for name in panels if any(point.group.startswith(name) for point in points)]
    figure = pyplot.figure(figsize=(18, 9))
    grid = figure.add_gridspec(max(1, len(shown)), 2, width_ratios=(1.25, 1))
    groups = dict.fromkeys((point.group, point.products) for point in points)
    markers = {group: MARKERS[number % len(MARKERS)] for number, (group, _) in enumerate(groups)}
    _roofline(figure.add_subplot(grid[:, 0]), points, peaks, markers)
    for number, name in enumerate(shown):
        chosen = [point for point in points if point.group.startswith(name)]
        _shares(figure.add_subplot(grid[number, 1]), chosen, markers)
    figure.suptitle(title)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise EightfoldError(f"cannot write {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _roofline(axis: Any, points: Sequence[Point], peaks: Peaks, markers: Mapping[str, str]) -> None:
    intensities = [point.operations / point.bytes for point in points]
    used = sorted({point.products for point in points})
    knees = [peaks.operations[name] / peaks.read for name in used]
    low, high = min(intensities) / 2, max([*intensities, *knees]) * 4
    for name, knee in zip(used, knees, strict=True):
        peak = peaks.operations[name] / 1e9
        axis.plot([low, knee, high], [low * peaks.read / 1e9, peak, peak], color=COLOURS[name], linewidth=1.2)
        axis.annotate(f"{name} {peak:.0f} GOP/s", (high, peak), ha="right", va="bottom", color=COLOURS[name])
    start = (low, low * peaks.read / 1e9)
    axis.annotate(f"read {peaks.read / 1e9:.1f} GB/s", start, xytext=(14, -4), textcoords="offset points")
    for point, intensity in zip(points, intensities, strict=True):
        speed = point.operations / point.seconds / 1e9
        axis.plot(intensity, speed, markers[point.group], color=COLOURS[point.products], markersize=6, alpha=0.75)
    for group, products in dict.fromkeys((point.group, point.products) for point in points):
        axis.plot([], [], markers[group], color=COLOURS[products], label=f"{group} ({products})")
    axis.legend(fontsize=8, loc="lower right")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GOP/s", xlim=(low, high))
    axis.set_title("Roofline: medians, under the medians of the probes")
    axis.grid(which="both", alpha=0.15)


def _shares(axis: Any, points: Sequence[Point], markers: Mapping[str, str]) -> None:
    """Each group's shares, a line through the places where its points stand."""
    places = list(dict.fromkeys(point.at for point in points))
    for group, products in dict.fromkeys((point.group, point.products) for point in points):
        own = [point for point in points if (point.group, point.products) == (group, products)]
        x, y = [places.index(point.at) for point in own], [100 * point.share for point in own]
        axis.plot(x, y, f"{markers[group]}-", color=COLOURS[products], markersize=5, alpha=0.8, label=group)
    turn = 20 if max(map(len, places)) > 12 else 0
    axis.set_xticks(range(len(places)), places, rotation=turn, ha="right" if turn else "center", fontsize=8)
    axis.axhline(100, color="grey", linewidth=0.8)
    axis.set(ylim=(0, 120), ylabel="% of the limit")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(axis="y", alpha=0.3)

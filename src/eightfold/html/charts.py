"""Small charts as SVG text, in colours that the page defines (`--a`, `--line`, …), so that they change with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 40
MOST_DOTS = 40  # more along a line would hide it
MOST_LABELS = 16  # under an axis

NOTHING = "<p>All of it is 0.</p>"

Format = Callable[[float], str]


class Series(NamedTuple):
    """A line: its name, its colour as the page calls it, and a value for each label under the axis, None for none."""

    name: str
    colour: str
    values: Sequence[float | None]


class Curve(NamedTuple):
    """A line through points (x, y): its name, and its colour as the page calls it."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """A bar: what it is, its value, what is written beside it, and its colour as the page calls it."""

    label: str
    value: float
    text: str
    colour: str = "a"


def lines(series: Sequence[Series], labels: Sequence[str], under: str, show: Format, from_zero: bool = True) -> str:
    """Lines over places with labels; the vertical axis begins at 0, or a little below the lowest value."""
    values = [value for one in series for value in one.values if value is not None]
    if from_zero and not any(values):
        return NOTHING
    ticks = nice_ticks(0.0 if from_zero else min(values), max(values), ceiling=None if from_zero else 1.0)
    low, high = ticks[0], ticks[-1]

    def x(place: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place + 0.5) / len(labels)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    parts = [
        grid([(y(tick), show(tick)) for tick in ticks]),
        _labels([(x(n), label) for n, label in enumerate(labels)]),
    ]
    for one in series:
        known = [(place, value) for place, value in enumerate(one.values) if value is not None]
        path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in known)
        parts.append(f'<polyline points="{path}" fill="none" stroke="var(--{one.colour})" stroke-width="2"/>')
        radius = 3.5 if len(known) <= MOST_DOTS else 1.5
        for place, value in known:
            hover = escape(f"{one.name}, {under} {labels[place]}: {show(value)}")
            parts.append(
                f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="{radius}" fill="var(--{one.colour})">'
                f"<title>{hover}</title></circle>"
            )
    return svg([*parts, caption(under)]) + legend(series)


def columns(heights: Sequence[float], labels: Sequence[str], hovers: Sequence[str], under: str, show: Format) -> str:
    """Columns side by side from 0; `labels` stand under each, "" for none."""
    if not any(heights):
        return NOTHING
    ticks = nice_ticks(0.0, max(heights))
    scale = (HEIGHT - TOP - BOTTOM) / ticks[-1]
    step = (WIDTH - LEFT - RIGHT) / len(heights)
    parts = [grid([(HEIGHT - BOTTOM - tick * scale, show(tick)) for tick in ticks])]
    for place, (height, hover) in enumerate(zip(heights, hovers, strict=True)):
        parts.append(
            f'<rect x="{LEFT + step * (place + 0.08):.1f}" y="{HEIGHT - BOTTOM - height * scale:.1f}" rx="1.5" '
            f'width="{step * 0.84:.1f}" height="{height * scale:.1f}" fill="var(--c)">'
            f"<title>{escape(hover)}</title></rect>"
        )
    parts.append(_labels([(LEFT + step * (place + 0.5), label) for place, label in enumerate(labels)]))
    return svg([*parts, caption(under)])


def bars(items: Sequence[Bar]) -> str:
    """Bars from the left, one under the other, with their values written at their ends."""
    row, left, right = (
        26,
        16 + 7 * max(len(item.label) for item in items),
        24 + 7 * max(len(item.text) for item in items),
    )
    most = max(item.value for item in items) or 1.0
    parts = []
    for number, item in enumerate(items):
        top, length = number * row + 4, (WIDTH - left - right) * item.value / most
        parts.append(
            f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{escape(item.label)}</text>'
            f'<rect x="{left}" y="{top + 1}" width="{max(length, 1):.1f}" height="18" rx="1.5" '
            f'fill="var(--{item.colour})"/>'
            f'<text x="{left + length + 7:.1f}" y="{top + 14}">{escape(item.text)}</text>'
        )
    return svg(parts, len(items) * row + 6)


def legend(series: Sequence[Series | Curve]) -> str:
    """Names beside their colours."""
    keys = [f'<span><i style="background:var(--{one.colour})"></i>{escape(one.name)}</span>' for one in series]
    return f'<p class="legend">{"".join(keys)}</p>'


def nice_ticks(low: float, high: float, count: int = 4, ceiling: float | None = None) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps apart, none above `ceiling`."""
    if high <= low:
        low, high = (low, low + 1.0) if ceiling is None else (max(0.0, low - 0.01), low)
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    return [tick for tick in ticks if ceiling is None or tick <= ceiling + 1e-9]


def grid(ticks: Sequence[tuple[float, str]]) -> str:
    """Lines across at heights, with what they stand for to the left."""
    return "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        for y, text in ticks
    )


def _labels(places: Sequence[tuple[float, str]]) -> str:
    shown = [(x, label) for x, label in places if label]
    return "".join(
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>'
        for x, label in shown[:: -(-len(shown) // MOST_LABELS)]
    )


def caption(text: str, height: float = HEIGHT) -> str:
    """What the horizontal axis is, under it."""
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    return f'<text x="{middle}" y="{height - 5}" text-anchor="middle" class="soft">{escape(text)}</text>'


def svg(parts: Sequence[str], height: float = HEIGHT) -> str:
    """The picture around its parts."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'

"""Pictures of measurements as SVG text: ranges, curves, rooflines, heat maps; in the page's colours, like `charts`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from eightfold.html.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Format,
    caption,
    grid,
    legend,
    nice_ticks,
    svg,
)

COLOURS = "abcdef"  # as the page defines them
ROW = 26
CELL_TEXT_LAYERS = 20  # with more rows, cells are too flat to write in


class Range(NamedTuple):
    """A test's values at three percentiles, the smallest first."""

    label: str
    values: tuple[float, float, float]


class Spot(NamedTuple):
    """A measurement in a roofline: operations per byte, operations per second, and what to say about it."""

    curve: str
    intensity: float
    speed: float
    hover: str


class Roof(NamedTuple):
    """Operations a second that no products of one number format can exceed, and what is written there."""

    label: str
    peak: float


class Stack(NamedTuple):
    """A bar made of parts that add up to 1, one for each name of the legend."""

    label: str
    parts: Sequence[float]
    hover: str


def ranges(items: Sequence[Range], names: tuple[str, str, str], under: str, show: Format) -> str:
    """For each item a bar from 0 to its first value, and thinner ones on to the second and the third."""
    left = 16 + 6.6 * max(len(item.label) for item in items)
    right = 24 + 7 * max(len(show(item.values[0])) for item in items)
    ticks = nice_ticks(0.0, max(item.values[2] for item in items) or 1.0)
    scale = (WIDTH - left - right) / ticks[-1]
    height = len(items) * ROW + 44
    parts = [
        f'<line x1="{left + tick * scale:.1f}" x2="{left + tick * scale:.1f}" y1="2" y2="{height - 40}" '
        f'stroke="var(--line)"/><text x="{left + tick * scale:.1f}" y="{height - 24}" text-anchor="middle">'
        f"{escape(show(tick))}</text>"
        for tick in ticks
    ]
    for number, item in enumerate(items):
        top = number * ROW + 4
        first, second, third = (value * scale for value in item.values)
        hover = ", ".join(f"{name} {show(value)}" for name, value in zip(names, item.values, strict=True))
        parts.append(
            f"<g><title>{escape(f'{item.label}: {hover}')}</title>"
            f'<text x="{left - 8:.1f}" y="{top + 14}" text-anchor="end">{escape(item.label)}</text>'
            + "".join(
                f'<rect x="{left:.1f}" y="{top + 9.5 - thick / 2}" width="{max(length, 1):.1f}" height="{thick}" '
                f'fill="var(--c)" opacity="{strength}"/>'
                for length, thick, strength in ((third, 3, 0.5), (second, 9, 0.5), (first, 17, 1))
            )
            + f'<text x="{left + third + 7:.1f}" y="{top + 14}">{escape(show(item.values[0]))}</text></g>'
        )
    return svg([*parts, caption(under, height)], height)


def curves(items: Sequence[Curve], under: str, show_x: Format, show_y: Format) -> str:
    """Lines through points; the horizontal axis is logarithmic, the vertical one goes from 0 to 1."""
    xs = [x for one in items for x, _ in one.points]
    ticks = _log_ticks(min(xs), max(xs))
    x = _log_scale(min(min(xs), ticks[0]), max(max(xs), ticks[-1]), LEFT, WIDTH - RIGHT - 8)

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [grid([(y(share), show_y(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]), _below(ticks, x, show_x)]
    for one in items:
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in one.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var(--{one.colour})" stroke-width="2">'
            f"<title>{escape(one.name)}</title></polyline>"
        )
    return svg([*parts, caption(under)]) + legend(items)


def stacks(items: Sequence[Stack], names: Sequence[str]) -> str:
    """Bars of equal length, cut up into their parts."""
    left = 16 + 6.6 * max(len(item.label) for item in items)
    wide = WIDTH - left - RIGHT
    drawn = []
    for number, item in enumerate(items):
        top, x = number * ROW + 4, left
        drawn.append(f"<g><title>{escape(f'{item.label}: {item.hover}')}</title>")
        drawn.append(f'<text x="{left - 8:.1f}" y="{top + 14}" text-anchor="end">{escape(item.label)}</text>')
        for colour, share in zip(COLOURS, item.parts, strict=False):
            drawn.append(
                f'<rect x="{x:.1f}" y="{top + 1}" width="{share * wide:.1f}" height="18" fill="var(--{colour})"/>'
            )
            x += share * wide
        drawn.append("</g>")
    keys = [Curve(name, colour, ()) for colour, name in zip(COLOURS, names, strict=False)]
    return svg(drawn, len(items) * ROW + 6) + legend(keys)


def roofline(spots: Sequence[Spot], roofs: Sequence[Roof], read: float, read_label: str, show: Format) -> str:
    """Operations per second over operations per byte, both logarithmic, under the limits of reading and computing."""
    names = list(dict.fromkeys(spot.curve for spot in spots))
    knees = [roof.peak / read for roof in roofs]
    low = min(spot.intensity for spot in spots) / 2
    high = max(*(spot.intensity for spot in spots), *knees) * 4
    top = max(roof.peak for roof in roofs)
    bottom = min(*(spot.speed for spot in spots), low * read)
    height = HEIGHT + 50
    x, y = _log_scale(low, high, LEFT, WIDTH - RIGHT), _log_scale(bottom / 1.5, top * 2, height - BOTTOM, TOP)
    parts = [
        grid([(y(tick), show(tick)) for tick in _log_ticks(bottom, top)]),
        _below(_log_ticks(low, high), x, lambda value: f"{value:g}", height),
    ]
    for roof, knee in zip(roofs, knees, strict=True):
        path = f"{x(low):.1f},{y(low * read):.1f} {x(knee):.1f},{y(roof.peak):.1f} {x(high):.1f},{y(roof.peak):.1f}"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var(--soft)" stroke-width="1.5"/>'
            f'<text x="{WIDTH - RIGHT - 2}" y="{y(roof.peak) - 5:.1f}" text-anchor="end">'
            f"{escape(roof.label)}</text>"
        )
    place = low * (knees[0] / low) ** 0.75  # on the slope, where there is room to its left
    parts.append(
        f'<text x="{x(place) - 8:.1f}" y="{y(place * read):.1f}" text-anchor="end">{escape(read_label)}</text>'
    )
    parts += [
        f'<circle cx="{x(spot.intensity):.1f}" cy="{y(spot.speed):.1f}" r="4.5" fill-opacity=".8" '
        f'fill="var(--{COLOURS[names.index(spot.curve) % len(COLOURS)]})"><title>{escape(spot.hover)}</title></circle>'
        for spot in spots
    ]
    under = caption("operations per byte that must be read (upwards: operations a second)", height)
    keys = [Curve(name, COLOURS[number % len(COLOURS)], ()) for number, name in enumerate(names)]
    return svg([*parts, under], height) + legend(keys)


def heat_map(values: Sequence[Sequence[float]], row: str, column: str, show: Format) -> str:
    """A cell for each value [rows, columns], the darker the larger; rows and columns are numbered from 0."""
    most = max(max(line) for line in values) or 1.0
    high = 22 if len(values) <= CELL_TEXT_LAYERS else 11
    wide = (WIDTH - LEFT - RIGHT) / len(values[0])
    written = high > 11 and wide > 34
    parts = []
    for number, line in enumerate(values):
        y = number * high + 4
        if number % max(1, 22 // high) == 0:
            label = f"{row} {number}"
            parts.append(f'<text x="{LEFT - 7}" y="{y + high / 2 + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for place, value in enumerate(line):
            x = LEFT + place * wide
            hover = escape(f"{row} {number}, {column} {place}: {show(value)}")
            parts.append(
                f'<g><title>{hover}</title><rect x="{x + 1:.1f}" y="{y}" width="{wide - 2:.1f}" height="{high - 2}" '
                f'rx="2" fill="var(--c)" fill-opacity="{0.06 + 0.7 * value / most:.3f}"/>'
                + (
                    f'<text x="{x + wide / 2:.1f}" y="{y + 14}" text-anchor="middle">{escape(show(value))}</text></g>'
                    if written
                    else "</g>"
                )
            )
    height = len(values) * high + 42
    every = -(-len(values[0]) // 16)
    parts += [
        f'<text x="{LEFT + (place + 0.5) * wide:.1f}" y="{height - 24}" text-anchor="middle">{place}</text>'
        for place in range(0, len(values[0]), every)
    ]
    return svg([*parts, caption(column, height)], height)


def _log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Values from `low` to `high` → places from `start` to `end`."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; powers alone where these are many; at least two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in fine if low * 0.999 <= tick <= high * 1.001]
    if len(inside) < 2:
        below = max(tick for tick in [fine[0] / 10, *fine] if tick <= low * 1.001)
        return [below, min(tick for tick in [*fine, fine[-1] * 10] if tick > below)]
    tens = [tick for tick in inside if abs(math.log10(tick) - round(math.log10(tick))) < 1e-6]
    return tens if len(inside) > 9 and len(tens) > 1 else inside


def _below(ticks: Sequence[float], x: Callable[[float], float], show: Format, height: float = HEIGHT) -> str:
    return "".join(
        f'<text x="{x(tick):.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{escape(show(tick))}</text>'
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}" stroke="var(--line)"/>'
        for tick in ticks
    )

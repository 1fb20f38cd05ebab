"""Pages that open without a network: one file with its style and its pictures in it. No torch here.

`document` makes the page, `card`, `tiles` and `table` its parts; `eightfold.html.charts` and `plots` draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root {
  --a: #0072b2; --b: #d55e00; --c: #7a56c2; --d: #00856f; --e: #a8457d; --f: #8a6d00;
  --ink: #1c2430; --soft: #5d6877; --line: #e1e5ea; --paper: #f5f6f8; --card: #fff
}
@media (prefers-color-scheme: dark) {
  :root {
    --a: #56a9e0; --b: #ee8440; --c: #a98be6; --d: #3fbfa5; --e: #df83b5; --f: #c9a93a;
    --ink: #e7eaee; --soft: #9aa5b3; --line: #343c47; --paper: #14181d; --card: #1d2229
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px }
h1 { font-size: 25px; margin: 0 0 8px }
h2 { font-size: 16px; margin: 0 0 2px }
p { margin: 0 0 10px }
.soft, .card > p { color: var(--soft) }
.a { color: var(--a); font-weight: 600 }
.b { color: var(--b); font-weight: 600 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 18px 0 14px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 14px }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px }
.card { min-width: 0 }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-weight: 650 }
.tile span { color: var(--soft); font-size: 13px }
.wide { grid-column: 1 / -1; overflow-x: auto }
svg { width: 100%; height: auto; display: block }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) }
svg text.soft { fill: var(--soft) }
.legend { font-size: 13px; margin: 4px 0 0 }
.legend span { display: inline-block; margin-right: 18px; white-space: nowrap }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px }
table { border-collapse: collapse; font-size: 13.5px; width: 100% }
th { text-align: left; color: var(--soft); font-weight: 500 }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.w { white-space: nowrap }
td small { display: block; color: var(--soft) }
code { font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--soft) }
footer { color: var(--soft); font-size: 13px; margin-top: 18px }
"""


def document(title: str, body: str) -> str:
    """The whole page around its body, which is HTML; `title` is text."""
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>\n{body}</main></body></html>\n"
    )


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Large figures, each with the words that say what it is."""
    boxes = [f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in items]
    return f'<div class="tiles">{"".join(boxes)}</div>'


def card(title: str, reading: str, content: str, wide: bool = False) -> str:
    """A box with a title, a line on how to read it, and its content, which is HTML."""
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{escape(title)}</h2><p>{escape(reading)}</p>{content}</section>\n'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in cells; the first column to the left, the others to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        first, *others = (escape(cell) for cell in cells)
        return f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="n">{cell}</{tag}>' for cell in others) + "</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def last_part(name: str) -> str:
    """A folder's name without the folders that it lies in."""
    return name.rstrip("/").rpartition("/")[2] or name

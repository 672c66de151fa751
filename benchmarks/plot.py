"""Grouped bars as an SVG file, by hand: a few rectangles need no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from benchmarks.peers.results import Summary

_WIDTH: Final = 720
_PANEL_HEIGHT: Final = 260
_TOP: Final = 44
_BOTTOM: Final = 40
_LEFT: Final = 56
_COLORS: Final = ("#9aa5b1", "#2f6fdb", "#e08e2b", "#4d9a5b")


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram: for each group one bar of each series; whiskers from the lowest to the highest repetition."""

    title: str
    groups: Sequence[str]
    series: Sequence[tuple[str, Sequence[Summary]]]


def draw(panels: Sequence[Panel]) -> str:
    """The panels below each other, each with its own scale from zero."""
    height = _PANEL_HEIGHT * len(panels)
    body = "".join(_panel(panel, _PANEL_HEIGHT * number) for number, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{height}" fill="white"/>\n{body}</svg>\n'
    )


def _panel(panel: Panel, top: int) -> str:
    floor, ceiling = top + _PANEL_HEIGHT - _BOTTOM, top + _TOP
    highest = max(bar.high for _, bars in panel.series for bar in bars) or 1.0
    scale = (floor - ceiling) / (highest * 1.1)
    group_width = (_WIDTH - _LEFT - 16) / len(panel.groups)
    bar_width = min(70.0, group_width * 0.8 / len(panel.series))
    parts = [_text(16, top + 20, panel.title, anchor="start", weight="bold")]
    parts.append(f'<line x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 16}" y2="{floor}" stroke="#333"/>\n')
    for index, group in enumerate(panel.groups):
        middle = _LEFT + group_width * (index + 0.5)
        parts.append(_text(middle, floor + 18, group))
        first = middle - bar_width * len(panel.series) / 2
        for number, (_, bars) in enumerate(panel.series):
            parts.append(_bar(first + bar_width * number, bar_width, floor, scale, bars[index], _COLORS[number % 4]))
    for number, (name, _) in enumerate(panel.series):
        x = _WIDTH - 140 * (len(panel.series) - number)
        parts.append(f'<rect x="{x}" y="{top + 10}" width="12" height="12" fill="{_COLORS[number % 4]}"/>\n')
        parts.append(_text(x + 18, top + 20, name, anchor="start"))
    return "".join(parts)


def _bar(x: float, width: float, floor: float, scale: float, bar: Summary, color: str) -> str:
    top, low, high = (floor - value * scale for value in (bar.median, bar.low, bar.high))
    middle = x + width / 2
    return (
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{width - 4:.1f}" height="{floor - top:.1f}" fill="{color}"/>\n'
        f'<line x1="{middle - 2:.1f}" y1="{low:.1f}" x2="{middle - 2:.1f}" y2="{high:.1f}" stroke="#333"/>\n'
        + _text(middle - 2, high - 5, f"{bar.median:.0f}")
    )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>\n'

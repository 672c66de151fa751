"""Lines over a logarithmic axis as an SVG file, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 720
_PANEL_HEIGHT: Final = 300
_TOP: Final = 40
_BOTTOM: Final = 48
_LEFT: Final = 56
_LEGEND: Final = 150
_COLORS: Final = (
    "#2f6fdb", "#e08e2b", "#4d9a5b", "#b04fc4", "#c43f3f", "#2aa3a3", "#7a6a4f", "#9aa5b1",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LinePanel:
    """One diagram: y from 0 to 1 as percent, x logarithmic."""

    title: str
    x_title: str
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    """Name and points; x above 0."""


def draw_lines(panels: Sequence[LinePanel]) -> str:
    """The panels below each other."""
    height = _PANEL_HEIGHT * len(panels)
    body = "".join(_panel(panel, _PANEL_HEIGHT * number) for number, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{height}" fill="white"/>\n{body}</svg>\n'
    )


def _panel(panel: LinePanel, top: int) -> str:
    floor, ceiling, right = top + _PANEL_HEIGHT - _BOTTOM, top + _TOP, _WIDTH - _LEGEND
    ticks = sorted({x for _, points in panel.series for x, _ in points})
    span = math.log(ticks[-1] / ticks[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * math.log(x / ticks[0]) / span, floor - (floor - ceiling) * min(y, 1.1)

    parts = [_text(16, top + 20, panel.title, anchor="start", weight="bold")]
    for percent in range(0, 101, 20):
        _, y = place(ticks[0], percent / 100)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>\n')
        parts.append(_text(_LEFT - 8, y + 4, f"{percent} %", anchor="end"))
    parts += [_text(place(x, 0)[0], floor + 18, f"{x:g}") for x in ticks]
    parts.append(_text((_LEFT + right) / 2, floor + 36, panel.x_title))
    for number, (name, points) in enumerate(panel.series):
        color, y = _COLORS[number % len(_COLORS)], ceiling + 16 * number
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>\n')
        parts.append(f'<rect x="{right + 16}" y="{y}" width="12" height="12" fill="{color}"/>\n')
        parts.append(_text(right + 34, y + 10, name, anchor="start"))
    return "".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>\n'

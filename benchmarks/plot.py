"""Bars and lines as SVG, by hand: a few rectangles and lines need no plotting library.

Invariant: an image is well-formed XML, needs nothing from outside, and shows no number that was not given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from benchmarks.peers.results import Summary

_WIDTH: Final = 720
_HEIGHT: Final = 290
_TOP: Final = 62
_BOTTOM: Final = 48
_LEFT: Final = 64
_RIGHT: Final = 16
_CHARACTER: Final = 7
"""Width of a legend's character, about."""
_OWN: Final = "#2f6fdb"
_COLORS: Final = (
    "#9aa5b1", "#e08e2b", "#4d9a5b", "#b04fc4", "#c43f3f", "#2aa3a3", "#7a6a4f", "#5b5fc7",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bars:
    """One diagram: for each group one bar of each series; whiskers from the lowest to the highest repetition."""

    title: str
    groups: Sequence[str]
    series: Sequence[tuple[str, Sequence[Summary | None]]]
    """Name, and a bar for each group; None: not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """One diagram: x logarithmic, y from 0."""

    title: str
    x_title: str
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    """Name and points; x above 0."""
    highest: float = 0.0
    """End of the y axis; 0: by the points."""
    percent: bool = False
    """Write 0.4 as 40 %."""


Panel = Bars | Lines


def draw(panels: Sequence[Panel], *, own: str = "llmserve") -> str:
    """The panels below each other, each with its own scale from zero.

    A series has one colour in all panels, `own` that of the house.
    """
    height = _HEIGHT * len(panels)
    colors = _colors([name for panel in panels for name, _ in panel.series], own)
    body = "".join(part for number, panel in enumerate(panels) for part in _panel(panel, _HEIGHT * number, colors))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{height}" fill="white"/>\n{body}</svg>\n'
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """y from 0 to `highest` between two heights of the image."""

    floor: float
    ceiling: float
    highest: float
    percent: bool = False

    def at(self, value: float) -> float:
        return self.floor - (self.floor - self.ceiling) * min(value / self.highest, 1.0)

    def grid(self) -> Iterator[str]:
        """A line and a label at each round number."""
        step = _round_step(self.highest / 6)
        for index in range(int(self.highest / step + 1e-9) + 1):
            value = index * step
            label = f"{value:.0%}".replace("%", " %") if self.percent else f"{value:g}"
            y = self.at(value)
            yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#ddd"/>\n'
            yield _text(_LEFT - 8, y + 4, label, anchor="end")


def _round_step(least: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _panel(panel: Panel, top: int, colors_of: Mapping[str, str]) -> Iterator[str]:
    colors = [colors_of[name] for name, _ in panel.series]
    yield _text(16, top + 20, panel.title, anchor="start", weight="bold")
    x = float(_LEFT)
    for (name, _), color in zip(panel.series, colors, strict=True):
        yield f'<rect x="{x:.1f}" y="{top + 31}" width="12" height="12" fill="{color}"/>\n'
        yield _text(x + 18, top + 41, name, anchor="start")
        x += 36 + _CHARACTER * len(name)
    floor, ceiling = top + _HEIGHT - _BOTTOM, top + _TOP
    if isinstance(panel, Bars):
        yield from _bars(panel, floor, ceiling, colors)
    else:
        yield from _lines(panel, floor, ceiling, colors)


def _colors(names: Iterable[str], own: str) -> dict[str, str]:
    others = itertools.cycle(_COLORS)
    return {name: _OWN if name == own else next(others) for name in dict.fromkeys(names)}


def _bars(panel: Bars, floor: float, ceiling: float, colors: Sequence[str]) -> Iterator[str]:
    highest = max((bar.high for _, bars in panel.series for bar in bars if bar), default=0.0) or 1.0
    axis = _Axis(floor, ceiling, highest * 1.1)
    yield from axis.grid()
    group_width = (_WIDTH - _LEFT - _RIGHT) / max(1, len(panel.groups))
    bar_width = min(70.0, group_width * 0.8 / len(panel.series))
    for index, group in enumerate(panel.groups):
        middle = _LEFT + group_width * (index + 0.5)
        yield _text(middle, floor + 18, group)
        first = middle - bar_width * len(panel.series) / 2
        for number, (_, bars) in enumerate(panel.series):
            bar = bars[index]
            if bar is not None:
                yield _bar(first + bar_width * number, bar_width, axis, bar, colors[number])


def _bar(x: float, width: float, axis: _Axis, bar: Summary, color: str) -> str:
    top, low, high = (axis.at(value) for value in (bar.median, bar.low, bar.high))
    middle = x + width / 2 - 2
    return (
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{width - 4:.1f}" height="{axis.floor - top:.1f}" fill="{color}"/>\n'
        f'<line x1="{middle:.1f}" y1="{low:.1f}" x2="{middle:.1f}" y2="{high:.1f}" stroke="#333"/>\n'
        + _text(middle, high - 5, f"{bar.median:.0f}")
    )


def _lines(panel: Lines, floor: float, ceiling: float, colors: Sequence[str]) -> Iterator[str]:
    points = [point for _, line in panel.series for point in line]
    highest = panel.highest or max((y for _, y in points), default=0.0) * 1.1 or 1.0
    axis = _Axis(floor, ceiling, highest, panel.percent)
    yield from axis.grid()
    ticks = sorted({x for x, _ in points})
    span = math.log(ticks[-1] / ticks[0]) if len(ticks) > 1 else 0.0
    right = _WIDTH - _RIGHT - 24

    def place(x: float) -> float:
        share = math.log(x / ticks[0]) / span if span else 0.5
        return _LEFT + 24 + (right - _LEFT - 24) * share

    for x in ticks:
        yield _text(place(x), floor + 18, f"{x:g}")
    yield _text((_LEFT + right) / 2, floor + 36, panel.x_title)
    for (_, line), color in zip(panel.series, colors, strict=True):
        placed = [(place(x), axis.at(y)) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>\n'
        for x, y in placed:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>\n'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>\n'

"""The plots: well-formed, to scale, and nothing from outside."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.peers.results import Summary
from benchmarks.plot import Bars, Lines, Panel, draw

SVG = "{http://www.w3.org/2000/svg}"


def parsed(panel: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(draw([panel]))


def texts(image: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in image.iter(f"{SVG}text")]


def bars_of(image: ElementTree.Element) -> list[ElementTree.Element]:
    """Rectangles but for the background and the legend's."""
    return [one for one in list(image.iter(f"{SVG}rect"))[1:] if one.get("height") != "12"]


def test_bars_grow_with_values() -> None:
    panel = Bars("t <1>", ["a", "b"], [("s", [Summary.of([1.0, 3.0, 2.0]), Summary.of([4.0])])])
    image = parsed(panel)
    first, second = (float(bar.get("height") or 0) for bar in bars_of(image))
    assert second == pytest.approx(2 * first, rel=0.01)
    assert "t <1>" in texts(image)


def test_what_was_not_measured_has_no_bar() -> None:
    image = parsed(Bars("t", ["a", "b"], [("s", [None, Summary.of([4.0])]), ("llmserve", [Summary.of([1.0]), None])]))
    assert len(bars_of(image)) == 2


def test_our_colour_is_ours_in_every_order() -> None:
    one = [Summary.of([1.0])]
    for names in (["llmserve", "peer"], ["peer", "llmserve"], ["x", "peer", "llmserve"]):
        colors = [bar.get("fill") for bar in bars_of(parsed(Bars("t", ["a"], [(name, one) for name in names])))]
        assert len(set(colors)) == len(names)
        assert colors[names.index("llmserve")] == "#2f6fdb"


def test_a_series_has_one_colour_in_all_panels() -> None:
    one = [Summary.of([1.0])]
    panels = [Bars("t", ["a"], [(name, one) for name in names]) for names in (["x", "z"], ["x", "y", "z"])]
    colors = [bar.get("fill") for bar in bars_of(ElementTree.fromstring(draw(panels)))]
    assert colors[:2] == [colors[2], colors[4]]
    assert len(set(colors)) == 3


def test_lines_are_to_scale() -> None:
    """Equal ratios of x are equal distances; y is linear from zero."""
    image = parsed(Lines(title="t", x_title="x", series=[("s", [(1, 1.0), (4, 2.0), (16, 4.0)])]))
    (line,) = image.iter(f"{SVG}polyline")
    points = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=0.2)


@pytest.mark.parametrize(
    ("highest", "percent", "expected"), [(1.1, True, ["0 %", "20 %", "100 %"]), (47.0, False, ["0", "10", "40"])]
)
def test_the_scale_has_round_numbers(highest: float, percent: bool, expected: list[str]) -> None:
    panel = Lines(title="t", x_title="x", series=[("s", [(1, 0.5), (2, 0.6)])], highest=highest, percent=percent)
    assert set(expected) <= set(texts(parsed(panel)))


def test_one_point_and_all_zeros_can_be_drawn() -> None:
    parsed(Lines(title="t", x_title="x", series=[("s", [(3, 0.0)])]))
    parsed(Bars("t", ["a"], [("s", [Summary.of([0.0])])]))

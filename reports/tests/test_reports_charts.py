"""Drawings: the bound is drawn and named, implementations are labelled beside their line, labels do not overlap."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from kda_reports import charts
from kda_reports.envelopes import Panel, Series


def frame(names: list[str], top: float = 100.0) -> charts.Frame:
    return charts.Frame(names=names, top=top, x_title="token", x_domain=(0.0, 64.0), log_x=False)


def series(name: str, *ratios: float) -> Series:
    return Series(name=name, points=[(float(8 * i), ratio) for i, ratio in enumerate(ratios)], num_measures=1)


def texts(svg: str) -> dict[str, float]:
    """Return the texts of a drawing that stand by themselves, with their height on the page."""
    root = ET.fromstring(svg)  # noqa: S314 - our own drawing
    found = {}
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        place = re.fullmatch(r"translate\(([^,]+),([^)]+)\)", element.get("transform", ""))
        assert place is not None
        found[element.text or ""] = float(place[2])
    return found


def test_the_bound_is_a_labelled_line() -> None:
    svg = charts.draw(Panel(tensor="o", series=[series("a", 0.1, 0.2)]), frame(["a"]))
    assert "bound = 1" in texts(svg)
    assert f'stroke="{charts.LIMIT}"' in svg


def test_every_implementation_is_labelled_where_its_line_ends() -> None:
    panel = Panel(tensor="o", series=[series("low", 9.0, 0.02), series("high", 0.02, 9.0)])
    places = texts(charts.draw(panel, frame(["low", "high"])))
    assert places["high"] < places["low"]


def test_labels_of_lines_that_end_together_stand_apart() -> None:
    names = [f"implementation-{i}" for i in range(8)]
    for end in (1e-9, 0.5, 1e9):
        panel = Panel(tensor="o", series=[series(name, 0.5, end) for name in names])
        places = sorted(height for text, height in texts(charts.draw(panel, frame(names))).items() if text in names)
        assert len(places) == len(names)
        assert all(below - above >= charts.LABEL_STEP - 0.1 for above, below in pairwise(places))
        assert places[0] > -charts.LABEL_STEP
        assert places[-1] < charts.HEIGHT + charts.LABEL_STEP


def test_an_implementation_keeps_its_colour_and_dash_in_every_panel() -> None:
    alone = charts.draw(Panel(tensor="o", series=[series("b", 0.1, 0.2)]), frame(["a", "b"]))
    assert charts.COLOURS[1] in alone
    assert charts.COLOURS[0] not in alone
    assert 'stroke-dasharray="5,2"' in alone


def test_an_error_that_is_not_finite_is_marked() -> None:
    finite = charts.draw(Panel(tensor="o", series=[series("a", 0.1, 0.2)]), frame(["a"]))
    broken = charts.draw(Panel(tensor="o", series=[series("a", 0.1, math.inf)]), frame(["a"]))
    assert "triangle-up" not in finite
    assert broken.count(f'fill="{charts.COLOURS[0]}"') == finite.count(f'fill="{charts.COLOURS[0]}"') + 1


def test_zero_and_huge_errors_stay_inside_the_frame() -> None:
    svg = charts.draw(Panel(tensor="o", series=[series("a", 0.0, 1e300, 0.5)]), frame(["a"]))
    lines = re.findall(r'd="(M[^"]+)" fill="none"|aria-roledescription="line mark" d="(M[^"]+)"', svg)
    heights = [float(number) for line in lines for part in line for number in re.findall(r",(-?[\d.]+)", part)]
    assert heights
    assert min(heights) >= 0
    assert max(heights) <= charts.HEIGHT


@pytest.mark.parametrize(
    ("ratios", "top"),
    [((0.1,), 10.0), ((5.0,), 10.0), ((10.5, math.inf), 100.0), ((1e30,), charts.CEILING), ((), 10.0)],
)
def test_the_error_axis_ends_above_the_bound_and_every_finite_error(ratios: tuple[float, ...], top: float) -> None:
    assert charts.top_of([Panel(tensor="o", series=[series("a", *ratios)])]) == top


def test_a_logarithmic_position_is_labelled_in_powers_of_ten() -> None:
    decay = charts.Frame(names=["a"], top=10.0, x_title="nats", x_domain=(1e-3, 1e4), log_x=True)
    svg = charts.draw(
        Panel(tensor="o", series=[Series(name="a", points=[(0.01, 0.1), (100, 0.1)], num_measures=1)]), decay
    )
    assert {"0.01", "1", "100"} <= set(texts(svg))


def test_a_long_name_is_cut_so_that_it_stays_inside() -> None:
    name = "package.module.somewhere:implementation"
    labels = [
        text
        for text in texts(charts.draw(Panel(tensor="o", series=[series(name, 0.1)]), frame([name])))
        if "package" in text
    ]
    assert labels == [name[: charts.LONGEST_LABEL - 1] + "~"]


def test_the_same_envelopes_give_the_same_bytes() -> None:
    panel = Panel(tensor="o", series=[series("a", 0.1, 0.2)])
    assert charts.draw(panel, frame(["a"])) == charts.draw(panel, frame(["a"]))

"""Charts: envelopes drawn as SVG, one small panel per tensor, to stand inside a page.

Layout is explicit rather than fitted to text, so that the same envelopes give the same bytes whatever fonts are
installed. The colours stand for themselves in a file of their own; inside the page, a style sheet maps each of them
to one that suits its background.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import altair as alt
import vl_convert

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.envelopes import Panel, Series

INK, GRID, LIMIT = "#1c1e21", "#d9dce1", "#b3261e"
# Okabe and Ito's hues, darkened until small labels can be read on white; dashes tell the series apart without colour.
COLOURS = ("#0067a5", "#a85b00", "#00755a", "#93457a", "#5b5f66", "#2e7fb0", "#7a6a00", "#bf4f6b")
DASHES: tuple[list[float], ...] = ([1, 0], [5, 2], [1.5, 1.5], [7, 2, 1.5, 2], [3, 3], [9, 3], [1, 3], [5, 2, 1, 2])
WIDTH, HEIGHT = 208, 150
MARGIN = {"left": 38, "top": 8, "right": 118, "bottom": 34}
FONT_SIZE, LABEL_STEP, LONGEST_LABEL = 9.5, 11, 22
FLOOR, CEILING = 1e-2, 1e6
ABOVE_THE_LINE = -6
MOST_TICKS = 6
VEGALITE = "6.4"
X_STYLE: dict[str, Any] = {
    "grid": False,
    "domainColor": GRID,
    "tickColor": GRID,
    "tickSize": 4,
    "labelColor": INK,
    "labelFontSize": FONT_SIZE,
    "labelOverlap": False,
    "titleColor": INK,
    "titleFontSize": FONT_SIZE,
    "titleFontWeight": "normal",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What the panels of one figure share.

    Attributes
    ----------
    names
        All implementations of the page, so that each keeps its colour and dash in every panel.
    top
        Upper end of the logarithmic error axis, which begins at ``FLOOR``.
    x_title, x_domain, log_x
        The horizontal axis; on a logarithmic one the domain is positive.
    ticks
        Where it is marked; empty leaves that to the axis.
    """

    names: Sequence[str]
    top: float
    x_title: str
    x_domain: tuple[float, float]
    log_x: bool
    ticks: Sequence[float] = ()


def top_of(panels: Sequence[Panel]) -> float:
    """Return the power of ten above the bound and above every finite point, at most ``CEILING``."""
    return top_of_values([ratio for panel in panels for series in panel.series for _, ratio in series.points])


def top_of_values(ratios: Sequence[float]) -> float:
    """Return the power of ten above the bound and above every finite ratio, at most ``CEILING``."""
    largest = max((ratio for ratio in ratios if math.isfinite(ratio)), default=1.0)
    return min(CEILING, float(10 ** max(1, math.ceil(math.log10(max(largest, 1.0))))))


def draw(panel: Panel, frame: Frame) -> str:
    """Draw one panel and return it as an ``<svg>`` element."""
    x = alt.X("x:Q", title=frame.x_title, scale=scale_of(frame.x_domain, log=frame.log_x), axis=_x_axis(frame))
    y = alt.Y("y:Q", title=None, scale=scale_of((FLOOR, frame.top), log=True), axis=y_axis(decades(FLOOR, frame.top)))
    colour = alt.Color("name:N", scale=cycled(COLOURS, frame.names), legend=None)
    dash = alt.StrokeDash("name:N", scale=cycled(DASHES, frame.names), legend=None)
    points = [point for series in panel.series for point in _points(series, frame)]
    ends = {series.name: series.points[-1][1] for series in panel.series}
    places = apart(ends, (FLOOR, frame.top), HEIGHT)
    labels = data_of([{"name": name, "label": short(name), "y": place} for name, place in places.items()])
    limit = data_of([{"y": 1.0, "label": "bound = 1"}])
    text: dict[str, Any] = {"baseline": "middle", "fontSize": FONT_SIZE}
    chart = alt.layer(
        limit.mark_rule(color=LIMIT, strokeWidth=1.2).encode(y=y),
        limit.mark_text(color=LIMIT, dy=ABOVE_THE_LINE, align="right", **text).encode(
            x=alt.value(WIDTH - 2), y=y, text="label:N"
        ),
        data_of(points).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=colour, strokeDash=dash),
        data_of([point for point in points if not point["finite"]])
        .mark_point(shape="triangle-up", filled=True, size=46, opacity=1)
        .encode(x=x, y=y, color=colour),
        labels.mark_rule(strokeWidth=1.5).encode(
            x=alt.value(WIDTH + 4), x2=alt.value(WIDTH + 17), y=y, color=colour, strokeDash=dash
        ),
        labels.mark_text(align="left", **text).encode(x=alt.value(WIDTH + 21), y=y, text="label:N", color=colour),
    )
    return as_svg(chart, WIDTH, HEIGHT)


def as_svg(
    chart: alt.LayerChart | alt.FacetChart, width: float, height: float, margin: Mapping[str, float] = MARGIN
) -> str:
    """Return a chart as an ``<svg>`` element, its panel of the given size within the margins."""
    chart = chart.properties(width=width, height=height, padding=dict(margin), autosize="none")
    chart = chart.configure(font="sans-serif", background="transparent", view=alt.ViewConfig(stroke="transparent"))
    # Altair's own validation looks at every value of the data, which takes most of the time that a page takes.
    return str(vl_convert.vegalite_to_svg(chart.to_dict(validate=False), vl_version=VEGALITE))


def data_of(values: list[dict[str, Any]]) -> alt.Chart:
    """Return a chart of values that stand in the chart itself."""
    return alt.Chart(alt.Data(values=values))  # type: ignore[no-untyped-call]


def dots(points: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Return the data of a line that is broken after every point: one path, where a mark for each point would be most of a page.

    Draw it with round caps and ``order:Q``.
    """
    pairs = [(x, y) for x, height in points for y in (height, height, None)]
    return [{"x": x, "y": y, "order": i} for i, (x, y) in enumerate(pairs)]


def cycled(choices: Sequence[Any], names: Sequence[str]) -> alt.Scale:
    """Return the scale that gives each name its choice, again from the first when they run out."""
    return alt.Scale(domain=list(names), range=[choices[i % len(choices)] for i in range(len(names))])


def _points(series: Series, frame: Frame) -> list[dict[str, Any]]:
    return [
        {"name": series.name, "x": x, "y": min(max(ratio, FLOOR), frame.top), "finite": math.isfinite(ratio)}
        for x, ratio in series.points
    ]


def scale_of(domain: tuple[float, float], *, log: bool) -> alt.Scale:
    """Return the scale of an axis that spans exactly its domain."""
    return alt.Scale(type="log" if log else "linear", domain=list(domain), nice=False, zero=False)


def _x_axis(frame: Frame) -> alt.Axis:
    if frame.ticks:
        return alt.Axis(values=list(frame.ticks), format="~g", **X_STYLE)
    if not frame.log_x:
        return alt.Axis(tickCount=4, **X_STYLE)
    return alt.Axis(values=decades(*frame.x_domain), format="~g", **X_STYLE)


def y_axis(values: Sequence[float]) -> alt.Axis:
    """Return a vertical axis with a line across the panel at each value."""
    return alt.Axis(
        values=list(values),
        format="~g",
        domain=False,
        ticks=False,
        gridColor=GRID,
        gridWidth=0.6,
        labelColor=INK,
        labelFontSize=FONT_SIZE,
        labelOverlap=False,
    )


def decades(low: float, high: float) -> list[float]:
    """Return the powers of ten within a range, only the even ones when there are many."""
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**exponent for exponent in exponents if len(exponents) <= MOST_TICKS or exponent % 2 == 0]


def apart(ends: Mapping[str, float], domain: tuple[float, float], height: float) -> dict[str, float]:
    """Return where on a logarithmic axis the label of each series stands: at its last point, moved until labels stand apart."""
    low, high = math.log10(domain[0]), math.log10(domain[1])
    step = min(LABEL_STEP / height, 1 / len(ends)) * (high - low)
    ordered = sorted((math.log10(min(max(end, domain[0]), domain[1])), name) for name, end in ends.items())
    places: list[float] = []
    for end, _ in ordered:
        places.append(max(end, places[-1] + step) if places else end)
    # What was pushed beyond the top comes back down, and pushes its neighbours down in turn.
    ceiling = high
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - step
    return {name: 10**place for place, (_, name) in zip(places, ordered, strict=True)}


def short(name: str) -> str:
    """Return a name as its label has room for it."""
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "~"


def without_namespaces(svg: str) -> str:
    """Drop the namespace addresses, which an SVG inside HTML does not need: the page then holds no address at all."""
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)

"""Charts of times: a median with its quartiles against a size, both axes logarithmic, one panel per comparison."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import altair as alt

from kda_reports import charts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.timings import Comparison

WIDTH, HEIGHT = 260, 190
MARGIN = 1.2
MOST_X_TICKS = 6
BINARY_THOUSANDS = "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'K' : datum.value"
STEPS = (1.0, 2.0, 5.0)
AXIS_TITLES = {"T": "tokens T", "H": "heads H", "B": "batch rows B", "C": "tokens per chunk C"}


def draw(panel: Comparison, names: Sequence[str], *, unit: float) -> str:
    """Draw one panel and return it as an ``<svg>`` element.

    Parameters
    ----------
    panel
        At least one curve, all values positive.
    names
        All sides of the page, so that each keeps its colour and dash in every panel.
    unit
        What one step of the vertical axis is worth: 1e-3 draws seconds as milliseconds.
    """
    points: list[dict[str, Any]] = [
        {"name": curve.name, "x": x, "y": y / unit, "low": low / unit, "high": high / unit}
        for curve in panel.curves
        for x, y, low, high in curve.points
    ]
    sizes = sorted({point["x"] for point in points})
    domain = _around([point[name] for point in points for name in ("low", "high")])
    ticks = [
        step * 10**i
        for i in range(math.floor(math.log10(domain[0])), math.ceil(math.log10(domain[1])))
        for step in STEPS
    ]
    shown = sizes[:: math.ceil(len(sizes) / MOST_X_TICKS)]
    x = alt.X(
        "x:Q",
        title=AXIS_TITLES[panel.axis],
        scale=charts.scale_of(_around(sizes), log=True),
        axis=alt.Axis(values=shown, labelExpr=BINARY_THOUSANDS, **charts.X_STYLE),
    )
    y_scale = charts.scale_of(domain, log=True)
    axis = charts.y_axis([tick for tick in ticks if domain[0] <= tick <= domain[1]])
    y = alt.Y("y:Q", title=None, scale=y_scale, axis=axis)
    colour = alt.Color("name:N", scale=charts.cycled(charts.COLOURS, names), legend=None)
    dash = alt.StrokeDash("name:N", scale=charts.cycled(charts.DASHES, names), legend=None)
    places = charts.apart({curve.name: curve.points[-1][1] / unit for curve in panel.curves}, domain, HEIGHT)
    labels = charts.data_of([{"name": name, "label": charts.short(name), "y": place} for name, place in places.items()])
    text: dict[str, Any] = {"baseline": "middle", "fontSize": charts.FONT_SIZE, "align": "left"}
    data = charts.data_of(points)
    chart = alt.layer(
        data.mark_rule(strokeWidth=3, opacity=0.35).encode(
            x=x, y=alt.Y("low:Q", title=None, scale=y_scale, axis=axis), y2="high:Q", color=colour
        ),
        data.mark_line(strokeWidth=1.5).encode(x=x, y=y, color=colour, strokeDash=dash),
        data.mark_point(filled=True, size=18, opacity=1).encode(x=x, y=y, color=colour),
        labels.mark_text(**text).encode(x=alt.value(WIDTH + 8), y=y, text="label:N", color=colour),
    )
    return charts.as_svg(chart, WIDTH, HEIGHT)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Return a range that holds all values and a margin on either side."""
    return min(values) / MARGIN, max(values) * MARGIN

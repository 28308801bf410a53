"""Charts of series over commits: the values, the levels between steps, and a mark on each relevant step."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import altair as alt

from kda_reports import charts
from kda_reports.quantities import scale_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.trends import Series

WIDTH, HEIGHT = 430, 130
MARGIN = {"left": 52, "top": 12, "right": 12, "bottom": 30}
ROOM, DOT = 0.08, 3.2
VALUE, LEVEL = charts.COLOURS[0], charts.COLOURS[1]


def draw(series: Series) -> str:
    """Draw a series and return it as an ``<svg>`` element; values that are not finite lie on its upper edge as triangles."""
    values = [point.value for point in series.points]
    finite = [value for value in values if math.isfinite(value)]
    unit, name = scale_of(max((abs(value) for value in finite), default=1.0), series.metric.unit)
    low, high = min(finite, default=0.0) / unit, max(finite, default=1.0) / unit
    room = (high - low) * ROOM or abs(high) * ROOM or 1.0
    domain = (low - room, high + room)
    last = max(1, len(values) - 1)
    shown = sorted({0, len(values) // 2, len(values) - 1})
    dates = {str(i): series.points[i].moment[:10] for i in shown}
    x = alt.X(
        "x:Q",
        title="commits, by their time",
        scale=charts.scale_of((0.0, float(last)), log=False),
        axis=alt.Axis(values=shown, labelExpr=f"{json.dumps(dates)}[datum.value]", **charts.X_STYLE),
    )
    axis = alt.Axis(
        tickCount=4,
        domain=False,
        ticks=False,
        gridColor=charts.GRID,
        gridWidth=0.6,
        labelColor=charts.INK,
        labelFontSize=charts.FONT_SIZE,
        titleColor=charts.INK,
        titleFontSize=charts.FONT_SIZE,
        titleFontWeight="normal",
    )
    y = alt.Y("y:Q", title=name, scale=charts.scale_of(domain, log=False), axis=axis)
    points = [
        {"x": i, "y": value / unit if math.isfinite(value) else domain[1], "finite": math.isfinite(value)}
        for i, value in enumerate(values)
    ]
    data = charts.data_of(points)
    levels = charts.data_of(_levels(series, unit, domain))
    steps: list[dict[str, Any]] = [{"x": step.position} for step in series.course.steps if step.relevant]
    chart = alt.layer(
        charts.data_of(steps).mark_rule(color=charts.LIMIT, strokeWidth=1.2, strokeDash=[4, 3], aria=False).encode(x=x),
        data.mark_line(color=VALUE, strokeWidth=0.8, opacity=0.55, aria=False).encode(x=x, y=y),
        charts.data_of(charts.dots([(point["x"], point["y"]) for point in points if point["finite"]]))
        .mark_line(color=VALUE, strokeWidth=DOT, strokeCap="round", aria=False)
        .encode(x=x, y=y, order="order:Q"),
        charts.data_of([point for point in points if not point["finite"]])
        .mark_point(color=charts.LIMIT, shape="triangle-up", filled=True, size=46, opacity=1, aria=False)
        .encode(x=x, y=y),
        levels.mark_line(color=LEVEL, strokeWidth=1.8, aria=False).encode(x=x, y=y, detail="level:N"),
    )
    return charts.as_svg(chart, WIDTH, HEIGHT, MARGIN)


def _levels(series: Series, unit: float, domain: tuple[float, float]) -> list[dict[str, Any]]:
    """Return the ends of each level between steps; a drift is no level."""
    count, steps = len(series.points), series.course.steps
    if series.course.drift is not None or not steps:
        return []
    heights = [steps[0].before, *(step.after for step in steps)]
    places: Sequence[int] = [0, *(step.position for step in steps), count]
    return [
        {"x": x, "y": min(max(height / unit, domain[0]), domain[1]), "level": i}
        for i, height in enumerate(heights)
        if math.isfinite(height)
        for x in (places[i], places[i + 1] - 1)
    ]

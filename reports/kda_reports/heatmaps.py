"""Heat maps: where among heads and channels the worst tensor of an implementation errs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import altair as alt
from markupsafe import Markup

from kda_reports import charts
from kda_reports.errors import gravity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.errors import Standing
    from kda_reports.rows import Measure

WIDTH, TALLEST, LOWEST, CELL = 300, 190, 90, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """The map of one tensor, drawn.

    Attributes
    ----------
    standing
        The implementation.
    measure
        Its measurement with the largest score among those that have a map.
    drawing
        An ``<svg>`` element.
    """

    standing: Standing
    measure: Measure
    drawing: Markup


def heat_maps(standings: Sequence[Standing]) -> list[HeatMap]:
    """Return a map for each implementation that has one, of its worst tensor."""
    found = []
    for standing in standings:
        mapped = [measure for measure in standing.run.measures if measure.by_channel]
        if mapped:
            worst = max(mapped, key=lambda measure: gravity(measure.score))
            drawing = Markup(charts.without_namespaces(draw(worst)))  # noqa: S704 - it holds no foreign text, only numbers
            found.append(HeatMap(standing=standing, measure=worst, drawing=drawing))
    return found


def draw(measure: Measure) -> str:
    """Draw the map of a measurement and return it as an ``<svg>`` element; colours are logarithmic, from a hundredth of the bound."""
    rows, columns = len(measure.by_channel), len(measure.by_channel[0])
    height = max(LOWEST, min(TALLEST, CELL * rows))
    cells = [
        {
            "left": i * measure.channel_step,
            "right": (i + 1) * measure.channel_step,
            "above": k * measure.head_step,
            "below": (k + 1) * measure.head_step,
            "ratio": min(max(gravity(ratio), charts.FLOOR), charts.CEILING),
        }
        for k, line in enumerate(measure.by_channel)
        for i, ratio in enumerate(line)
    ]
    top = charts.top_of_values([cell["ratio"] for cell in cells])
    colour = alt.Color(
        "ratio:Q",
        scale=alt.Scale(type="log", domain=[charts.FLOOR, top], scheme="cividis"),
        # A gradient would be referred to by an address, of which the page has none.
        legend=alt.Legend(
            type="symbol",
            symbolType="square",
            values=charts.decades(charts.FLOOR, top),
            title="error over bound",
            format="~g",
            labelColor=charts.INK,
            titleColor=charts.INK,
            labelFontSize=charts.FONT_SIZE,
            titleFontSize=charts.FONT_SIZE,
            titleFontWeight="normal",
        ),
    )
    x_scale, y_scale = (
        alt.Scale(domain=[0, columns * measure.channel_step], nice=False),
        alt.Scale(domain=[rows * measure.head_step, 0], nice=False),
    )
    axis = {**charts.X_STYLE, "tickMinStep": 1, "tickCount": 4}
    chart = alt.layer(
        charts.data_of(cells)
        .mark_rect(aria=False)
        .encode(
            x=alt.X("left:Q", title="channel", scale=x_scale, axis=alt.Axis(**axis)),
            x2="right:Q",
            y=alt.Y("above:Q", title="head", scale=y_scale, axis=alt.Axis(**axis)),
            y2="below:Q",
            color=colour,
        )
    )
    return charts.as_svg(chart, WIDTH, height, {"left": 38, "top": 8, "right": 110, "bottom": 34})

"""Charts as inline SVG: static, no script, colour-blind safe, with the bound drawn and named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import vl_convert

if TYPE_CHECKING:
    from kda_reports.errors import Point

# Okabe and Ito's palette, without yellow: distinguishable by people with any common colour blindness, on white and on black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKS = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
INK = "#767676"
PANEL_WIDTH, PANEL_HEIGHT = 330, 220


def ratio_chart(points: list[Point], x_title: str) -> str:
    """Return small multiples of error over bound, one panel per tensor group, as an SVG element; empty when there is nothing to draw."""
    if not points:
        return ""
    names = list(dict.fromkeys(point.implementation for point in points))
    rows = [{"implementation": p.implementation, "group": p.group, "x": p.x, "ratio": p.ratio} for p in points]
    scale = alt.Scale(domain=names, range=[PALETTE[i % len(PALETTE)] for i in range(len(names))])
    shape = alt.Scale(domain=names, range=[MARKS[i % len(MARKS)] for i in range(len(names))])
    panels = []
    for group in sorted({row["group"] for row in rows}, reverse=True):
        data = alt.Data(values=[row for row in rows if row["group"] == group])
        base = alt.Chart(data, title=str(group)).encode(
            x=alt.X("x:Q", title=x_title, scale=alt.Scale(type="log")),
            y=alt.Y("ratio:Q", title="error / bound", scale=alt.Scale(type="log")),
            color=alt.Color("implementation:N", scale=scale, title=None, legend=alt.Legend(orient="bottom", columns=2)),
        )
        bound = alt.Chart(alt.Data(values=[{"y": 1.0, "label": "bound"}])).encode(y=alt.Y("y:Q"))
        drawn = (
            base.mark_line(strokeWidth=1.4)
            + base.mark_point(size=26, filled=True, opacity=0.9).encode(shape=alt.Shape("implementation:N", scale=shape, title=None))
            + bound.mark_rule(strokeDash=[5, 3], color=INK)
            + bound.mark_text(align="left", dx=4, dy=-6, color=INK, fontSize=11).encode(x=alt.value(0), text="label:N")
        )
        panels.append(drawn.properties(width=PANEL_WIDTH, height=PANEL_HEIGHT))
    chart = alt.hconcat(*panels).configure(background="transparent", font="system-ui, sans-serif").configure_axis(
        labelColor=INK, titleColor=INK, gridOpacity=0.25, domainColor=INK, tickColor=INK
    ).configure_legend(labelColor=INK, labelLimit=260).configure_title(color=INK, fontSize=13, anchor="start").configure_view(stroke=None)  # fmt: skip
    svg: str = vl_convert.vegalite_to_svg(chart.to_json())
    return svg

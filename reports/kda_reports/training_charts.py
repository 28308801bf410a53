"""Charts of training: a quantity against steps, one panel per task and length, and the shares of a step's components."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import altair as alt

from kda_reports import charts

if TYPE_CHECKING:
    from collections.abc import Callable

    from kda_reports.training import Point, Throughput
    from kda_reports.training_panels import Comparison, Panel

LEAST_SHOWN = 1e-6
COLUMNS = 3
TITLE = 18
SVG = "http://www.w3.org/2000/svg"
BAR, BAR_WIDTH = 22, 300
BAR_MARGIN = {"left": 118, "top": 8, "right": 58, "bottom": 34}
SHARE_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LABEL: dict[str, Any] = {"baseline": "middle", "fontSize": charts.FONT_SIZE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """What is plotted of each point; what is not finite is left out, and 0 lies on the lower edge of a logarithmic axis."""

    identifier: str
    title: str
    caption: str
    of: Callable[[Point], float]
    is_log: bool


ACCURACY = Quantity(
    identifier="accuracy",
    title="Accuracy against steps",
    caption="Share of right guesses in the batch of the step.",
    of=lambda point: point.accuracy,
    is_log=False,
)
WRONG = Quantity(
    identifier="wrong",
    title="Wrong guesses against steps",
    caption="1 - accuracy, on a logarithmic axis, which tells apart what is nearly 1; none wrong lies on the lower edge.",
    of=lambda point: 1 - point.accuracy,
    is_log=True,
)
LOSS = Quantity(
    identifier="loss",
    title="Loss against steps",
    caption="Mean negative log likelihood in nats where the task asks, on a logarithmic axis.",
    of=lambda point: point.loss,
    is_log=True,
)
QUANTITIES = (ACCURACY, WRONG, LOSS)


def draw(panel: Panel, comparison: Comparison, quantity: Quantity) -> str:
    """Draw one panel and return it as an ``<svg>`` element."""
    return charts.as_svg(_chart(panel, comparison, quantity), charts.WIDTH, charts.HEIGHT)


def picture(comparison: Comparison, quantity: Quantity) -> str:
    """Draw all panels and return them as one SVG file on white.

    The place of each is explicit, so that no installed font changes it.
    """
    width = charts.WIDTH + charts.MARGIN["left"] + charts.MARGIN["right"]
    height = charts.HEIGHT + charts.MARGIN["top"] + charts.MARGIN["bottom"] + TITLE
    columns = min(COLUMNS, len(comparison.panels))
    whole = f'width="{columns * width}" height="{-(-len(comparison.panels) // columns) * height + TITLE}"'
    parts = [f'<svg xmlns="{SVG}" {whole} font-family="sans-serif">', '<rect width="100%" height="100%" fill="white"/>']
    for i, panel in enumerate(comparison.panels):
        left, top = i % columns * width, i // columns * height + TITLE
        heading = f'x="{left + charts.MARGIN["left"]}" y="{top}" font-size="12" font-weight="bold" fill="{charts.INK}"'
        parts.append(f"<text {heading}>{html.escape(panel.title)}</text>")
        drawn = charts.without_namespaces(draw(panel, comparison, quantity))
        parts.append(drawn.replace("<svg ", f'<svg x="{left}" y="{top}" ', 1))
    return "\n".join([*parts, "</svg>\n"])


def draw_shares(throughput: Throughput) -> str:
    """Draw the components of a step as a bar cut into pieces, one below the other, and return it as an ``<svg>`` element.

    A piece begins where the one before ends. What is left over is negative where components that were timed alone add up to
    more than the step.
    """
    pieces: list[dict[str, Any]] = []
    start = 0.0
    for i, component in enumerate(throughput.components):
        end = start + component.share
        label = f"{100 * component.share:.1f} %"
        pieces.append(
            {
                "name": charts.short(component.name),
                "i": i,
                "low": start,
                "high": end,
                "end": max(start, end),
                "label": label,
            }
        )
        start = end
    least, most = min([0.0, *(piece["high"] for piece in pieces)]), max([1.0, *(piece["end"] for piece in pieces)])
    height = BAR * max(1, len(pieces))
    x = alt.X(
        "low:Q",
        title="share of the step",
        scale=charts.scale_of((least, most), log=False),
        axis=alt.Axis(values=list(SHARE_TICKS), format="%", **charts.X_STYLE),
    )
    y = alt.Y("i:O", title=None, axis=None, scale=alt.Scale(paddingInner=0.25))
    data = charts.data_of(pieces)
    chart = alt.layer(
        charts.data_of([{"low": 1.0}]).mark_rule(color=charts.LIMIT, strokeWidth=1.2).encode(x=x),
        data.mark_bar(color=charts.COLOURS[0]).encode(x=x, x2="high:Q", y=y),
        data.mark_text(color=charts.INK, align="right", **LABEL).encode(x=alt.value(-8), y=y, text="name:N"),
        data.mark_text(color=charts.INK, align="left", dx=5, **LABEL).encode(
            x=alt.X("end:Q", scale=charts.scale_of((least, most), log=False)), y=y, text="label:N"
        ),
    )
    return charts.as_svg(chart, BAR_WIDTH, height, BAR_MARGIN)


def _chart(panel: Panel, comparison: Comparison, quantity: Quantity) -> alt.LayerChart | alt.FacetChart:
    domain = _domain(comparison, quantity)
    last = max(run.final.step for _, run in panel.entries)
    x_axis = alt.Axis(tickCount=4, format="d", **charts.X_STYLE)
    x = alt.X("x:Q", title="steps", scale=charts.scale_of((0.0, float(last)), log=False), axis=x_axis)
    ticks = charts.decades(*domain) if quantity.is_log else list(SHARE_TICKS)
    y = alt.Y("y:Q", title=None, scale=charts.scale_of(domain, log=quantity.is_log), axis=charts.y_axis(ticks))
    colour = alt.Color("name:N", scale=charts.cycled(charts.COLOURS, comparison.names), legend=None)
    dash = alt.StrokeDash("name:N", scale=charts.cycled(charts.DASHES, comparison.names), legend=None)
    points: list[dict[str, Any]] = []
    stopped: list[dict[str, Any]] = []
    ends: dict[str, float] = {}
    for i, (name, run) in enumerate(panel.entries):
        found = [(point.step, quantity.of(point)) for point in run.points if math.isfinite(quantity.of(point))]
        placed: list[dict[str, Any]] = [
            {"name": name, "run": i, "x": step, "y": min(max(value, domain[0]), domain[1])} for step, value in found
        ]
        points += placed
        if placed:
            ends[name] = placed[-1]["y"]
            stopped += [] if run.ended else [placed[-1]]
    places = _apart(ends, domain, is_log=quantity.is_log) if ends else {}
    labels = charts.data_of([{"name": name, "label": charts.short(name), "y": place} for name, place in places.items()])
    return alt.layer(
        charts.data_of(points)
        .mark_line(strokeWidth=1.3, aria=False)
        .encode(x=x, y=y, color=colour, strokeDash=dash, detail="run:N"),
        charts.data_of(stopped)
        .mark_point(size=42, strokeWidth=1.5, opacity=1, aria=False)
        .encode(x=x, y=y, color=colour),
        labels.mark_rule(strokeWidth=1.5, aria=False).encode(
            x=alt.value(charts.WIDTH + 6), x2=alt.value(charts.WIDTH + 19), y=y, color=colour, strokeDash=dash
        ),
        labels.mark_text(align="left", **LABEL).encode(
            x=alt.value(charts.WIDTH + 23), y=y, text="label:N", color=colour
        ),
    )


def _domain(comparison: Comparison, quantity: Quantity) -> tuple[float, float]:
    """Return the range that all panels of a figure share: powers of ten around every positive value, or from 0 to 1."""
    if not quantity.is_log:
        return 0.0, 1.0
    values = [quantity.of(point) for run in comparison.runs for point in run.points]
    positive = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low = max(LEAST_SHOWN, 10.0 ** math.floor(math.log10(min(positive))))
    return low, max(10 * low, 10.0 ** math.ceil(math.log10(max(positive))))


def _apart(ends: dict[str, float], domain: tuple[float, float], *, is_log: bool) -> dict[str, float]:
    """Return where the label of each curve stands: at its end, moved until labels stand apart."""
    if is_log:
        return charts.apart(ends, domain, charts.HEIGHT)
    powers = charts.apart(
        {name: 10**end for name, end in ends.items()}, (10 ** domain[0], 10 ** domain[1]), charts.HEIGHT
    )
    return {name: math.log10(power) for name, power in powers.items()}

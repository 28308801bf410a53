"""Two runs side by side: the same calls of two implementations, or of one at two commits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import altair as alt
from markupsafe import Markup

from kda_reports import charts
from kda_reports.errors import GRAVEST_FIRST, gravity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.errors import Standing
    from kda_reports.rows import Measure

SIDE = 230
NUM_DIFFERENCES = 12
DOT = 3.6
MARGIN = {"left": 46, "top": 8, "right": 14, "bottom": 36}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor of one call that both measured; ``ratio`` is the second score over the first."""

    one: Measure
    two: Measure
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What two runs have in common, and where they differ.

    Attributes
    ----------
    standings
        The two.
    num_common, num_only
        Tensors of calls that both measured, and that only the first or only the second did.
    differences
        The largest differences of scores, either way.
    laws
        Laws whose outcome differs: first outcome, second outcome.
    drawing
        Scores of the first against those of the second; ``None`` when they have nothing in common.
    """

    standings: Sequence[Standing]
    num_common: int
    num_only: tuple[int, int]
    differences: Sequence[Difference]
    laws: Mapping[str, tuple[str, str]]
    drawing: Markup | None


def pair(standings: Sequence[Standing]) -> Pair | None:
    """Return two runs side by side, or ``None`` unless there are exactly two."""
    if len(standings) != 2:  # noqa: PLR2004 - a pair
        return None
    first, second = (_worst_by_call(standing) for standing in standings)
    common = [(first[key], second[key]) for key in first if key in second]
    differences = [Difference(one=one, two=two, ratio=_ratio(one.score, two.score)) for one, two in common]
    differences.sort(key=lambda difference: -abs(math.log(difference.ratio)))
    outcomes = [_outcomes(standing) for standing in standings]
    return Pair(
        standings=standings,
        num_common=len(common),
        num_only=(len(first) - len(common), len(second) - len(common)),
        differences=[one for one in differences if one.ratio != 1][:NUM_DIFFERENCES],
        laws={law: (old, outcomes[1][law]) for law, old in outcomes[0].items() if outcomes[1].get(law, old) != old},
        # A drawing holds no foreign text, only numbers.
        drawing=Markup(charts.without_namespaces(draw(common))) if common else None,  # noqa: S704
    )


def draw(common: Sequence[tuple[Measure, Measure]]) -> str:
    """Draw the scores of one run against those of another, both logarithmic, with the line of equal scores and both bounds."""
    pairs = [(gravity(one.score), gravity(two.score)) for one, two in common]
    top = charts.top_of_values([score for both in pairs for score in both])
    points = [(min(max(one, charts.FLOOR), top), min(max(two, charts.FLOOR), top)) for one, two in pairs]
    ends = [{"x": charts.FLOOR, "y": charts.FLOOR}, {"x": top, "y": top}]
    scale = charts.scale_of((charts.FLOOR, top), log=True)
    ticks = charts.decades(charts.FLOOR, top)
    x = alt.X(
        "x:Q", title="score of the first", scale=scale, axis=alt.Axis(values=ticks, format="~g", **charts.X_STYLE)
    )
    y = alt.Y(
        "y:Q", title="score of the second", scale=scale, axis=alt.Axis(values=ticks, format="~g", **charts.X_STYLE)
    )
    bound = charts.data_of([{"x": 1.0, "y": 1.0}])
    chart = alt.layer(
        bound.mark_rule(color=charts.LIMIT, strokeWidth=1.2, aria=False).encode(x=x),
        bound.mark_rule(color=charts.LIMIT, strokeWidth=1.2, aria=False).encode(y=y),
        charts.data_of(ends).mark_line(color=charts.GRID, strokeWidth=1.2, aria=False).encode(x=x, y=y),
        charts.data_of(charts.dots(points))
        .mark_line(color=charts.COLOURS[0], strokeWidth=DOT, strokeCap="round", aria=False)
        .encode(x=x, y=y, order="order:Q"),
    )
    return charts.as_svg(chart, SIDE, SIDE, MARGIN)


def _worst_by_call(standing: Standing) -> dict[tuple[str, ...], Measure]:
    found: dict[tuple[str, ...], Measure] = {}
    for measure in standing.run.measures:
        key = (measure.law, measure.case, measure.dtype, measure.tensor)
        if key not in found or gravity(measure.score) > gravity(found[key].score):
            found[key] = measure
    return found


def _ratio(one: float, two: float) -> float:
    """Return how many times larger the second is; scores below a hundredth of the bound count as that."""
    first, second = (min(max(gravity(score), charts.FLOOR), charts.CEILING) for score in (one, two))
    return second / first


def _outcomes(standing: Standing) -> dict[str, str]:
    """Return the gravest outcome of each law."""
    found: dict[str, str] = {}
    for verdict in standing.run.verdicts:
        found[verdict.law] = min(found.get(verdict.law, verdict.outcome), verdict.outcome, key=GRAVEST_FIRST.index)
    return found

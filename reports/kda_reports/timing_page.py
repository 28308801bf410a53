"""The page of a benchmark: charts and tables of times as one HTML file that asks for nothing from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from kda_reports import charts, timing_charts
from kda_reports.page import commit_of, side_by_side, templates
from kda_reports.timings import comparisons, operator_ratios

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.timings import Comparison, Timing

MILLI = 1e-3
AXIS_NAMES = {
    "T": "Time against tokens",
    "H": "Time against heads",
    "B": "Time against batch",
    "C": "Time against chunk length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Panels of one kind: ``unit`` is what a step of the vertical axis is worth, ``panels`` each with its drawing."""

    identifier: str
    title: str
    caption: str
    unit: float
    panels: Sequence[tuple[Comparison, Markup]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of the table: a timing, and its time relative to the first side that was timed on the workload in the run."""

    timing: Timing
    ratio: float | None

    @property
    def is_counted(self) -> bool:
        """Whether the bytes and operations that were counted are this side's: they are those of what is judged."""
        return self.timing.judged and self.timing.time is not None


def render_bench(timings: Sequence[Timing], unfinished: Sequence[str], sources: Sequence[str]) -> str:
    """Render the page of a benchmark.

    Parameters
    ----------
    timings
        What was read from the rows, at least one.
    unfinished
        Runs that have no proper end.
    sources
        Names of the rows files, as the page gives its data source.

    Returns
    -------
    str
        A complete HTML document.
    """
    names = list(dict.fromkeys(timing.implementation for timing in timings))
    runs = {timing.run: timing for timing in timings}
    versions = {timing.implementation: timing.version for timing in timings}
    return (
        templates()
        .get_template("bench.html")
        .render(
            figures=_figures(timings, names),
            workloads=_workloads(timings),
            refused=[timing for timing in timings if timing.outcome in ("red", "error")],
            num_measured=sum(timing.time is not None for timing in timings),
            machines=sorted(
                {str(timing.fingerprint.get("gpu") or timing.fingerprint.get("cpu")) for timing in timings}
            ),
            unfinished=unfinished,
            sources=sources,
            runs=list(runs.values()),
            versions=versions,
            commits=sorted({commit_of(timing.fingerprint) for timing in runs.values()}),
            fingerprint_rows=side_by_side([timing.fingerprint for timing in runs.values()]),
        )
    )


def _figures(timings: Sequence[Timing], names: Sequence[str]) -> list[Figure]:
    ratios = operator_ratios(timings)
    by_axis: dict[str, list[Comparison]] = {}
    for panel in comparisons(timings):
        by_axis.setdefault(panel.axis, []).append(panel)
    figures = [
        Figure(
            identifier=f"by-{axis}",
            title=AXIS_NAMES[axis],
            caption="Milliseconds a call: medians, with a bar from the first to the third quartile; both axes logarithmic.",
            unit=MILLI,
            panels=_drawn(panels, names, MILLI),
        )
        for axis, panels in by_axis.items()
    ]
    if ratios:
        caption = (
            "How many times longer each side takes than the KDA implementation named: ratio of medians; the bar spans what the "
            "quartiles of both allow; both axes logarithmic. DPLR and GDN are other operators and are not judged here."
        )
        drawn = _drawn(ratios, names, 1.0)
        figures.insert(
            0, Figure(identifier="operators", title="KDA, DPLR and GDN", caption=caption, unit=1.0, panels=drawn)
        )
    return figures


def _drawn(panels: Sequence[Comparison], names: Sequence[str], unit: float) -> list[tuple[Comparison, Markup]]:
    # The only foreign text in a drawing are names of implementations, which the renderer escapes.
    return [
        (panel, Markup(charts.without_namespaces(timing_charts.draw(panel, names, unit=unit))))  # noqa: S704
        for panel in panels
    ]


def _workloads(timings: Sequence[Timing]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    first: dict[tuple[str, str], float] = {}
    for timing in timings:
        ratio = None
        if timing.time is not None:
            ratio = timing.time.median / first.setdefault((timing.run, timing.workload), timing.time.median)
        found.setdefault(timing.workload, []).append(Line(timing=timing, ratio=ratio))
    return found

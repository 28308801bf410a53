"""The dashboard: pages that say what became worse, since which commit, and show every series; opened from files, loading nothing.

Rendering is pure: the same rows give the same files, and "now" is the newest commit of the history.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kda_reports import charts, trend_charts
from kda_reports.findings import WORDS, changed_versions, findings
from kda_reports.glossary import TREND_GLOSSARY
from kda_reports.markdown import findings_markdown
from kda_reports.measurement import plain
from kda_reports.metrics import METRICS, PAGES
from kda_reports.page import templates
from kda_reports.quantities import percent, quantity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kda_reports.findings import Finding, Findings
    from kda_reports.trends import Series, Trends

# What keeps a page under a few MB; what is left out is said on it, and is in the downloads.
MOST_CHARTS, MOST_POINTS = 100, 60
COLUMNS = (
    "page", "metric", "unit", "series", "implementation", "pass", "call", "dtype", "device", "machine", "commit", "moment", "value",
    "spread", "n", "runs",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A series on its page: what was found, and its drawing, ``None`` when the page has no room for it."""

    finding: Finding
    drawing: Markup | None

    @property
    def series(self) -> Series:
        """Return the series."""
        return self.finding.series

    @property
    def steps(self) -> Iterator[dict[str, Any]]:
        """Yield what is said of each step: its two commits, its levels and what else changed there."""
        for step in self.series.course.steps:
            last, first = self.series.points[step.position - 1], self.series.points[step.position]
            yield {"step": step, "last": last, "first": first, "versions": changed_versions(last, first)}


def render_dashboard(trends: Trends, days: int, num_corrupt: int) -> dict[str, str]:
    """Render the dashboard.

    Parameters
    ----------
    trends
        The history.
    days
        How long before the newest commit "then" is.
    num_corrupt
        Lines of the store that are no rows, which the pages mention.

    Returns
    -------
    dict[str, str]
        Texts by file name: ``index.html``, a page for each kind of metric that there is, ``history.csv``, ``history.json``, ``summary.md``.
    """
    found = findings(trends, days)
    by_page = {
        page: entries
        for page in PAGES
        if (entries := _entries([one for one in found.each if one.series.metric.page == page]))
    }
    shared = {
        "found": found,
        "trends": trends,
        "pages": list(by_page),
        "num_corrupt": num_corrupt,
        "words": WORDS,
        "metrics": METRICS,
        "quantity": quantity,
        "percent": percent,
        "first_moment": min(point.moment for series in trends.series for point in series.points),
        "glossary": TREND_GLOSSARY,
    }
    environment = templates()
    index, page = environment.get_template("dashboard.html"), environment.get_template("trends.html")
    files = {"index.html": index.render(**shared)}
    for name, entries in by_page.items():
        files[f"{name}.html"] = page.render(**shared, name=name, entries=entries, most_points=MOST_POINTS)
    files["history.csv"] = _csv(trends)
    files["history.json"] = _json(found)
    files["summary.md"] = findings_markdown(found)
    return files


def _entries(found: Sequence[Finding]) -> list[Entry]:
    """Return the entries of a page, what stands out first; drawn while there is room."""
    ordered = sorted(found, key=lambda finding: WORDS.index(finding.word))
    return [
        # A drawing holds no foreign text: numbers, units and dates.
        Entry(
            finding=finding,
            drawing=Markup(charts.without_namespaces(trend_charts.draw(finding.series))) if i < MOST_CHARTS else None,  # noqa: S704
        )
        for i, finding in enumerate(ordered)
    ]


def _csv(trends: Trends) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for series in trends.series:
        like = series.like
        for point in series.points:
            writer.writerow(
                [
                    series.metric.page, like.metric, like.unit, series.identifier, like.implementation, like.pass_name, like.call,
                    like.dtype, like.device, series.machine, point.commit, point.moment, repr(point.value),
                    "" if point.spread is None else repr(point.spread), point.n, point.num_runs,
                ]
            )  # fmt: skip
    return text.getvalue()


def _json(found: Findings) -> str:
    """Return everything the pages show; non-finite numbers are strings, as in rows."""
    series = [
        {
            "series": finding.series.identifier,
            "metric": finding.series.like.metric,
            "unit": finding.series.like.unit,
            "title": finding.series.title,
            "machine": finding.series.like.machine,
            "word": finding.word,
            "why": finding.why,
            "before": finding.before,
            "after": finding.after,
            "since": finding.first.commit if finding.first else None,
            "sigma": finding.series.course.sigma,
            "drift": finding.series.course.drift,
            "steps": [
                asdict(step) | {"commit": finding.series.points[step.position].commit}
                for step in finding.series.course.steps
            ],
            "points": [asdict(point) for point in finding.series.points],
        }
        for finding in found.each
    ]
    return json.dumps(
        plain({"then": found.then, "days": found.days, "word": found.word, "series": series}), allow_nan=False
    )

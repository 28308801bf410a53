"""The history as series over commits, each with its course: what the dashboard and comparisons are made from.

A series holds what was measured alike on one machine. A point is one commit, the median of its runs; measurements of a checkout with
changes belong to no commit and are left out. What a benchmark says of an implementation counts only at commits where every conformance run
of that implementation on that device passed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.fields import RowError
from kda_reports.metrics import METRICS
from kda_reports.steps import course
from kda_reports.store import queried

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.measurement import Measurement
    from kda_reports.metrics import Metric
    from kda_reports.steps import Course

# Judged on the CPU says nothing of a GPU, nor one GPU of another, so device and GPU are part of what is green.
POINTS = """
with green as (
    select commit, implementation, device, machine ->> 'gpu' as gpu
    from history where metric = 'conformance' and not dirty
    group by all having min(value) = 1
), judged as (
    select *, source <> 'bench' or exists (
        from green where green.commit = h.commit and green.implementation = h.implementation
        and green.device = h.device and green.gpu is not distinct from h.machine ->> 'gpu'
    ) as shown
    from history as h where not dirty
)
select
    series, commit, shown, median(value), max(spread), sum(n)::bigint, count(*),
    min(coalesce(commit_time, time)) as moment, arg_max(libraries, time)::varchar, arg_max(suite_version, time), arg_max(version, time)
from judged group by series, commit, shown order by series, moment, min(time), commit
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A series at one commit.

    Attributes
    ----------
    commit, moment
        Which, and when it was made (or first measured, where the rows do not say).
    value, spread, n, num_runs
        Median over runs, largest spread of a run, how many values and how many runs.
    versions
        Library versions, the suite's and the implementation's own, by name.
    """

    commit: str
    moment: str
    value: float
    spread: float | None
    n: int
    num_runs: int
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What was measured alike, over commits.

    Attributes
    ----------
    identifier
        Stable from one rendering to the next, so that links last.
    like
        One of its rows, for what all of them share.
    points
        In the order of the commits.
    course
        Steps and drift of the points.
    """

    identifier: str
    like: Measurement
    points: Sequence[Point]
    course: Course

    @property
    def metric(self) -> Metric:
        """Return what is measured."""
        return METRICS[self.like.metric]

    @property
    def title(self) -> str:
        """Return what tells the series from others of its metric, but for the machine."""
        like = self.like
        sizes = " ".join(f"{name}={size}" for name, size in like.shape.items())
        parts = [like.implementation, like.pass_name, like.call, sizes, like.dtype]
        return ", ".join(part for part in parts if part)

    @property
    def machine(self) -> str:
        """Return the machine in a few words."""
        machine = self.like.machine
        words = [machine.get(name) for name in ("target", "gpu", "triton")]
        found = [str(word) for word in words if word] or [str(machine.get("cpu"))]
        return f"{self.like.device} on {' '.join(found)}" if "target" not in machine else " with triton ".join(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trends:
    """The whole history.

    Attributes
    ----------
    series
        By page, metric and title; each has at least one point.
    withheld
        Series of benchmarks and how many of their commits are not shown, since no conformance run says that they are right there.
    num_rows, num_dirty
        Rows that were read, and how many of them belong to no commit.
    """

    series: Sequence[Series]
    withheld: Mapping[str, int]
    num_rows: int
    num_dirty: int

    @property
    def newest(self) -> str:
        """Return the moment of the newest commit."""
        return max(point.moment for series in self.series for point in series.points)

    @property
    def num_commits(self) -> int:
        """Return how many commits have a point."""
        return len({point.commit for series in self.series for point in series.points})


def trends(rows: Sequence[Measurement]) -> Trends:
    """Arrange rows as series and find their courses.

    Raises
    ------
    RowError
        If there is nothing to show, or a metric is unknown or in another unit than its own.
    """
    likes: dict[str, Measurement] = {}
    for row in rows:
        metric = METRICS.get(row.metric)
        if metric is None or metric.unit != row.unit:
            known = ", ".join(f"{name} in {metric.unit}" for name, metric in METRICS.items())
            got = f"{row.metric} in {row.unit} at commit {row.commit}"
            message = f"metric must be one of {known}, got {got}; prune it or update this program"
            raise RowError(message)
        likes.setdefault(row.series, row)
    points: dict[str, list[Point]] = {}
    withheld: Counter[str] = Counter()
    with queried(rows) as database:
        for series, commit, shown, value, spread, n, num_runs, moment, libraries, suite, version in database.execute(
            POINTS
        ).fetchall():
            if not shown:
                withheld[series] += 1
                continue
            versions = {name: str(found) for name, found in json.loads(libraries).items()}
            versions |= {
                name: found for name, found in (("suite", suite), (likes[series].implementation, version)) if found
            }
            point = Point(
                commit=commit, moment=moment, value=value, spread=spread, n=n, num_runs=num_runs, versions=versions
            )
            points.setdefault(series, []).append(point)
    if not points:
        message = f"history must hold something to show, got {len(rows)} rows of which none is of a clean checkout judged right; add more"
        raise RowError(message)
    found = [
        Series(
            identifier=name,
            like=likes[name],
            points=held,
            course=course([point.value for point in held], METRICS[likes[name].metric]),
        )
        for name, held in points.items()
    ]
    order = list(METRICS)
    found.sort(key=lambda one: (order.index(one.like.metric), one.title, one.machine, one.identifier))
    names = {name: f"{like.metric} of {like.implementation}, {like.call}" for name, like in likes.items()}
    return Trends(
        series=found,
        withheld={f"{names[name]} ({name})": number for name, number in withheld.items()},
        num_rows=len(rows),
        num_dirty=sum(row.dirty for row in rows),
    )

"""Is anything worse than a week ago, what, and since which commit: the answer of the dashboard, before it is drawn.

For each series the level at the newest commit is compared with the level a number of days before it. Nothing here looks at a clock: the
newest commit of the history is now.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from kda_reports.comparison import overall
from kda_reports.steps import is_relevant, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.steps import Step
    from kda_reports.trends import Point, Series, Trends

WORDS = ("worse", "better", "changed", "unchanged", "not comparable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What became of one series since then.

    Attributes
    ----------
    series
        Which.
    word
        One of ``WORDS``.
    before, after
        Levels then and now; ``None`` when they cannot be compared.
    step
        The change that did most of it; ``None`` when nothing stepped, or the series drifts.
    last, first
        The last measured commit before that step, and the first after it.
    versions
        What else changed between the two: libraries, suite, implementation.
    why
        What is to be known beside the numbers; may be empty.
    """

    series: Series
    word: str
    before: float | None = None
    after: float | None = None
    step: Step | None = None
    last: Point | None = None
    first: Point | None = None
    versions: Sequence[str] = ()
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What became of all series.

    Attributes
    ----------
    then, days
        The moment that is compared with, and how long that is before the newest commit.
    each
        In the order of the series.
    """

    then: str
    days: int
    each: Sequence[Finding]

    def those(self, *words: str) -> list[Finding]:
        """Return the findings of some words, in the order of the words."""
        return [finding for word in words for finding in self.each if finding.word == word]

    @property
    def word(self) -> str:
        """Return one word for all."""
        return overall(finding.word for finding in self.each)

    @property
    def headline(self) -> str:
        """Return the answer in a sentence."""
        ago = "a day before" if self.days == 1 else f"{self.days} days before"
        compared = len(self.each) - len(self.those("not comparable"))
        if not compared:
            return f"Nothing can be compared with {ago} the newest commit."
        if worse := len(self.those("worse")):
            better = len(self.those("better"))
            rest = f", {better} better" if better else ""
            return f"{worse} of {compared} series {'is' if worse == 1 else 'are'} worse{rest} than {ago} the newest commit."
        return f"Nothing is worse than {ago} the newest commit, of {compared} series."


def findings(trends: Trends, days: int) -> Findings:
    """Compare now with some days ago, series by series."""
    newest = datetime.fromisoformat(trends.newest)
    then = (newest - timedelta(days=days)).isoformat(timespec="seconds")
    return Findings(then=then, days=days, each=[_finding(series, then) for series in trends.series])


def _finding(series: Series, then: str) -> Finding:
    points, steps = series.points, series.course.steps
    if points[-1].moment <= then:
        return Finding(series=series, word="not comparable", why=f"not measured since {points[-1].moment[:10]}")
    past = sum(point.moment <= then for point in points) - 1
    if past < 0:
        return Finding(series=series, word="not comparable", why=f"first measured {points[0].moment[:10]}")
    if series.course.drift is not None:
        return _drifting(series, series.course.drift, past)
    recent = [step for step in steps if step.position > past]
    if not recent:
        return Finding(series=series, word="unchanged")
    before, after = recent[0].before, recent[-1].after
    if not is_relevant(before, after, series.metric):
        why = "it changed and came back" if len(recent) > 1 else "significant, and too small to be relevant"
        return Finding(series=series, word="unchanged", before=before, after=after, why=why)
    word = verdict(before, after, series.metric)
    step = max(recent, key=lambda one: _share(one, upward=after > before))
    last, first = points[step.position - 1], points[step.position]
    return Finding(
        series=series,
        word=word,
        before=before,
        after=after,
        step=step,
        last=last,
        first=first,
        versions=changed_versions(last, first),
        why="" if step.confirmed else f"unconfirmed: only {len(points) - step.position} commits since",
    )


def _share(step: Step, *, upward: bool) -> float:
    """Return how much of a change in one direction a step makes; what is not finite makes all of it."""
    change = step.after - step.before if upward else step.before - step.after
    return float("inf") if change != change else change  # noqa: PLR0124 - NaN is the only number unlike itself


def _drifting(series: Series, drift: float, past: int) -> Finding:
    """Judge a drift by what of it falls into the days that are looked at."""
    count = len(series.points)
    after = series.points[0].value + drift
    before = after - drift * (count - 1 - past) / (count - 1)
    relevant = is_relevant(before, after, series.metric)
    word = verdict(before, after, series.metric) if relevant else "unchanged"
    return Finding(series=series, word=word, before=before, after=after, why="drifts, without a commit to name")


def changed_versions(last: Point, first: Point) -> list[str]:
    """Return what changed between two commits beside the source: ``triton 3.6.0 to 3.7.1``."""
    names = dict.fromkeys([*last.versions, *first.versions])
    return [
        f"{name} {last.versions.get(name, 'unknown')} to {first.versions.get(name, 'unknown')}"
        for name in names
        if last.versions.get(name) != first.versions.get(name)
    ]

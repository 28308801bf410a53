"""Turn runs into what the error report shows: a headline, a matrix, curves, worst cases. Pure: rows in, plain data out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kda_reports.rows import Measure, Run, Verdict

WORST_SHOWN = 12
FAILURES_SHOWN = 24
CURVE_POINTS = 40
SMALLEST_SHOWN = 1e-3
LARGEST_SHOWN = 1e3
OUTPUTS = ("o", "final_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One law and one implementation of the verdict matrix."""

    outcome: str
    text: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """What is said first of one implementation."""

    implementation: str
    version: str
    outcome: str
    sentence: str
    worst: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a curve: the largest error as a fraction of its bound near ``x``."""

    implementation: str
    group: str
    x: float
    ratio: float


def headline(run: Run) -> Headline:
    """Return the verdict on one implementation, in a sentence."""
    failed = {verdict.law for verdict in run.verdicts if verdict.outcome in ("fail", "error")}
    laws = {verdict.law for verdict in run.verdicts if verdict.outcome != "unclaimed"}
    unclaimed = {verdict.law for verdict in run.verdicts} - laws
    tail = f"; {len(unclaimed)} laws not claimed" if unclaimed else ""
    if run.exit == "incomplete":
        outcome, sentence = "incomplete", f"did not finish: {len(run.verdicts)} tests ran"
    elif not laws or run.exit == "nothing":
        outcome, sentence = "nothing", "nothing was judged, which is no pass"
    elif failed:
        outcome, sentence = "fail", f"breaks {len(failed)} of {len(laws)} laws: {', '.join(sorted(failed))}{tail}"
    elif run.exit != "pass":
        outcome, sentence = "fail", "the run ended with an error although no law failed"
    else:
        outcome, sentence = "pass", f"keeps all {len(laws)} laws it claims, in {run.count('pass')} tests{tail}"
    worst = max((measure.score for measure in run.measures), default=math.nan, key=_badness)
    return Headline(
        implementation=run.implementation, version=run.version, outcome=outcome, sentence=sentence,
        worst="-" if math.isnan(worst) else f"{worst:.2f}",
    )  # fmt: skip


def matrix(runs: list[Run]) -> list[tuple[str, list[Cell]]]:
    """Return the verdicts by law, one cell per run; laws that someone breaks come first."""
    laws = list(dict.fromkeys(verdict.law for run in runs for verdict in run.verdicts))
    found = [(law, [_cell(run, law) for run in runs]) for law in laws]
    return sorted(found, key=lambda entry: not any(cell.outcome == "fail" for cell in entry[1]))


def _cell(run: Run, law: str) -> Cell:
    verdicts = [verdict for verdict in run.verdicts if verdict.law == law]
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    worst = f"{max(scores, key=_badness):.2f}" if scores else ""
    by_outcome = {name: sum(verdict.outcome == name for verdict in verdicts) for name in ("pass", "fail", "error", "xfail", "may", "unclaimed")}
    title = ", ".join(f"{count} {name}" for name, count in by_outcome.items() if count) or "not run"
    if by_outcome["fail"] or by_outcome["error"]:
        return Cell(outcome="fail", text=f"FAIL {worst}".strip(), title=title)
    if by_outcome["xfail"]:
        return Cell(outcome="xfail", text=f"declared {worst}".strip(), title=title)
    if by_outcome["pass"]:
        return Cell(outcome="pass", text=worst or "pass", title=title)
    if by_outcome["may"]:
        return Cell(outcome="may", text="noted", title=title)
    return Cell(outcome="unclaimed", text="not claimed" if by_outcome["unclaimed"] else "not run", title=title)


def curve(runs: list[Run], axis: str) -> list[Point]:
    """Return error over bound against ``token`` or ``decay``, the largest per implementation, tensor group and bin of a log axis."""
    largest: dict[tuple[str, str, int], float] = {}
    pairs = [(run.implementation, measure) for run in runs for measure in run.measures]
    for implementation, measure in pairs:
        group = "outputs" if measure.tensor in OUTPUTS else "gradients"
        for x, ratio in measure.by_token if axis == "token" else measure.by_decay:
            key = (implementation, group, _bin(x + 1))
            largest[key] = max(largest.get(key, 0.0), min(max(ratio if not math.isnan(ratio) else math.inf, SMALLEST_SHOWN), LARGEST_SHOWN))
    return [
        Point(implementation=implementation, group=group, x=10 ** (place / 10), ratio=ratio)
        for (implementation, group, place), ratio in sorted(largest.items())
    ]


def _bin(x: float) -> int:
    return round(10 * math.log10(max(x, 1.0)))


def worst_measures(runs: list[Run]) -> list[tuple[str, Measure]]:
    """Return the measurements closest to or furthest beyond their bounds, at most one per implementation, law and tensor."""
    seen: dict[tuple[str, str, str], tuple[str, Measure]] = {}
    pairs = [(run.implementation, measure) for run in runs for measure in run.measures]
    for implementation, measure in sorted(pairs, key=lambda pair: -_badness(pair[1].score)):
        seen.setdefault((implementation, measure.law, measure.tensor), (implementation, measure))
    return list(seen.values())[:WORST_SHOWN]


def failures(runs: list[Run]) -> list[tuple[str, Verdict]]:
    """Return failed verdicts, one per implementation and law first."""
    every = [(run.implementation, verdict) for run in runs for verdict in run.verdicts if verdict.outcome in ("fail", "error")]
    first: dict[tuple[str, str], tuple[str, Verdict]] = {}
    for implementation, verdict in every:
        first.setdefault((implementation, verdict.law), (implementation, verdict))
    return list(first.values())[:FAILURES_SHOWN]


def _badness(score: float) -> float:
    """Order scores with NaN as the worst."""
    return math.inf if math.isnan(score) else score

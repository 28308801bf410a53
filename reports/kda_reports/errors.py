"""What the rows of a conformance run add up to: standings, the matrix of laws, broken laws, worst cases.

An implementation passes only when its run was closed, its rows are all there, something was judged and nothing failed.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.rows import Measure, Run, Verdict

# What a cell shows when its tests differ: the first outcome of this list that occurs.
GRAVEST_FIRST = ("fail", "error", "xfail", "pass", "may", "unclaimed")
BROKEN = ("fail", "error")
JUDGED = ("pass", "fail", "error", "xfail")
NUM_NAMED = 4
NUM_WORST = 12
NUM_WORST_EACH = 3
SMALL_SHARE, MANY_TIMES = 0.01, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one implementation came out.

    Attributes
    ----------
    name
        What the implementation is called on the page; unique.
    run
        Its run.
    status
        ``pass``, ``fail``, ``incomplete`` or ``nothing``.
    summary
        A sentence or two that say why.
    counts
        Verdicts by outcome.
    """

    name: str
    run: Run
    status: str
    summary: str
    counts: Mapping[str, int]

    @property
    def is_decided(self) -> bool:
        """Return whether anything is concluded about the implementation."""
        return self.status in ("pass", "fail")

    @property
    def num_judged(self) -> int:
        """Return how many of its tests were judged."""
        return sum(self.counts[outcome] for outcome in JUDGED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One law for one implementation.

    Attributes
    ----------
    outcome
        The gravest outcome of its tests; ``absent`` when none ran.
    score
        Largest error over bound among the tests of that outcome; ``None`` without a bound.
    num_failed, num_judged, num_unclaimed
        Tests that failed, were judged or recorded, and were not claimed.
    """

    outcome: str
    score: float | None
    num_failed: int
    num_judged: int
    num_unclaimed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LawRow:
    """One law and its cells, one per standing."""

    law: str
    cells: Sequence[Cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """The laws of one test module."""

    name: str
    laws: Sequence[LawRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """One law that one implementation breaks, with the failure that says most.

    Attributes
    ----------
    standing, position
        The implementation, and its column in the matrix, from 1.
    verdict
        The failure with the largest score.
    num_failed, num_judged
        Tests of the law that failed, and that were judged.
    """

    standing: Standing
    position: int
    verdict: Verdict
    num_failed: int
    num_judged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCase:
    """A measurement close to its bound or beyond it."""

    standing: Standing
    measure: Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeRow:
    """One implementation on inputs of one dtype: by tensor the largest score, and how many were measured."""

    standing: Standing
    dtype: str
    precision: str
    largest: Mapping[str, tuple[float | None, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything the page says, before it is drawn."""

    headline: str
    standings: Sequence[Standing]
    chapters: Sequence[Chapter]
    breaches: Sequence[Breach]
    worst_cases: Sequence[WorstCase]
    declared: Sequence[Breach]

    @property
    def num_laws(self) -> int:
        """Return how many laws the rows name."""
        return sum(len(chapter.laws) for chapter in self.chapters)


def summarise(runs: Sequence[Run]) -> Summary:
    """Add the runs up."""
    standings = [_standing(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    return Summary(
        headline=_headline(standings),
        standings=standings,
        chapters=_chapters(standings),
        breaches=_breaches(standings, BROKEN),
        worst_cases=_worst_cases(standings),
        declared=_breaches(standings, ("xfail",)),
    )


def by_dtype(standings: Sequence[Standing]) -> list[DtypeRow]:
    """Return the largest score of each tensor by implementation and input dtype."""
    rows = []
    for standing in standings:
        groups: dict[tuple[str, str], dict[str, list[float | None]]] = {}
        for one in standing.run.measures:
            groups.setdefault((one.dtype, one.precision), {}).setdefault(one.tensor, []).append(one.score)
        for (dtype, precision), scores in sorted(groups.items()):
            largest = {tensor: (max(found, key=gravity), len(found)) for tensor, found in scores.items()}
            rows.append(DtypeRow(standing=standing, dtype=dtype, precision=precision, largest=largest))
    return rows


def gravity(score: float | None) -> float:
    """Return a score as a sort key: NaN is as grave as infinity, no score is the least."""
    if score is None:
        return -1.0
    return math.inf if math.isnan(score) else score


def _names(runs: Sequence[Run]) -> list[str]:
    """Return a name per run; what tells runs of one implementation apart is added to it."""
    names = _told_apart([run.implementation for run in runs], [run.device for run in runs])
    return _told_apart(names, [run.identifier for run in runs])


def _told_apart(names: Sequence[str], marks: Sequence[str]) -> list[str]:
    count = Counter(names)
    return [f"{name} ({mark})" if count[name] > 1 else name for name, mark in zip(names, marks, strict=True)]


def _standing(run: Run, name: str) -> Standing:
    counts = Counter(verdict.outcome for verdict in run.verdicts)
    status, summary = _status(run, counts)
    return Standing(name=name, run=run, status=status, summary=summary, counts=counts)


def _status(run: Run, counts: Counter[str]) -> tuple[str, str]:
    failed, erred = (
        list(dict.fromkeys(verdict.law for verdict in run.verdicts if verdict.outcome == outcome)) for outcome in BROKEN
    )
    num_laws = len({verdict.law for verdict in run.verdicts if verdict.outcome in JUDGED})
    if failed or erred:
        return "fail", _failure(run, failed, [law for law in erred if law not in failed], num_laws)
    if run.finish is None:
        return "incomplete", f"The run stopped after {_count(len(run.verdicts), 'test')}. Nothing is concluded."
    lost = [outcome for outcome, number in run.finish.counts.items() if counts[outcome] != number]
    if lost:
        told = ", ".join(f"{run.finish.counts[outcome]} {outcome}" for outcome in lost)
        found = ", ".join(f"{counts[outcome]} {outcome}" for outcome in lost)
        return "incomplete", f"Rows are missing: the run counted {told}; the file holds {found}. Nothing is concluded."
    if run.finish.exit == "fail":
        return "fail", "The run failed outside of any law; its log says where."
    if run.finish.exit in ("usage", "nothing") or num_laws == 0:
        why = (
            "The run was refused as bad usage."
            if run.finish.exit == "usage"
            else "No law was judged, which is no pass."
        )
        return "nothing", why
    laws = "the one law that applies" if num_laws == 1 else f"all {num_laws} laws that apply"
    declared = f" apart from {_count(counts['xfail'], 'declared failure')}" if counts["xfail"] else ""
    return "pass", f"Obeys {laws} to its claims{declared}. {_closest(run)}"


def _failure(run: Run, failed: Sequence[str], erred: Sequence[str], num_laws: int) -> str:
    broken = f"Breaks {len(failed)} of {_count(num_laws, 'law')}: {_few(failed)}." if failed else "Breaks no law."
    ended = f" {_count(len(erred), 'law')} ended in an error, which is no verdict: {_few(erred)}." if erred else ""
    rest = "" if run.finish else " The run did not finish, so there may be more."
    return f"{broken}{ended} {_closest(run)}{rest}"


def _few(laws: Sequence[str]) -> str:
    if len(laws) > NUM_NAMED + 1:
        laws = [*laws[:NUM_NAMED], f"{len(laws) - NUM_NAMED} more"]
    return _listed(laws)


def _closest(run: Run) -> str:
    if not run.measures:
        return "No error was measured against a bound."
    worst = max(run.measures, key=lambda measure: gravity(measure.score))
    if not math.isfinite(worst.score):
        size = "not finite"
    elif worst.score < SMALL_SHARE:
        size = f"below {SMALL_SHARE} of the bound"
    elif worst.score < MANY_TIMES:
        size = f"{worst.score:.2f} of the bound"
    else:
        size = f"{worst.score:,.0f} times the bound"
    return f"Its largest error is {size}, in {worst.tensor} ({worst.law})."


def _headline(standings: Sequence[Standing]) -> str:
    number = Counter(standing.status for standing in standings)
    total = len(standings)
    if number["pass"] == total:
        who = standings[0].name if total == 1 else f"All {total} implementations"
        return f"{who} {_verb(total, 'obey')} every law judged."
    parts = []
    failing = [standing for standing in standings if standing.status == "fail"]
    # An error alone, such as a truth too uncertain to judge with, accuses nobody.
    if erring := [standing.name for standing in failing if standing.counts["error"] and not standing.counts["fail"]]:
        parts.append(f"at least one law ended in an error for {_listed(erring)}")
    if breaking := [standing.name for standing in failing if standing.name not in erring]:
        parts.insert(0, f"{_listed(breaking)} {_verb(len(breaking), 'break')} at least one law")
    if number["pass"]:
        parts.append(f"{number['pass']} of {total} {_verb(number['pass'], 'obey')} every law judged")
    if undecided := [standing.name for standing in standings if not standing.is_decided]:
        parts.append(f"nothing is concluded about {_listed(undecided)}")
    sentence = "; ".join(parts) + "."
    # A sentence may begin with the name of an implementation, which is left as it is.
    return sentence if breaking else sentence[0].upper() + sentence[1:]


def _chapters(standings: Sequence[Standing]) -> list[Chapter]:
    """Return the laws by test module, in the order in which they ran first."""
    chapters: dict[str, dict[str, None]] = {}
    verdicts: list[dict[str, list[Verdict]]] = []
    for standing in standings:
        by_law: dict[str, list[Verdict]] = {}
        for verdict in standing.run.verdicts:
            chapters.setdefault(_chapter(verdict), {})[verdict.law] = None
            by_law.setdefault(verdict.law, []).append(verdict)
        verdicts.append(by_law)
    return [
        Chapter(
            name=name,
            laws=[LawRow(law=law, cells=[_cell(by_law.get(law, [])) for by_law in verdicts]) for law in laws],
        )
        for name, laws in chapters.items()
    ]


def _chapter(verdict: Verdict) -> str:
    module = verdict.test.partition("::")[0].rpartition("/")[2]
    return module.removeprefix("test_").removesuffix(".py").replace("_", " ")


def _cell(verdicts: Sequence[Verdict]) -> Cell:
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    outcome = next((outcome for outcome in GRAVEST_FIRST if outcomes[outcome]), "absent")
    scores = [verdict.score for verdict in verdicts if verdict.outcome == outcome and verdict.score is not None]
    return Cell(
        outcome=outcome,
        score=max(scores, key=gravity, default=None),
        num_failed=outcomes["fail"] + outcomes["error"],
        num_judged=sum(outcomes[name] for name in (*JUDGED, "may")),
        num_unclaimed=outcomes["unclaimed"],
    )


def _breaches(standings: Sequence[Standing], outcomes: tuple[str, ...]) -> list[Breach]:
    breaches = []
    for position, standing in enumerate(standings, start=1):
        by_law: dict[str, list[Verdict]] = {}
        for verdict in standing.run.verdicts:
            if verdict.outcome in outcomes:
                by_law.setdefault(verdict.law, []).append(verdict)
        judged = Counter(verdict.law for verdict in standing.run.verdicts if verdict.outcome in JUDGED)
        breaches += [
            Breach(
                standing=standing,
                position=position,
                verdict=max(verdicts, key=lambda verdict: gravity(verdict.score)),
                num_failed=len(verdicts),
                num_judged=judged[law],
            )
            for law, verdicts in by_law.items()
        ]
    return sorted(breaches, key=lambda breach: -gravity(breach.verdict.score))


def _worst_cases(standings: Sequence[Standing]) -> list[WorstCase]:
    """Return the worst measurement by law and tensor: a few of every implementation, then the worst of the rest."""
    each: list[WorstCase] = []
    rest: list[WorstCase] = []
    for standing in standings:
        worst: dict[tuple[str, str], Measure] = {}
        for measure in standing.run.measures:
            key = (measure.law, measure.tensor)
            if key not in worst or gravity(measure.score) > gravity(worst[key].score):
                worst[key] = measure
        ordered = sorted(worst.values(), key=lambda measure: -gravity(measure.score))
        cases = [WorstCase(standing=standing, measure=measure) for measure in ordered]
        each += cases[:NUM_WORST_EACH]
        rest += cases[NUM_WORST_EACH:]
    rest.sort(key=lambda case: -gravity(case.measure.score))
    chosen = each + rest[: max(0, NUM_WORST - len(each))]
    return sorted(chosen, key=lambda case: -gravity(case.measure.score))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _verb(number: int, verb: str) -> str:
    return f"{verb}s" if number == 1 else verb

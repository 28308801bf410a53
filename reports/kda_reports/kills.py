"""Which law catches which planted bug: the matrix, the survivors, and the laws that nothing could replace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.fields import RowError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.rows import Planted, Run

BROKEN = ("fail", "error")
JUDGED = ("pass", "fail", "error", "xfail")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One planted entry and what became of it.

    Attributes
    ----------
    name
        Its id.
    planted
        What the catalogue says.
    outcomes
        Outcome by law, for the laws that were judged.
    caught_by
        The laws it breaks.
    score
        Largest error over bound among the laws that have one; ``None`` when no error was measured.
    message
        The first line of the first failure; empty when nothing failed.
    """

    name: str
    planted: Planted
    outcomes: Mapping[str, str]
    caught_by: Sequence[str]
    score: float | None
    message: str

    @property
    def is_as_it_must(self) -> bool:
        """Return whether a bug was caught, or something correct was not."""
        return bool(self.caught_by) == (self.planted.kind == "bug")


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """One law over all planted bugs.

    Attributes
    ----------
    num_caught
        Bugs that break it.
    alone
        Bugs that break no other law.
    """

    name: str
    num_caught: int
    alone: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kills:
    """What the page shows.

    Attributes
    ----------
    bugs, others
        Planted bugs by catalogue part, and what must pass: correct variants and equivalent edits.
    laws
        Every law, the one that catches most first.
    survivors, alarms
        Bugs that no law caught, and correct entries that a law failed.
    """

    bugs: Mapping[str, Sequence[Line]]
    others: Sequence[Line]
    laws: Sequence[Law]
    survivors: Sequence[Line]
    alarms: Sequence[Line]

    @property
    def largest_correct(self) -> Line | None:
        """Return what is correct and comes closest to its bound."""
        return max((line for line in self.others if line.score is not None), key=_score, default=None)

    @property
    def weakest_caught(self) -> Line | None:
        """Return the bug with the smallest error beyond its bound; a bug that only a relation catches has none."""
        beyond = (line for line in self._bugs if line.score is not None and line.score > 1)
        return min(beyond, key=_score, default=None)

    @property
    def _bugs(self) -> list[Line]:
        return [line for lines in self.bugs.values() for line in lines]

    @property
    def num_bugs(self) -> int:
        """Return how many bugs were planted."""
        return len(self._bugs)


def count_kills(runs: Sequence[Run]) -> Kills:
    """Count which law caught what.

    Raises
    ------
    RowError
        If a run says nothing of what is planted in it, or was not closed.
    """
    lines = [_line(run) for run in runs]
    bugs = [line for line in lines if line.planted.kind == "bug"]
    others = [line for line in lines if line.planted.kind != "bug"]
    parts = dict.fromkeys(line.planted.part for line in bugs)
    names = sorted({name for line in lines for name in line.outcomes})
    laws = [
        Law(
            name=name,
            num_caught=sum(name in line.caught_by for line in bugs),
            alone=[line.name for line in bugs if list(line.caught_by) == [name]],
        )
        for name in names
    ]
    return Kills(
        bugs={part: [line for line in bugs if line.planted.part == part] for part in parts},
        others=others,
        laws=sorted(laws, key=lambda law: (-law.num_caught, law.name)),
        survivors=[line for line in bugs if not line.caught_by],
        alarms=[line for line in others if line.caught_by],
    )


def _score(line: Line) -> float:
    return 0.0 if line.score is None else line.score


def _line(run: Run) -> Line:
    if run.planted is None:
        message = (
            f"run {run.implementation} must say what is planted in it, got none; write the rows with `kda mutants`"
        )
        raise RowError(message)
    if run.finish is None:
        message = f"run {run.implementation} must be closed, got no finish row; an unfinished run catches nothing"
        raise RowError(message)
    broken = [verdict for verdict in run.verdicts if verdict.outcome in BROKEN]
    return Line(
        name=run.implementation,
        planted=run.planted,
        outcomes={verdict.law: verdict.outcome for verdict in run.verdicts if verdict.outcome in JUDGED},
        caught_by=list(dict.fromkeys(verdict.law for verdict in broken)),
        score=max((verdict.score for verdict in run.verdicts if verdict.score is not None), default=None),
        message=broken[0].message.strip().split("\n")[0] if broken else "",
    )

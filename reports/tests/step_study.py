"""How many planted steps are found in histories of 200 commits, and how many that are not there: ``python reports/tests/step_study.py``.

Run as a script it writes the table into ``docs/history.md``; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from kda_reports.metrics import METRICS
from kda_reports.steps import course
from synthetic_history import NUM_COMMITS, bimodal, noisy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kda_reports.steps import Course

DOCUMENT = Path(__file__).parents[2] / "docs" / "history.md"
NUM_SERIES = 100
NEAR = 2
NOISE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What was found in many series that were made alike.

    Attributes
    ----------
    what
        How they were made.
    found, exact
        Series whose planted step was found within two commits, and at the very commit.
    relevant
        Series in which a step was found that a person should care about.
    wrong
        Confirmed steps, over all series, that were not planted.
    suspected
        Series whose newest commits are suspected of a step that was not planted.
    drifting
        Series that are said to drift.
    """

    what: str
    found: int
    exact: int
    relevant: int
    wrong: int
    suspected: int
    drifting: int

    def line(self) -> str:
        """Return the tally as a row of a Markdown table; ``-`` where nothing was planted."""
        planted = "step" in self.what
        cells = [
            self.what,
            f"{self.found}" if planted else "-",
            f"{self.exact}" if planted else "-",
            self.relevant,
            self.wrong,
            self.suspected,
            self.drifting,
        ]
        return f"| {' | '.join(map(str, cells))} |"


def tally(what: str, make: Callable[[int], Sequence[float]], at: int | None = None) -> Tally:
    """Look for steps in many series; ``at`` is where one is planted."""
    courses = [course(make(seed), METRICS["time"]) for seed in range(NUM_SERIES)]
    near = [[step for step in one.steps if at is not None and abs(step.position - at) <= NEAR] for one in courses]
    others = [[step for step in one.steps if at is None or abs(step.position - at) > NEAR] for one in courses]
    return Tally(
        what=what,
        found=sum(bool(steps) for steps in near),
        exact=sum(any(step.position == at for step in steps) for steps in near),
        relevant=sum(any(step.relevant for step in one.steps) for one in courses),
        wrong=sum(step.confirmed for steps in others for step in steps),
        suspected=sum(any(not step.confirmed for step in steps) for steps in others),
        drifting=sum(_drifts(one) for one in courses),
    )


def _drifts(one: Course) -> bool:
    return one.drift is not None


def heavy_tailed(seed: int) -> list[float]:
    """Return times of which one in twenty is slower by up to a tenth, as when something else runs on the machine."""
    random = np.random.default_rng(seed)
    late = random.random(NUM_COMMITS) < 0.05
    return [float(value) for value in np.asarray(noisy(seed)) * (1 + 0.1 * late * random.random(NUM_COMMITS))]


def study() -> list[Tally]:
    """Return all tallies of the table."""
    tallies = []
    for step in (0.02, 0.05, 0.10):
        for at in (120, NUM_COMMITS - 10, NUM_COMMITS - 3):
            what = f"step of {step:.0%}, {NUM_COMMITS - at} commits before the end"
            tallies.append(tally(what, lambda seed, step=step, at=at: noisy(seed, step=step, at=at), at))  # type: ignore[misc]
    tallies.append(tally("nothing but noise", noisy))
    tallies.append(tally("one value in twenty up to 10% slower", heavy_tailed))
    tallies.append(tally("two speeds 5% apart, at random", bimodal))
    tallies.append(tally("drift of 3% over the history", lambda seed: noisy(seed, drift=0.03)))
    tallies.append(tally("drift of 10% over the history", lambda seed: noisy(seed, drift=0.10)))
    return tallies


def table(tallies: Sequence[Tally]) -> str:
    """Return the tallies as the table of ``docs/history.md``."""
    columns = "found | at the commit | with a relevant step | false steps | false suspicions | said to drift"
    head = f"| {NUM_SERIES} series of {NUM_COMMITS} commits with | {columns} |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *(one.line() for one in tallies)]) + "\n"


def main() -> None:
    """Write the table into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    begin = text.index("| 100 series")
    end = text.index("\n\n", begin) + 1
    DOCUMENT.write_text(text[:begin] + table(study()) + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()

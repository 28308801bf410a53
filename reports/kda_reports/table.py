"""The referee's table: every implementation that was judged, law by law, rendered from the results alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.errors import Cell
from kda_reports.page import SIGNS, WORDS, cell_class, side_by_side, templates
from kda_reports.results import differences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.results import LawResult, Result

KINDS = {
    "unexplained": "nobody has looked at it",
    "contradicts": "the person says otherwise",
    "stale": "computed anew since the person looked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One law, and its result for each implementation; ``None`` where it was not run."""

    law: str
    cells: Sequence[LawResult | None]


def render_table(results: Sequence[Result]) -> str:
    """Render the table.

    Parameters
    ----------
    results
        In the order of the columns.

    Returns
    -------
    str
        A complete HTML document.
    """
    open_points = differences(results)
    return (
        templates()
        .get_template("table.html")
        .render(
            results=results,
            headline=headline(results),
            chapters=chapters(results),
            differences=open_points,
            kinds=KINDS,
            words=WORDS,
            signs=SIGNS,
            style=style,
            is_address=is_address,
            columns=[f"{result.implementation} {result.version}" for result in results],
            machine_rows=side_by_side([_where(result) for result in results]),
            claim_rows=side_by_side([_claims(result) for result in results]),
        )
    )


def headline(results: Sequence[Result]) -> str:
    """Return what the table says, in a sentence."""
    numbers = {status: sum(result.computed == status for result in results) for status in ("pass", "fail")}
    rest = len(results) - sum(numbers.values())
    undecided = f"; {rest} undecided" if rest else ""
    return f"{numbers['pass']} of {len(results)} implementations obey every law judged, {numbers['fail']} break at least one{undecided}"


def chapters(results: Sequence[Result]) -> Mapping[str, Sequence[Line]]:
    """Return the laws by chapter, each with its cell for every result."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for law in result.laws:
            found.setdefault(law.chapter, {})[law.law] = None
    by_name = [{law.law: law for law in result.laws} for result in results]
    return {
        chapter: [Line(law=law, cells=[laws.get(law) for laws in by_name]) for law in names]
        for chapter, names in found.items()
    }


def style(law: LawResult | None) -> str:
    """Return the style of a cell: its outcome, and for a pass how close to the budget it came."""
    if law is None:
        return "absent"
    cell = Cell(
        outcome=law.computed,
        score=law.worst,
        num_failed=law.num_failed,
        num_judged=law.num_judged,
        num_unclaimed=law.num_unclaimed,
    )
    return cell_class(cell)


def is_address(finding: str) -> bool:
    """Tell whether a finding may be linked to: a path in the repository leads nowhere from a page that was moved."""
    return finding.startswith("https://")


def _where(result: Result) -> dict[str, object]:
    return {
        "device": result.device,
        **result.machine,
        "suite": result.suite,
        "commit": None if result.commit is None else result.commit[:10] + (" with changes" if result.dirty else ""),
        "effort": result.effort,
        "seed": result.seed,
        "started": result.started,
        "seconds": None if result.seconds is None else f"{result.seconds:.0f}",
    }


def _claims(result: Result) -> dict[str, object]:
    return {"arithmetic by input dtype": dict(result.precision), "not claimed": list(result.not_claimed)}

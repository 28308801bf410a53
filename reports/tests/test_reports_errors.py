"""What rows add up to: nothing is a pass unless a closed, complete run judged something and broke nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from kda_reports.errors import gravity, summarise
from kda_reports.rows import read_rows
from synthetic_rows import (
    CAUSALITY,
    closed,
    finish_row,
    lines,
    measure_row,
    run_row,
    sample,
    verdict_row,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kda_reports.errors import Cell, Summary

    Row = dict[str, Any]
    SummaryOf = Callable[[list[Row]], Summary]


@pytest.fixture
def summary_of(tmp_path: Path) -> SummaryOf:
    """Return a function from rows to their summary."""

    def summary_of(rows: list[Row]) -> Summary:
        path = tmp_path / "rows.jsonl"
        path.write_text(lines(rows), encoding="utf-8")
        return summarise(read_rows([path]))

    return summary_of


def cell(summary: Summary, law: str, position: int = 0) -> Cell:
    (row,) = [row for chapter in summary.chapters for row in chapter.laws if row.law == law]
    return row.cells[position]


def test_a_complete_run_without_failures_passes(summary_of: SummaryOf) -> None:
    summary = summary_of(closed("a", [verdict_row("a", "one", score=0.5), measure_row("a", "one", "o", 0.5)]))
    assert summary.standings[0].status == "pass"
    assert summary.headline == "a obeys every law judged."
    assert "0.50 of the bound, in o (one)" in summary.standings[0].summary


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (0.004, "below 0.01 of the bound"),
        (0.434, "0.43 of the bound"),
        (9.994, "9.99 of the bound"),
        (5394.9, "5,395 times the bound"),
        (math.nan, "not finite"),
    ],
)
def test_the_largest_error_is_told_in_words(summary_of: SummaryOf, score: float, text: str) -> None:
    rows = [verdict_row("a", "one"), measure_row("a", "one", "o", 0.001), measure_row("a", "two", "dq", score)]
    assert f"Its largest error is {text}, in dq (two)." in summary_of(closed("a", rows)).standings[0].summary


def test_one_broken_law_fails_an_implementation(summary_of: SummaryOf) -> None:
    summary = summary_of(closed("a", [verdict_row("a", "one"), verdict_row("a", "two", "fail")]))
    assert summary.standings[0].status == "fail"
    assert summary.headline == "a breaks at least one law."
    assert "Breaks 1 of 2 laws: two." in summary.standings[0].summary


def test_an_error_is_no_pass_and_no_broken_law(summary_of: SummaryOf) -> None:
    summary = summary_of(closed("a", [verdict_row("a", "one"), verdict_row("a", "two", "error")]))
    assert summary.standings[0].status == "fail"
    assert summary.headline == "At least one law ended in an error for a."
    assert "Breaks no law. 1 law ended in an error, which is no verdict: two." in summary.standings[0].summary


def test_the_headline_tells_errors_from_broken_laws(summary_of: SummaryOf) -> None:
    rows = [
        row for name in "ab" for row in closed(name, [verdict_row(name, "one", "error" if name == "b" else "pass")])
    ]
    assert summary_of(rows).headline == "At least one law ended in an error for b; 1 of 2 obeys every law judged."
    rows += closed("c", [verdict_row("c", "one", "fail")])
    assert summary_of(rows).headline == (
        "c breaks at least one law; at least one law ended in an error for b; 1 of 3 obeys every law judged."
    )


def test_a_law_that_fails_and_errs_is_broken(summary_of: SummaryOf) -> None:
    rows = [verdict_row("a", "one", "error"), verdict_row("a", "one", "fail"), verdict_row("a", "two", "error")]
    summary = summary_of(closed("a", rows))
    assert summary.headline == "a breaks at least one law."
    assert "Breaks 1 of 2 laws: one. 1 law ended in an error, which is no verdict: two." in summary.standings[0].summary


def test_a_run_without_a_finish_row_is_incomplete(summary_of: SummaryOf) -> None:
    summary = summary_of([run_row("a"), verdict_row("a", "one")])
    assert summary.standings[0].status == "incomplete"
    assert summary.headline == "Nothing is concluded about a."


def test_an_unfinished_run_that_failed_has_failed(summary_of: SummaryOf) -> None:
    summary = summary_of([run_row("a"), verdict_row("a", "one", "fail")])
    assert summary.standings[0].status == "fail"
    assert "did not finish" in summary.standings[0].summary


def test_a_run_that_lost_rows_is_incomplete(summary_of: SummaryOf) -> None:
    rows = [verdict_row("a", "one"), verdict_row("a", "two")]
    summary = summary_of([run_row("a"), rows[0], finish_row("a", rows)])
    assert summary.standings[0].status == "incomplete"
    assert "the run counted 2 pass; the file holds 1 pass" in summary.standings[0].summary


def test_a_run_that_failed_outside_of_any_law_fails(summary_of: SummaryOf) -> None:
    rows = [verdict_row("a", "one")]
    summary = summary_of([run_row("a"), *rows, finish_row("a", rows, exit="fail")])
    assert summary.standings[0].status == "fail"


def test_a_refused_run_concludes_nothing(summary_of: SummaryOf) -> None:
    assert summary_of([run_row("a"), finish_row("a", [], exit="usage")]).standings[0].status == "nothing"


@pytest.mark.parametrize("outcome", ["unclaimed", "may"])
def test_a_run_that_judged_nothing_is_no_pass(summary_of: SummaryOf, outcome: str) -> None:
    summary = summary_of(closed("a", [verdict_row("a", "one", outcome)]))
    assert summary.standings[0].status == "nothing"


def test_a_run_that_says_it_judged_nothing_is_no_pass(summary_of: SummaryOf) -> None:
    summary = summary_of([run_row("a"), finish_row("a", [], exit="nothing")])
    assert summary.standings[0].status == "nothing"


def test_a_pass_says_that_it_has_declared_failures(summary_of: SummaryOf) -> None:
    summary = summary_of(closed("a", [verdict_row("a", "one"), verdict_row("a", "two", "xfail")]))
    assert summary.standings[0].status == "pass"
    assert "apart from 1 declared failure" in summary.standings[0].summary
    assert [breach.verdict.law for breach in summary.declared] == ["two"]


def test_the_headline_names_who_fails_and_who_is_open(summary_of: SummaryOf) -> None:
    assert summary_of(sample()).headline == (
        "wrong breaks at least one law; 3 of 5 obey every law judged; nothing is concluded about torn."
    )


def test_the_headline_counts_when_all_pass(summary_of: SummaryOf) -> None:
    rows = [row for name in "ab" for row in closed(name, [verdict_row(name, "one")])]
    assert summary_of(rows).headline == "All 2 implementations obey every law judged."


def test_many_broken_laws_are_counted_rather_than_listed(summary_of: SummaryOf) -> None:
    rows = [verdict_row("a", f"law-{i}", "fail") for i in range(7)]
    text = summary_of(closed("a", rows)).standings[0].summary
    assert "law-3" in text
    assert "law-4" not in text
    assert "and 3 more" in text


@pytest.mark.parametrize(
    ("outcomes", "shown"),
    [
        (["pass", "fail", "error"], "fail"),
        (["pass", "error"], "error"),
        (["pass", "xfail"], "xfail"),
        (["unclaimed", "pass"], "pass"),
        (["unclaimed", "may"], "may"),
        (["unclaimed"], "unclaimed"),
    ],
)
def test_a_cell_shows_the_gravest_outcome(summary_of: SummaryOf, outcomes: list[str], shown: str) -> None:
    summary = summary_of(closed("a", [verdict_row("a", "one", outcome) for outcome in outcomes]))
    assert cell(summary, "one").outcome == shown


def test_a_cell_counts_unclaimed_tests_apart(summary_of: SummaryOf) -> None:
    rows = [
        verdict_row("a", "one", score=0.1),
        verdict_row("a", "one", score=0.6),
        verdict_row("a", "one", "unclaimed"),
    ]
    found = cell(summary_of(closed("a", rows)), "one")
    assert (found.score, found.num_judged, found.num_unclaimed, found.num_failed) == (0.6, 2, 1, 0)


def test_a_failed_cell_shows_the_score_of_its_failures(summary_of: SummaryOf) -> None:
    rows = [verdict_row("a", "one", "fail"), verdict_row("a", "one", score=0.9)]
    assert cell(summary_of(closed("a", rows)), "one").score is None


def test_a_law_that_one_implementation_never_met_is_absent_there(summary_of: SummaryOf) -> None:
    rows = closed("a", [verdict_row("a", "one")]) + closed("b", [verdict_row("b", "two")])
    assert cell(summary_of(rows), "one", 1).outcome == "absent"


def test_laws_are_grouped_by_test_module(summary_of: SummaryOf) -> None:
    rows = [verdict_row("a", "one"), verdict_row("a", "two", test=CAUSALITY), verdict_row("a", "three")]
    summary = summary_of(closed("a", rows))
    assert [(chapter.name, len(chapter.laws)) for chapter in summary.chapters] == [("reference", 2), ("causality", 1)]
    assert summary.num_laws == 3


def test_a_breach_is_shown_by_its_worst_failure(summary_of: SummaryOf) -> None:
    rows = [verdict_row("a", "one", "fail", score=score) for score in (2.0, math.nan, 7.0)]
    (breach,) = summary_of(closed("a", [*rows, verdict_row("a", "one")])).breaches
    assert breach.verdict.score is not None
    assert math.isnan(breach.verdict.score)
    assert (breach.num_failed, breach.num_judged) == (3, 4)


def test_every_implementation_has_its_worst_cases(summary_of: SummaryOf) -> None:
    rows = []
    for name, scale in (("a", 100.0), ("b", 0.001)):
        measures = [measure_row(name, f"law-{i}", "o", scale * (i + 1)) for i in range(20)]
        rows += closed(name, [verdict_row(name, "law-0"), *measures])
    cases = summary_of(rows).worst_cases
    assert len(cases) == 12
    assert [case.measure.score for case in cases] == sorted((case.measure.score for case in cases), reverse=True)
    assert [case.measure.law for case in cases if case.standing.name == "b"] == ["law-19", "law-18", "law-17"]


def test_a_law_and_tensor_appear_once_among_the_worst(summary_of: SummaryOf) -> None:
    rows = [measure_row("a", "one", "o", score) for score in (0.1, math.inf, 0.7)]
    (case,) = summary_of(closed("a", [verdict_row("a", "one"), *rows])).worst_cases
    assert case.measure.score == math.inf


def test_runs_of_one_implementation_are_told_apart(summary_of: SummaryOf) -> None:
    rows = [run_row("a"), run_row("a", run="x", device="cuda"), run_row("a", run="y", device="cuda"), run_row("b")]
    names = [standing.name for standing in summary_of(rows).standings]
    assert names == ["a (cpu)", "a (cuda) (x)", "a (cuda) (y)", "b"]


def test_nan_is_as_grave_as_infinity() -> None:
    assert gravity(None) < gravity(0.0) < gravity(1e300) < gravity(math.inf) == gravity(math.nan)

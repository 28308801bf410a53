"""The table's page: rendered from results alone, what is open is said first, and text stays text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kda_reports.results import Said, as_text, collect, differences, read_results
from kda_reports.rows import read_rows
from kda_reports.table import is_address, render_table
from synthetic_rows import closed, lines, sample, verdict_row
from test_reports_page import Outline

if TYPE_CHECKING:
    from kda_reports.results import Result

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "conformance" / "results"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"


def results(folder: Path, *runs: list[dict[str, object]]) -> list[Result]:
    (folder / "rows.jsonl").write_text(lines([row for run in runs for row in run]), encoding="utf-8")
    collect(read_rows([folder / "rows.jsonl"]), folder / "results")
    return read_results(folder / "results")


def test_the_page_is_one_well_formed_file_that_asks_for_nothing(tmp_path: Path) -> None:
    page = render_table(results(tmp_path, sample()))
    outline = Outline(page)
    assert outline.open == []
    assert outline.having("src") == []
    assert all(address.startswith("#") for address in outline.having("href"))
    assert page == render_table(read_results(tmp_path / "results"))


def test_the_headline_counts_who_obeys_and_who_does_not(tmp_path: Path) -> None:
    page = render_table(
        results(
            tmp_path,
            closed("good", [verdict_row("good", "one")]),
            closed("bad", [verdict_row("bad", "one", "fail", score=2.0)]),
            closed("cut", [verdict_row("cut", "one")])[:-1],
        )
    )
    assert "1 of 3 implementations obey every law judged, 1 break at least one; 1 undecided" in page
    assert "1 open point" in page
    assert "nobody has looked at it" in page


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Said(verdict="pass", of="fail", reason="the law errs", finding=""), "the person says otherwise"),
        (Said(verdict="fail", of="pass", reason="by eye", finding="x.md"), "computed anew since the person looked"),
    ],
)
def test_what_a_person_says_against_the_computed_verdict_is_listed(tmp_path: Path, said: Said, words: str) -> None:
    (found,) = results(tmp_path, closed("bad", [verdict_row("bad", "one", "fail", score=2.0)]))
    page = render_table([replace(found, laws=[replace(found.laws[0], human=said)])])
    assert words in page
    assert said.reason in page
    assert "1 open point" in page


def test_a_finding_is_a_link_only_where_it_is_an_address(tmp_path: Path) -> None:
    (found,) = results(tmp_path, closed("bad", [verdict_row("bad", "one", "fail", score=2.0)]))
    for finding, linked in (("https://example.org/1", True), ("docs/one.md", False), ("javascript:alert(1)", False)):
        said = Said(verdict="fail", of="fail", reason="why", finding=finding)
        page = render_table([replace(found, human=said)])
        assert (f'href="{finding}"' in page) == linked


def test_text_stays_text(tmp_path: Path) -> None:
    verdict = verdict_row(HOSTILE, "one", "fail", score=2.0, message=HOSTILE, reproduction=HOSTILE)
    (found,) = results(tmp_path, closed(HOSTILE, [verdict]))
    said = Said(verdict="pass", of="fail", reason=HOSTILE, finding=HOSTILE)
    page = render_table([replace(found, human=said, laws=[replace(found.laws[0], human=said)])])
    names = {name for name, _ in Outline(page).elements}
    assert not names & {"script", "img"}
    assert "".join(Outline(page).text).count(HOSTILE) >= 6


def test_links_lead_to_cards_of_the_page(tmp_path: Path) -> None:
    (found,) = results(tmp_path, closed("bad", [verdict_row("bad", "one", "fail", score=2.0)]))
    said = Said(verdict="fail", of="fail", reason="why", finding="docs/one.md")
    outline = Outline(render_table([replace(found, laws=[replace(found.laws[0], human=said)])]))
    assert {address[1:] for address in outline.having("href")} <= set(outline.having("id"))


def test_kept_results_are_as_they_were_written_and_every_failure_was_looked_at() -> None:
    kept = read_results(KEPT)
    for result in kept:
        assert (KEPT / result.filename).read_text(encoding="utf-8") == as_text(result)
    assert [each for each in differences(kept) if each.kind != "contradicts"] == []


def test_findings_of_kept_results_are_there() -> None:
    kept = read_results(KEPT)
    said = [result.human for result in kept] + [law.human for result in kept for law in result.laws]
    assert all(not each.finding or is_address(each.finding) or (ROOT / each.finding).is_file() for each in said if each)

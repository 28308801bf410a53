"""Results: one file for each implementation and version, made anew by every run without losing what a person said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from kda_reports.command import app
from kda_reports.fields import RowError
from kda_reports.results import as_text, collect, differences, read_result, read_results, say
from kda_reports.rows import read_rows
from synthetic_rows import closed, lines, verdict_row
from typer.testing import CliRunner

if TYPE_CHECKING:
    from pathlib import Path

    from kda_reports.results import Result

HOSTILE = "../../<script>alert(1)</script>"
FINDING = "docs/findings/peer.md"


def result(folder: Path, *verdicts: dict[str, Any], name: str = "peer", ended: bool = True) -> Result:
    """Collect a run of an implementation from made-up rows."""
    rows = closed(name, list(verdicts))
    (folder / "rows.jsonl").write_text(lines(rows if ended else rows[:-1]), encoding="utf-8")
    (path,) = collect(read_rows([folder / "rows.jsonl"]), folder / "results")
    return read_result(path)


def test_a_result_says_of_each_law_what_its_tests_add_up_to(tmp_path: Path) -> None:
    found = result(
        tmp_path,
        verdict_row("peer", "one", "pass", score=0.25, seconds=1.5),
        verdict_row("peer", "one", "fail", score=3.0, seconds=0.5),
        verdict_row("peer", "one", "fail", score=math.nan, seconds=0.5, message="worst of all"),
        verdict_row("peer", "two", "pass", score=0.5),
        verdict_row("peer", "three", "unclaimed"),
    )
    laws = {law.law: law for law in found.laws}
    assert (found.implementation, found.version, found.computed, found.human) == ("peer", "1.2.3", "fail", None)
    assert (found.seconds, found.device, found.effort, found.precision) == (12.5, "cpu", "quick", {"bfloat16": "bf16"})
    assert (laws["one"].computed, laws["one"].num_failed, laws["one"].num_judged) == ("fail", 2, 3)
    assert laws["one"].worst is not None
    assert math.isnan(laws["one"].worst)
    assert (laws["one"].message, laws["one"].seconds) == ("worst of all", 2.5)
    assert (laws["two"].computed, laws["two"].worst, laws["two"].message) == ("pass", 0.5, "")
    assert (laws["three"].computed, laws["three"].num_unclaimed) == ("unclaimed", 1)


def test_collecting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    verdicts = verdict_row("peer", "one", "fail", score=math.inf), verdict_row("peer", "two")
    path = tmp_path / "results" / result(tmp_path, *verdicts).filename
    before = path.read_bytes()
    result(tmp_path, *verdicts)
    assert path.read_bytes() == before


def test_what_a_person_said_outlives_the_next_run_and_is_seen_to_be_stale(tmp_path: Path) -> None:
    first = result(tmp_path, verdict_row("peer", "one", "fail", score=3.0), verdict_row("peer", "two"))
    path = tmp_path / "results" / first.filename
    assert [(each.law, each.kind) for each in differences([first])] == [("one", "unexplained")]
    told = say(say(first, "one", "fail", "a sign is lost", FINDING), None, "fail", "see law one", FINDING)
    path.write_text(as_text(told), encoding="utf-8")
    assert differences([read_result(path)]) == []

    mended = result(tmp_path, verdict_row("peer", "one", "pass", score=0.1), verdict_row("peer", "two"))
    assert [(each.law, each.kind, each.computed) for each in differences([mended])] == [
        (None, "stale", "pass"),
        ("one", "stale", "pass"),
    ]
    gone = result(tmp_path, verdict_row("peer", "two"))
    assert [(each.law, each.kind, each.computed) for each in differences([gone])][1:] == [("one", "stale", "absent")]
    assert gone.laws[-1].human == told.laws[0].human


@pytest.mark.parametrize(
    ("outcome", "verdict", "kind"),
    [
        ("fail", "fail", None),
        ("error", "fail", None),
        ("fail", "pass", "contradicts"),
        ("fail", "unclaimed", "contradicts"),
        ("pass", "pass", None),
        ("pass", "fail", "contradicts"),
        ("unclaimed", "unclaimed", None),
    ],
)
def test_a_person_who_says_otherwise_is_listed(tmp_path: Path, outcome: str, verdict: str, kind: str | None) -> None:
    told = say(result(tmp_path, verdict_row("peer", "one", outcome)), "one", verdict, "looked at", FINDING)
    assert [each.kind for each in differences([told]) if each.law] == ([kind] if kind else [])


def test_a_run_that_did_not_end_is_incomplete(tmp_path: Path) -> None:
    found = result(tmp_path, verdict_row("peer", "one"), ended=False)
    assert (found.computed, found.seconds) == ("incomplete", None)


@pytest.mark.parametrize(
    ("law", "verdict", "reason", "finding", "message"),
    [
        ("none", "pass", "why", "", "law must be one of peer-1.2.3.json"),
        ("one", "maybe", "why", "", "verdict must be one of pass, fail, unclaimed"),
        ("one", "pass", " ", "", "reason must say why"),
        ("one", "fail", "why", "", "finding must name the report"),
    ],
)
def test_what_a_person_says_must_be_complete(
    tmp_path: Path, law: str, verdict: str, reason: str, finding: str, message: str
) -> None:
    with pytest.raises(RowError, match=message):
        say(result(tmp_path, verdict_row("peer", "one", "fail")), law, verdict, reason, finding)


def test_a_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    found = result(tmp_path, verdict_row(HOSTILE, "one"), name=HOSTILE)
    assert found.implementation == HOSTILE
    assert [path.name for path in (tmp_path / "results").iterdir()] == [found.filename]
    assert not found.filename.startswith(".")
    assert set(found.filename) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_two_names_of_one_file_are_refused(tmp_path: Path) -> None:
    result(tmp_path, verdict_row("a/b", "one"), name="a/b")
    with pytest.raises(RowError, match=r"a-b-1.2.3.json must be of a:b 1.2.3, got a file of a/b 1.2.3"):
        result(tmp_path, verdict_row("a:b", "one"), name="a:b")
    rows = [*closed("x/y", [verdict_row("x/y", "one")]), *closed("x:y", [verdict_row("x:y", "one")])]
    (tmp_path / "two.jsonl").write_text(lines(rows), encoding="utf-8")
    with pytest.raises(RowError, match=r"got two for x-y-1.2.3.json"):
        collect(read_rows([tmp_path / "two.jsonl"]), tmp_path / "results")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", 2, "schema must be 1"),
        ("computed", "fine", "computed must be one of"),
        ("laws", [], "laws must be of type dict"),
        ("human", {"verdict": "pass", "of": "pass", "finding": ""}, "reason must be present"),
        ("not_claimed", [1], "not_claimed must hold words"),
        ("version", "9", "implementation and version must be those of peer-1.2.3.json"),
    ],
)
def test_a_misshapen_file_is_named(tmp_path: Path, field: str, value: object, message: str) -> None:
    path = tmp_path / "results" / result(tmp_path, verdict_row("peer", "one")).filename
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    with pytest.raises(RowError, match=message) as refused:
        read_result(path)
    assert path.name in str(refused.value)


def test_an_empty_folder_makes_no_table(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="results must be files"):
        read_results(tmp_path)


def test_the_commands_collect_say_and_render(tmp_path: Path) -> None:
    rows, results, page = tmp_path / "rows.jsonl", tmp_path / "results", tmp_path / "new" / "table.html"
    rows.write_text(lines(closed("peer", [verdict_row("peer", "one", "fail", score=3.0)])), encoding="utf-8")

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["table", *words])

    assert "fail, 1 open" in run("collect", str(rows), "--out", str(results)).output
    file = str(results / "peer-1.2.3.json")
    refused = run("say", file, "--law", "one", "--verdict", "fail", "--reason", "a sign")
    assert (refused.exit_code, "finding must name" in refused.stderr) == (2, True)
    said = run("say", file, "--law", "one", "--verdict", "fail", "--reason", "a sign", "--finding", FINDING)
    assert said.exit_code == 0
    assert "fail, 0 open" in run("collect", str(rows), "--out", str(results)).output
    assert run("render", "--results", str(results), "--out", str(page)).exit_code == 0
    assert "a sign" in page.read_text(encoding="utf-8")
    assert run("render", "--results", str(tmp_path / "none"), "--out", str(page)).exit_code == 2


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = result(tmp_path, verdict_row("peer", "one", "fail", score=math.inf))
    told = replace(say(found, "one", "pass", "the law errs", ""), commit=None, dirty=None, suite=None)
    path = tmp_path / "results" / found.filename
    path.write_text(as_text(told), encoding="utf-8")
    assert read_result(path) == told

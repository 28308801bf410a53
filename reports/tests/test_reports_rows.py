"""Rows are read strictly: what is not a row is refused with the line it stands on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from kda_reports.fields import RowError
from kda_reports.rows import read_rows
from synthetic_rows import (
    closed,
    finish_row,
    lines,
    measure_row,
    run_row,
    sample,
    verdict_row,
)

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, text: str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_belong_to_the_run_that_opened_them(tmp_path: Path) -> None:
    mixed = [
        run_row("a"),
        run_row("b"),
        verdict_row("b", "one"),
        verdict_row("a", "two"),
        measure_row("b", "one", "o", 0.5),
    ]
    first, second = read_rows([write(tmp_path, lines(mixed))])
    assert [verdict.law for verdict in first.verdicts] == ["two"]
    assert [verdict.law for verdict in second.verdicts] == ["one"]
    assert [measure.tensor for measure in second.measures] == ["o"]
    assert first.finish is None


def test_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    paths = [write(tmp_path, lines(closed(name, [])), f"{name}.jsonl") for name in ("a", "b")]
    assert [run.implementation for run in read_rows(paths)] == ["a", "b"]


def test_strings_stand_for_non_finite_numbers(tmp_path: Path) -> None:
    rows = [run_row("a"), measure_row("a", "one", "o", math.inf, relative_error=math.nan, by_token=[[0, -math.inf]])]
    (run,) = read_rows([write(tmp_path, lines(rows))])
    assert run.measures[0].score == math.inf
    assert math.isnan(run.measures[0].relative_error)
    assert run.measures[0].by_token == ((0.0, -math.inf),)


def test_blank_lines_and_unknown_fields_are_no_error(tmp_path: Path) -> None:
    (run,) = read_rows([write(tmp_path, "\n" + lines([run_row("a", colour="green")]) + "\n\n")])
    assert run.implementation == "a"


def test_a_line_separator_inside_a_message_ends_no_line(tmp_path: Path) -> None:
    rows = lines([run_row("a"), verdict_row("a", "one", message="x")]).replace('"x"', '"left\u2028right"')
    (run,) = read_rows([write(tmp_path, rows)])
    assert run.verdicts[0].message == "left\u2028right"


@pytest.mark.parametrize(
    "field", sorted(set(verdict_row("a", "one")) - {"kind", "implementation", "seconds", "reason"})
)
def test_a_missing_field_of_a_verdict_names_its_line(tmp_path: Path, field: str) -> None:
    row = verdict_row("a", "one")
    del row[field]
    with pytest.raises(RowError, match=rf"rows\.jsonl line 2: {field} must be present"):
        read_rows([write(tmp_path, lines([run_row("a"), row]))])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"outcome": "fine"}, "outcome must be one of pass, fail, error, xfail, unclaimed, may, got 'fine'"),
        ({"case": 3}, "case must be of type str, got 3"),
        ({"score": "large"}, "score must be a number, nan, inf or -inf, got 'large'"),
        ({"score": True}, "score must be a number, nan, inf or -inf, got True"),
        ({"run": "run-b"}, "run must be opened by a run row before it is used, got 'run-b'"),
        ({"kind": "verdikt"}, "kind must be run, verdict, measure or finish, got 'verdikt'"),
    ],
)
def test_a_misshapen_verdict_is_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    rows = [run_row("a"), verdict_row("a", "one", **changes)]
    with pytest.raises(RowError, match=complaint):
        read_rows([write(tmp_path, lines(rows))])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"by_token": [[1.0]]}, r"by_token must hold pairs, got \[1.0\]"),
        ({"by_decay": {}}, "by_decay must be of type list"),
        (
            {"worst": {"index": {"t": 0.5}, "got": 0, "expected": 0, "bound": 0}},
            "worst, index: t must be of type int, got 0.5",
        ),
        (
            {"worst": {"index": {"t": True}, "got": 0, "expected": 0, "bound": 0}},
            "worst, index: t must be of type int, got True",
        ),
    ],
)
def test_a_misshapen_measure_is_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    rows = [run_row("a"), measure_row("a", "one", "o", 0.5, **changes)]
    with pytest.raises(RowError, match=complaint):
        read_rows([write(tmp_path, lines(rows))])


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([run_row("a", schema=2)], "line 1: schema must be 1, got 2"),
        ([run_row("a"), run_row("a")], "line 2: run must be opened once, got 'run-a' again"),
        ([*closed("a", []), verdict_row("a", "one")], "line 3: run must have no rows after its finish row"),
        ([run_row("a"), finish_row("a", [], exit="well")], "line 2: exit must be one of pass, fail, nothing, usage"),
    ],
)
def test_rows_out_of_order_are_refused(tmp_path: Path, rows: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(RowError, match=complaint):
        read_rows([write(tmp_path, lines(rows))])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "rows must hold at least one run, got none in rows.jsonl"),
        ("[1]\n", "line 1 must be a JSON object, got list"),
        (lines([run_row("a")]) + '{"kind": "verd', "line 2 must be a JSON object, got .*torn at its end"),
        ('{"kind": "run", "seconds": NaN}\n', "line 1 must be a JSON object, got the bare constant NaN"),
    ],
)
def test_what_is_no_rows_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RowError, match=complaint):
        read_rows([write(tmp_path, text)])


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="run `kda verify` to make one"):
        read_rows([tmp_path / "none.jsonl"])


def test_every_kind_of_row_survives_reading(tmp_path: Path) -> None:
    runs = read_rows([write(tmp_path, lines(sample()))])
    rows = sample()
    assert sum(len(run.verdicts) for run in runs) == sum(row["kind"] == "verdict" for row in rows)
    assert sum(len(run.measures) for run in runs) == sum(row["kind"] == "measure" for row in rows)
    assert sum(run.finish is not None for run in runs) == sum(row["kind"] == "finish" for row in rows)

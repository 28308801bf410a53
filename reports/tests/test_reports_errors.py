"""The error report: rows decide, nothing empty or unfinished looks green, the page needs nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kda_reports.errors import headline, matrix
from kda_reports.page import render_errors
from kda_reports.rows import RowError, read_runs

if TYPE_CHECKING:
    from pathlib import Path

RUN = {
    "kind": "run", "schema": 1, "run": "r", "implementation": "candidate", "version": "1", "effort": "quick",
    "started": "2026-01-01T00:00:00+00:00", "device": "cpu", "claims": {},
    "fingerprint": dict.fromkeys(("python", "torch", "triton", "numpy", "platform", "cpu", "gpu", "commit", "dirty")), "seed": 0,
}  # fmt: skip
VERDICT = {
    "kind": "verdict", "run": "r", "law": "a-law", "test": "t", "case": "T=3", "dtype": "float32", "outcome": "pass", "score": 0.5,
    "message": "", "reproduction": "kda reproduce",
}  # fmt: skip
MEASURE = {
    "kind": "measure", "run": "r", "law": "a-law", "case": "T=3", "dtype": "float32", "precision": "fp32", "tensor": "o", "score": 0.5,
    "relative_error": 1e-7, "worst": {"index": {"b": 0, "t": 2}, "got": 1.0, "expected": 1.0, "bound": 1e-6},
    "by_token": [[0, 0.1], [2, 0.5]], "by_decay": [[0.5, 0.5]], "regime": "zero", "reproduction": "kda reproduce <b>",
}  # fmt: skip
FINISH = {"kind": "finish", "run": "r", "exit": "pass", "seconds": 1.0}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_same_rows_give_the_same_page_without_outside_links(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", RUN, VERDICT, MEASURE, FINISH)
    page = render_errors(read_runs([rows]))
    assert page == render_errors(read_runs([rows]))
    assert "1 of 1 implementations" in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert "kda reproduce &lt;b&gt;" in page


def test_a_run_without_its_closing_row_is_incomplete(tmp_path: Path) -> None:
    (run,) = read_runs([written(tmp_path / "rows.jsonl", RUN, VERDICT)])
    assert headline(run).outcome == "incomplete"


def test_a_run_of_unclaimed_laws_is_no_pass(tmp_path: Path) -> None:
    (run,) = read_runs([written(tmp_path / "rows.jsonl", RUN, VERDICT | {"outcome": "unclaimed", "score": None}, FINISH)])
    assert headline(run).outcome == "nothing"


def test_one_failure_fails_law_and_implementation(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", RUN, VERDICT, VERDICT | {"outcome": "fail", "score": "inf"}, FINISH | {"exit": "fail"})
    (run,) = read_runs([rows])
    assert headline(run).outcome == "fail"
    assert matrix([run])[0][1][0].outcome == "fail"


@pytest.mark.parametrize("row", [{"kind": "other"}, {"kind": "verdict", "run": "r"}, VERDICT | {"outcome": "green"}, FINISH | {"run": "x"}])
def test_a_row_that_breaks_the_schema_is_named_by_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="row 2 of"):
        read_runs([written(tmp_path / "rows.jsonl", RUN, row)])


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="at least one run"):
        read_runs([written(tmp_path / "rows.jsonl")])

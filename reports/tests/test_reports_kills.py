"""The matrix of planted bugs: what is caught, what survives, what is failed though it is right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from kda_reports.fields import RowError
from kda_reports.kills import count_kills
from kda_reports.page import render_mutants
from kda_reports.rows import read_rows

if TYPE_CHECKING:
    from pathlib import Path


def run_of(name: str, kind: str, outcomes: dict[str, str], score: float | None = 0.5) -> list[dict[str, Any]]:
    common = {"run": name, "implementation": name}
    planted = {
        "kind": kind,
        "what": f"what <{name}>",
        "trigger": "any",
        "source": "own",
        "part": "chunk",
        "argument": "",
    }
    opening = {
        "kind": "run", "schema": 1, **common, "version": "1", "effort": "quick", "seed": 0,
        "started": "2026-01-01T00:00:00", "device": "cpu",
        "claims": {}, "fingerprint": {"commit": "abc", "dirty": False}, "planted": planted,
    }  # fmt: skip
    verdicts = [
        {
            "kind": "verdict", **common, "law": law, "test": law, "case": "", "dtype": "", "precision": "", "outcome": outcome,
            "score": score, "message": "broken here\nand there", "reproduction": "",
        }
        for law, outcome in outcomes.items()
    ]  # fmt: skip
    return [opening, *verdicts, {"kind": "finish", **common, "exit": "pass", "counts": {}, "seconds": 1.0}]


def written(tmp_path: Path, *runs: list[dict[str, Any]]) -> list[Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for rows in runs for row in rows))
    return read_rows([path])


def test_survivors_alarms_and_irreplaceable_laws_are_named(tmp_path: Path) -> None:
    runs = written(
        tmp_path,
        run_of("caught", "bug", {"one": "fail", "two": "fail"}, score=3.0),
        run_of("single", "bug", {"one": "fail", "two": "pass"}, score=2.0),
        run_of("alive", "bug", {"one": "pass", "two": "unclaimed"}),
        run_of("right", "correct", {"one": "pass"}, score=0.4),
        run_of("alarm", "equivalent", {"one": "error"}, score=0.7),
    )
    kills = count_kills(runs)
    assert (kills.num_bugs, [line.name for line in kills.survivors]) == (3, ["alive"])
    assert [line.name for line in kills.alarms] == ["alarm"]
    assert [(law.name, law.num_caught, list(law.alone)) for law in kills.laws] == [
        ("one", 2, ["single"]),
        ("two", 1, []),
    ]
    assert kills.weakest_caught is not None
    assert kills.largest_correct is not None
    assert (kills.weakest_caught.name, kills.largest_correct.name) == ("single", "alarm")
    assert "two" not in kills.survivors[0].outcomes


def test_the_page_says_what_survives_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    runs = written(tmp_path, run_of("alive", "bug", {"one": "pass"}), run_of("right", "correct", {"one": "pass"}))
    page = render_mutants(runs, ["rows.jsonl"])
    assert "0 of 1 planted bugs are caught; 1 of 1 correct implementations pass" in page
    assert "what &lt;alive&gt;" in page
    assert "what <alive>" not in page


def test_runs_without_a_planted_entry_are_refused(tmp_path: Path) -> None:
    rows = run_of("plain", "bug", {"one": "pass"})
    del rows[0]["planted"]
    with pytest.raises(RowError, match="plain must say what is planted"):
        count_kills(written(tmp_path, rows))


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="cut must be closed"):
        count_kills(written(tmp_path, run_of("cut", "bug", {"one": "pass"})[:-1]))

"""The catalogue of planted bugs: every edit finds its place, changes the specimen, and is caught or argued."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from kda_conformance.claims import UsageError
from kda_conformance.planted import bugs, matrix, null_study
from kda_conformance.planted.planting import Edit, apply, catalogue, variants

if TYPE_CHECKING:
    from pathlib import Path

MANY, OURS, CORRECT = 100, 40, 12


@pytest.mark.parametrize("name", [*catalogue(), *variants()])
def test_every_entry_makes_a_function(name: str) -> None:
    assert callable(getattr(bugs, name))


def test_the_catalogue_is_as_large_as_promised() -> None:
    entries = catalogue().values()
    assert len(entries) >= MANY
    assert sum(entry.source == "own" for entry in entries) >= OURS
    assert len(variants()) >= CORRECT
    assert all(entry.what and entry.trigger and entry.source for entry in entries)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (Edit(old="no such text", new=""), "1 times"),
        (Edit(old="x", new="", where=("no_such_function",)), "a function of the specimen"),
        (Edit(old="a", new="b", count=2), "2 times"),
    ],
)
def test_an_edit_that_finds_no_place_is_refused(edit: Edit, rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        apply(edit, "def f():\n    return a\n", "bug")


def test_an_edit_stays_in_its_function() -> None:
    text = "def f():\n    return a\n\n\ndef g():\n    return a\n"
    assert apply(Edit(old="a", new="b", where=("g",)), text, "bug") == text[:-2] + "b\n"


def test_the_command_tells_caught_from_passed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kda_conformance", "mutants", "P-unchecked", "fp32-chunk64", "--effort", "quick"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    runs = [[row for row in rows if row["implementation"] == name] for name in ("P-unchecked", "fp32-chunk64")]
    assert matrix.broken(runs[0]) == ["wrong-arguments-are-refused"]
    assert matrix.broken(runs[1]) == []
    page = (tmp_path / "mutants.html").read_text()
    assert "1 of 1 planted bugs are caught; 1 of 1 correct implementations pass" in page


def test_a_bug_that_nothing_catches_fails_the_command() -> None:
    alive: list[dict[str, Any]] = [
        {"kind": "run", "planted": {"id": "x", "kind": "bug"}},
        {"kind": "verdict", "law": "l", "outcome": "pass"},
    ]
    assert matrix.survivors([alive]) == ["x"]
    assert matrix.false_alarms([alive]) == []


def test_an_unknown_bug_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="no-such-bug"):
        matrix.chosen(["no-such-bug"])


def test_the_null_study_judges_the_variants_of_a_class_on_the_same_calls(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    names = ["fp32-chunk16", "fp32-bits"]
    margin = null_study.judge_class("fp32", names, 3, 1, tmp_path)
    cases = [
        [
            row["case"]
            for row in map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
            if "score" in row
        ]
        for name in names
    ]
    assert cases[0] == cases[1]
    assert (len(margin.scores), margin.alarms) == (4, 0)
    assert margin.quantile(1) == max(margin.scores)

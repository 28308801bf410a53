"""The catalogue of planted bugs: every edit finds its place, changes the specimen, and is caught or argued."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from kda_conformance.claims import UsageError
from kda_conformance.planted import bugs, matrix, null_study
from kda_conformance.planted.planting import Edit, Entry, apply, catalogue, variants
from kda_reference import CertificateError
from rich.console import Console

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


def test_the_command_tells_caught_from_passed_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kda_conformance",
        "mutants",
        "--effort",
        "quick",
        "--first-law",
        "--out",
        str(tmp_path),
    ]
    first = subprocess.run([*command, "P-unchecked"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout
    kept = (tmp_path / "entries" / "P-unchecked.jsonl").read_text()
    both = [*command, "P-unchecked", "fp32-chunk64", "--resume", "--processes", "2"]
    done = subprocess.run(both, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "rows.jsonl").read_text().startswith(kept)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    runs = [[row for row in rows if row["implementation"] == name] for name in ("P-unchecked", "fp32-chunk64")]
    assert matrix.broken(runs[0]) == ["wrong-arguments-are-refused"]
    assert matrix.broken(runs[1]) == []
    page = (tmp_path / "mutants.html").read_text()
    assert "1 of 1 planted bugs are caught; 1 of 1 correct implementations pass" in page


def test_a_run_is_not_resumed_in_another_way(tmp_path: Path) -> None:
    folder = tmp_path / "entries"
    folder.mkdir()
    entry = catalogue()["G05"]
    quick = matrix.Plan(effort="quick")
    (folder / "G05.jsonl").write_text(json.dumps({"kind": "run", "options": quick.options(entry)}) + "\n")
    (rows,) = matrix.run([entry], quick, tmp_path, Console(quiet=True), resume=True)
    assert [row["kind"] for row in rows] == ["run"]
    for other in (matrix.Plan(effort="standard"), replace(quick, seed=1), replace(quick, first_law=True)):
        with pytest.raises(UsageError, match="--resume must go on as the run began"):
            matrix.run([entry], other, tmp_path, Console(quiet=True), resume=True)


def test_one_entry_of_a_class_goes_before_those_that_need_its_budgets(tmp_path: Path, monkeypatch: Any) -> None:
    log: list[tuple[str, str, int]] = []

    def judge(entry: Entry, plan: matrix.Plan, folder: Path, processes: int = 1) -> matrix.Rows:
        del plan, folder
        log.append(("begin", entry.id, processes))
        time.sleep(0.01)
        log.append(("end", entry.id, processes))
        return [{"kind": "run"}]

    monkeypatch.setattr(matrix, "judge", judge)
    entries = matrix.chosen(["fp32-chunk64", "bf16-chunk64", "fp32-chunk16", "G05", "bf16-wy"])
    matrix.run(entries, matrix.Plan(effort="quick", processes=6), tmp_path, Console(quiet=True))
    place = {(when, name): at for at, (when, name, _) in enumerate(log)}
    assert {name: processes for _, name, processes in log} == {
        "fp32-chunk64": 3, "bf16-chunk64": 3, "fp32-chunk16": 1, "G05": 1, "bf16-wy": 1,
    }  # fmt: skip
    for leader, follower in (("fp32-chunk64", "fp32-chunk16"), ("fp32-chunk64", "G05"), ("bf16-chunk64", "bf16-wy")):
        assert place["end", leader] < place["begin", follower]


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
    names = ["fp32-chunk16", "fp32-bits"]
    monkeypatch.setattr(null_study, "variants", lambda: {name: variants()[name] for name in names})
    (margin,) = null_study.run(3, [1, 2], tmp_path, Console(quiet=True))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    cases = [
        [row["case"] for row in rows if row["kind"] == "verdict" and row["implementation"] == name] for name in names
    ]
    assert cases[0] == cases[1]
    assert len(set(cases[0])) > 2
    assert (len(margin.scores), margin.alarms, margin.unjudged) == (8, 0, 0)
    assert margin.quantile(1) == max(margin.scores)
    finish = [row for row in rows if row["kind"] == "finish"]
    assert [row["counts"]["pass"] for row in finish] == [4, 4]

    monkeypatch.setattr(null_study, "judge_class", pytest.fail)
    assert null_study.run(3, [1, 2], tmp_path, Console(quiet=True), resume=True) == [margin]


def test_a_call_that_the_reference_cannot_judge_is_no_alarm(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: object) -> None:
        message = "too coarse"
        raise CertificateError(message)

    monkeypatch.setattr("kda_conformance.service.budget_of", refuse)
    null_study.judge_class(["fp32-chunk16"], 1, 1, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "fp32-chunk16.jsonl").read_text().splitlines()]
    (verdict,) = [row for row in rows if row["kind"] == "verdict"]
    assert (verdict["outcome"], verdict["score"], verdict["message"]) == ("error", None, "too coarse")
    assert null_study.margin("fp32", rows) == null_study.Margin("fp32", (), 1)

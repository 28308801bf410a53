"""The commands of the history, and what is taken into it of each kind of rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import synthetic_timings
from kda_reports.command import app
from kda_reports.fields import RowError
from kda_reports.intake import take
from kda_reports.metrics import METRICS, PAGES
from kda_reports.store import Store
from synthetic_history import commit, green, measured, noisy, timed
from synthetic_rows import COMMIT, closed, lines, measure_row, run_row, verdict_row
from synthetic_timings import refused_row, timing_row
from typer.testing import CliRunner, Result

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]
FINGERPRINT = {
    "suite": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1", "gpu": None, "cpu": "A CPU",
    "commit": COMMIT, "commit_time": "2026-01-02T05:04:05+02:00", "dirty": False,
}  # fmt: skip


def compiled_row(**changes: Any) -> Row:
    """Return a row of the compile report."""
    row = {
        "kind": "compile", "schema": 1, "run": "run", "started": "2026-01-02T03:04:05+00:00", "fingerprint": FINGERPRINT,
        "kernel": "kda_kernel", "launch": 0, "pass": "forward", "target": "sm_90", "triton": "3.7.1", "dtype": "bfloat16",
        "shape": {"K": 128, "V": 128, "C": 64}, "outcome": "compiled", "message": "", "registers": 128, "spilled_bytes": 16,
        "shared_bytes": 32768, "code_bytes": 4096, "matrix_instructions": {"HMMA.16816.F32.BF16": 96, "HMMA.1688.F32.TF32": 4},
    }  # fmt: skip
    return row | changes


def written(folder: Path, rows: list[Row]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(lines(rows), encoding="utf-8")
    return path


def judged(name: str, rows: list[Row], **changes: Any) -> list[Row]:
    """Return the rows of a run, with the fingerprint that a run has."""
    _, *others = closed(name, rows)
    return [run_row(name, fingerprint=FINGERPRINT | changes), *others]


def kda_history(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["history", *map(str, words)])


def stored(folder: Path, rows: list[Any]) -> Path:
    Store(folder / "history").add(rows)
    return folder / "history"


def test_a_conformance_run_gives_its_verdict_and_its_largest_errors(tmp_path: Path) -> None:
    rows = [
        verdict_row("a", "one", score=0.4),
        measure_row("a", "one", "o", 0.2),
        measure_row("a", "two", "o", 0.4),
        measure_row("a", "two", "dq", 0.1),
    ]
    found = take(written(tmp_path, judged("a", rows)))
    values = {(row.metric, row.call): (row.value, row.n) for row in found.rows}
    assert values == {
        ("conformance", "quick effort"): (1.0, 1),
        ("laws-broken", "quick effort"): (0.0, 1),
        ("error-over-bound", "o, quick effort"): (0.4, 2),
        ("error-over-bound", "dq, quick effort"): (0.1, 1),
    }
    (first, *_) = found.rows
    assert (first.commit, first.commit_time, first.suite_version) == (COMMIT, "2026-01-02T03:04:05+00:00", "0.1.0")
    assert first.machine["cpu"] == "A CPU"
    assert first.libraries == {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1"}
    assert found.notes == []


def test_a_broken_law_is_no_pass(tmp_path: Path) -> None:
    rows = [verdict_row("a", "one", "fail", score=3.0), verdict_row("a", "two")]
    values = {row.metric: row.value for row in take(written(tmp_path, judged("a", rows))).rows}
    assert values == {"conformance": 0.0, "laws-broken": 1.0}


def test_of_a_run_that_did_not_end_only_that_is_kept(tmp_path: Path) -> None:
    rows = judged("a", [verdict_row("a", "one"), measure_row("a", "one", "o", 0.4)])[:-1]
    found = take(written(tmp_path, rows))
    assert [(row.metric, row.value) for row in found.rows] == [("conformance", 0.0)]
    assert "stopped after 1 test" in found.notes[0]


def test_a_checkout_of_unknown_state_counts_as_changed(tmp_path: Path) -> None:
    rows = judged("a", [verdict_row("a", "one")], dirty=None)
    assert all(row.dirty for row in take(written(tmp_path, rows)).rows)


def test_rows_without_a_commit_have_no_place_in_a_history(tmp_path: Path) -> None:
    path = written(tmp_path, judged("a", [verdict_row("a", "one")], commit=None))
    with pytest.raises(RowError, match=r"run-a: commit must be known, got None; .* measure from a checkout"):
        take(path)


def test_planted_bugs_have_no_history(tmp_path: Path) -> None:
    planted = dict.fromkeys(("what", "trigger", "source", "part", "argument"), "") | {"kind": "bug"}
    rows = judged("a", [verdict_row("a", "one")])
    rows[0]["planted"] = planted
    with pytest.raises(RowError, match="must be of a real implementation"):
        take(written(tmp_path, rows))


def test_a_benchmark_gives_times_and_peaks_and_says_what_has_none(tmp_path: Path) -> None:
    rows = [timing_row("a"), timing_row("b", peak_bytes=None), refused_row("c"), synthetic_timings.finish_row("fail")]
    found = take(written(tmp_path, rows))
    assert [(row.implementation, row.metric) for row in found.rows] == [
        ("a", "time"),
        ("a", "peak-memory"),
        ("b", "time"),
    ]
    time = found.rows[0]
    assert (time.n, time.spread) == (3, rows[0]["time"]["mad"])
    assert time.samples == tuple(rows[0]["time"]["samples"])
    assert found.notes == ["c on forward-softplus-T2048-H16 has no time: red"]


def test_a_compile_report_gives_what_each_kernel_needs(tmp_path: Path) -> None:
    rows = [compiled_row(), compiled_row(launch=1, outcome="error", message="too large")]
    found = take(written(tmp_path, rows))
    assert {row.metric: row.value for row in found.rows} == {
        "registers": 128.0,
        "spilled": 16.0,
        "shared-memory": 32768.0,
        "code-size": 4096.0,
        "matrix-instructions": 100.0,
    }
    assert found.notes == ["kda_kernel launch 1 does not compile for sm_90: too large"]


def test_compilers_are_kept_apart_as_machines_are(tmp_path: Path) -> None:
    found = take(written(tmp_path, [compiled_row(), compiled_row(triton="3.9.0")])).rows
    assert len({row.series for row in found}) == len(found) == 10


@pytest.mark.parametrize("text", ["", '{"kind": "finish"}\n', "junk\n"])
def test_a_file_of_no_known_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(RowError, match=r"rows\.jsonl"):
        take(path)


def test_nothing_to_keep_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="must hold something to keep"):
        take(written(tmp_path, [refused_row("c")]))


def test_every_metric_that_is_taken_in_is_described() -> None:
    assert {metric.page for metric in METRICS.values()} == set(PAGES)
    for metric in METRICS.values():
        assert metric.better in ("lower", "higher", "neither")
        assert metric.absolute > 0


def test_add_says_what_is_new_and_what_was_there(tmp_path: Path) -> None:
    path = written(tmp_path, judged("a", [verdict_row("a", "one")]))
    store = tmp_path / "history"
    assert "2 rows added, 0 were there" in kda_history("add", path, "--store", store).output
    assert "0 rows added, 2 were there" in kda_history("add", path, "--store", store).output


def test_a_bad_file_among_several_adds_nothing(tmp_path: Path) -> None:
    path, bad = written(tmp_path, judged("a", [verdict_row("a", "one")])), tmp_path / "bad.jsonl"
    bad.write_text("junk\n")
    result = kda_history("add", path, bad, "--store", tmp_path / "history")
    assert result.exit_code == 2
    assert "bad.jsonl line 1" in result.stderr
    assert not (tmp_path / "history").exists()


def test_list_shows_every_series_with_its_newest_value(tmp_path: Path) -> None:
    store = stored(tmp_path, [*timed([1e-3, 2e-3]), measured(5, 7e-3, implementation="other")])
    result = kda_history("list", "--store", store)
    (time,) = [line for line in result.output.splitlines() if "time" in line and "steady" in line]
    assert "0.002" in time
    assert commit(1)[:10] in time
    assert "other" in result.output
    assert "other" not in kda_history("list", "--store", store, "--implementation", "st%").output


def test_a_pattern_that_matches_nothing_is_bad_usage(tmp_path: Path) -> None:
    result = kda_history("list", "--store", stored(tmp_path, timed([1.0])), "--metric", "speed")
    assert result.exit_code == 2
    assert "--metric and --implementation must match a series" in result.stderr


@pytest.mark.parametrize("command", [("list",), ("compare", commit(0)[:8], commit(1)[:8])])
def test_a_corrupt_row_is_named_whenever_the_history_is_read(tmp_path: Path, command: tuple[str, ...]) -> None:
    store = stored(tmp_path, timed([1e-3, 2e-3]))
    path = Store(store).path
    path.write_bytes(path.read_bytes()[:-20])
    result = kda_history(*command, "--store", store)
    assert result.exit_code == 0
    assert "rows.jsonl line 4 must be a JSON object" in result.stderr
    assert "1 of its lines count for nothing" in result.stderr


def test_prune_says_what_it_would_do_and_does_it_when_told(tmp_path: Path) -> None:
    store = stored(tmp_path, timed(noisy(0)[:20]))
    options = ("--store", store, "--before", "2026-01-03", "--keep", "15")
    assert "would remove 10 rows and set 0 lines aside" in kda_history("prune", *options).output
    assert len(Store(store).read().rows) == 40
    assert "10 rows removed, 0 lines set aside" in kda_history("prune", *options, "--yes").output
    assert {row.commit for row in Store(store).read().rows} == {commit(i) for i in range(5, 20)}
    assert "would remove 0 rows" in kda_history("prune", "--store", store).output


def test_compare_prints_markdown(tmp_path: Path) -> None:
    store = stored(tmp_path, [*timed([1e-3, 1e-3]), measured(1, 5e7, metric="peak-memory", unit="bytes", samples=None)])
    result = kda_history("compare", commit(0)[:8], commit(1)[:8], "--store", store)
    assert result.exit_code == 0
    assert result.output.startswith("### Unchanged: ")


def test_a_commit_that_is_not_there_is_bad_usage(tmp_path: Path) -> None:
    result = kda_history("compare", "feed", commit(1), "--store", stored(tmp_path, timed([1.0, 1.0])))
    assert result.exit_code == 2
    assert "base must begin one commit of the history, got 'feed', which begins 0" in result.stderr


def test_a_row_is_plain_json(tmp_path: Path) -> None:
    store = stored(tmp_path, [green(0)])
    (line,) = Store(store).path.read_text().splitlines()
    assert json.loads(line).items() >= {"pass": "all", "schema": 1, "unit": "pass"}.items()

"""Training rows and their page: read strictly, compared like with like, and nothing said of a run beyond where it was stopped."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from kda_reports.command import app
from kda_reports.fields import RowError
from kda_reports.training import read_training
from kda_reports.training_charts import WRONG, picture
from kda_reports.training_page import render_training
from kda_reports.training_panels import best_rates, compare, condensed
from synthetic_rows import lines
from synthetic_training import SHARES, run_row, run_rows, sample, step_row, throughput_rows
from typer.testing import CliRunner

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
MEASURED = Path(__file__).parents[2] / "docs" / "measured"


def write(folder: Path, rows: list[dict[str, Any]], name: str = "some.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(rows), encoding="utf-8")
    return path


def render(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    return render_training(*read_training([write(folder, rows)]), ["some.jsonl"], name="page", every=50)


@pytest.mark.parametrize(
    ("steps", "changes", "ended"),
    [
        (tuple(range(10, 401, 10)), {}, "steps"),
        (tuple(range(10, 391, 10)), {}, None),
        ((*range(10, 291, 10), 294), {}, "accuracy"),
        (tuple(range(10, 301, 10)), {"ended": "accuracy"}, "accuracy"),
    ],
    ids=["all", "stopped", "off-the-rhythm", "said"],
)
def test_a_run_has_ended_if_its_rows_say_so(
    tmp_path: Path, steps: tuple[int, ...], changes: dict[str, Any], ended: str | None
) -> None:
    rows = run_rows(steps=steps)
    rows[-1] |= changes
    ((run,), _) = read_training([write(tmp_path, rows)])
    assert run.ended == ended


def test_what_the_table_says_is_of_the_first_step_that_did_it(tmp_path: Path) -> None:
    rows = [run_row(), *(step_row(10 * i, accuracy=a) for i, a in enumerate((0.5, 0.95, 0.7, 0.992, 0.992, 0.8), 1))]
    ((run,), _) = read_training([write(tmp_path, rows)])
    first, later = run.reached(0.9), run.reached(0.99)
    assert first is not None
    assert later is not None
    assert (first.step, later.step, run.reached(0.999)) == (20, 40, None)
    assert (run.final.accuracy, run.best.step, run.steepest.step) == (0.8, 40, 30)


def test_runs_share_a_panel_by_task_and_length_and_a_name_by_settings(tmp_path: Path) -> None:
    rows = [
        *run_rows("gdn"), *run_rows("kda"), *run_rows("kda", seed=1), *run_rows("kda", warmup=7),
        *run_rows("kda", length=512),
    ]  # fmt: skip
    runs, _ = read_training([write(tmp_path, rows)])
    comparison = compare(runs)
    assert [(panel.length, len(panel.entries)) for panel in comparison.panels] == [(256, 4), (512, 1)]
    assert comparison.names == ["KDA, warmup 7", "KDA, warmup None", "GDN, warmup None"]
    assert "warmup" not in comparison.shared
    assert comparison.shared["device"] == "A GPU"
    assert len(comparison.runs_of("KDA, warmup None")) == 3


def a_run(learning_rate: float, *accuracies: float, **changes: Any) -> list[dict[str, Any]]:
    """Return a run of some logged steps; changes are those of its recipe."""
    mixer = changes.pop("mixer", "kda")
    labels = {key: value for key, value in changes.items() if key in ("data", "length", "seed")}
    steps = [step_row(10 * i, mixer, accuracy=a, **labels) for i, a in enumerate(accuracies, 1)]
    return [run_row(mixer, learning_rate=learning_rate, **changes), *steps]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([*a_run(1e-3, 0.5, 0.8), *a_run(1e-4, 0.7, 0.9)], {"kda": 1e-4}),
        # The last accuracy counts, not the best.
        ([*a_run(1e-3, 0.99, 0.8), *a_run(1e-4, 0.7, 0.9)], {"kda": 1e-4}),
        # Seeds are averaged, and one that was not run is no advantage.
        ([*a_run(1e-3, 0.9), *a_run(1e-3, 0.7, seed=1), *a_run(1e-4, 0.85), *a_run(1e-4, 0.85, seed=1)], {"kda": 1e-4}),
        ([*a_run(1e-3, 0.9), *a_run(1e-4, 0.8), *a_run(1e-4, 0.8, seed=1)], {"kda": 1e-4}),
        # Of equals the quicker.
        ([*a_run(1e-3, 0.99, 1.0), *a_run(1e-4, 0.95, 1.0)], {"kda": 1e-3}),
        # Each mixer has its own.
        (
            [*a_run(1e-3, 0.8), *a_run(1e-4, 0.9), *a_run(1e-3, 0.9, mixer="gdn"), *a_run(1e-4, 0.8, mixer="gdn")],
            {"kda": 1e-4, "gdn": 1e-3},
        ),
    ],
    ids=["better", "last", "mean", "seeds", "quicker", "mixers"],
)
def test_the_best_learning_rate_of_each_mixer_is_shown(
    tmp_path: Path, rows: list[dict[str, Any]], expected: dict[str, float]
) -> None:
    runs, _ = read_training([write(tmp_path, rows)])
    chosen, tried = best_rates(runs)
    assert {run.mixer: run.learning_rate for run in chosen} == expected
    assert sorted(one.chosen for one in tried) == sorted(expected.values())


def test_rates_are_compared_where_nothing_else_differs(tmp_path: Path) -> None:
    rows = [
        *a_run(1e-3, 0.5),
        *a_run(1e-4, 0.6, warmup=7),
        *a_run(1e-4, 0.7, length=512),
        *a_run(1e-4, 0.8, data="stacks"),
    ]
    runs, _ = read_training([write(tmp_path, rows)])
    assert best_rates(runs) == (runs, [])


def test_a_page_of_several_learning_rates_says_which_is_shown_and_keeps_all_runs(tmp_path: Path) -> None:
    rows = [*run_rows("kda"), *run_rows("gdn"), *a_run(1e-4, 0.25, 0.75)]
    files = render(tmp_path, rows)
    page = files[".html"]
    assert "<h2>Runs at the best learning rate</h2>" in page
    assert "Of 3 runs those" in page
    assert "KDA 1 of 1; GDN 1 of 1" in page
    assert '0.7500 <span class="quiet">(1)</span>' in page
    assert page.count('href="#rates"') == 2
    assert {row["learning_rate"] for row in csv.DictReader(io.StringIO(files[".csv"]))} == {"0.001", "0.0001"}
    assert files[".jsonl"].count('"kind": "run"') == 3
    assert "#rates" not in render(tmp_path, rows[:82])[".html"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*run_rows(), {"kind": "verdict"}], "some.jsonl line 42: kind must be one of run, train, throughput"),
        ([step_row(10)], "kind must follow a row of kind run"),
        ([*run_rows(), *throughput_rows()[1:]], "kind must follow the component step"),
        ([*throughput_rows(), step_row(10)], "kind must follow a row of kind run"),
        ([run_row(), *run_rows()], "kind must be followed by at least one row of kind train"),
        ([run_row(), step_row(20), step_row(20)], "step must be greater than the one before, 20"),
        ([run_row(), step_row(10, accuracy=1.5)], "accuracy must be a share from 0 to 1"),
        ([run_row(), step_row(10, accuracy="nan")], "accuracy must be a share from 0 to 1"),
        ([run_row(), step_row(10, seed=1)], "seed must be that of its run, 0"),
        ([run_row(), step_row(10, ended="late")], "ended must be one of steps, accuracy"),
        ([], "at least one run or throughput"),
    ],
    ids=["kind", "no-run", "no-step", "run-is-over", "no-rows", "back", "share", "nan", "seed", "ended", "empty"],
)
def test_rows_that_are_no_training_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_training([write(tmp_path, rows)])


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, run_rows())
    path.write_text(path.read_text(encoding="utf-8") + '{"kind": "tr', encoding="utf-8")
    result = CliRunner().invoke(app, ["training", str(path), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 2
    assert "some.jsonl line 42" in result.stderr
    assert "torn" in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_condensed_rows_say_the_same(tmp_path: Path) -> None:
    """The table and the shares come out alike, and condensing again changes nothing."""
    rows = [*run_rows(steps=(*range(10, 291, 10), 294)), *sample()]
    runs, throughputs = read_training([write(tmp_path, rows)])
    text = condensed(runs, throughputs, 100)
    assert text.count("\n") < len(rows) / 3
    path = tmp_path / "condensed.jsonl"
    path.write_text(text, encoding="utf-8")
    again = read_training([path])
    assert condensed(*again, 100) == text
    pages = [render_training(*found, [], name="page", every=100)[".html"] for found in ((runs, throughputs), again)]
    tables = [re.findall(r"<table.*?</table>", page, re.DOTALL) for page in pages]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


def test_the_page_loads_nothing_and_draws_every_panel(tmp_path: Path) -> None:
    page = render(tmp_path, sample())[".html"]
    assert not re.search(r"https?://|<script|<link|\bsrc=|url\(|@import", page)
    assert page.count("<svg") == 3 * 2 + 1
    for name in ("KDA", "GDN", "decay only"):
        assert page.count(f">{name}</text>") == 3 * 2
    assert all(f">{name}</text>" in page for name in SHARES)
    assert "Runs that reached an accuracy of 0.99: KDA 2 of 2; GDN 2 of 2; decay only 1 of 2" in page
    assert render(tmp_path, sample())[".html"] == page


def test_a_stopped_run_is_said_to_be_incomplete(tmp_path: Path) -> None:
    stopped, whole = (render(tmp_path, rows)[".html"] for rows in (sample(), run_rows()))
    assert "1 run was stopped before the end" in stopped
    assert stopped.count("<td>stopped</td>") == 1
    assert ">incomplete<" not in whole


def test_the_quickest_of_a_task_stands_out(tmp_path: Path) -> None:
    page = render(tmp_path, [*run_rows("kda"), *run_rows("gdn")])[".html"]
    assert re.findall(r'number least">(\d+)<', page) == ["70", "140"]


def test_either_kind_of_row_makes_a_page(tmp_path: Path) -> None:
    assert "<h2>Throughput" not in render(tmp_path, run_rows())[".html"]
    page = render(tmp_path, throughput_rows())[".html"]
    assert "<h1>12,346 tokens a second in training</h1>" in page
    assert "-2.0 %" in page
    assert "All runs" not in page


@pytest.mark.parametrize("loss", ["nan", "inf", 0.0], ids=str)
def test_a_loss_that_has_no_logarithm_is_drawn_somewhere_or_left_out(tmp_path: Path, loss: object) -> None:
    files = render(tmp_path, [run_row(), step_row(10), step_row(20, loss=loss, accuracy=1)])
    assert "NaN" not in files[".html"]
    assert files[".html"].count("<svg") == 3


def test_names_are_text_whatever_they_say(tmp_path: Path) -> None:
    rows = [*run_rows(data=HOSTILE), *throughput_rows(device=HOSTILE, component=HOSTILE)]
    for row in rows:
        row |= {key: HOSTILE for key in ("mixer", "device", "torch", "operator") if key in row}
    page = render_training(*read_training([write(tmp_path, rows)]), [HOSTILE], name="page", every=50)[".html"]
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_every_logged_step_is_in_the_csv(tmp_path: Path) -> None:
    rows = sample()
    found = list(csv.DictReader(io.StringIO(render(tmp_path, rows)[".csv"])))
    expected = [row for row in rows if row["kind"] == "train"]
    assert len(found) == len(expected)
    assert {(row["data"], row["mixer"], row["step"], float(row["loss"])) for row in found} == {
        (row["data"], row["mixer"], str(row["step"]), row["loss"]) for row in expected
    }


def test_the_command_reads_folders_and_writes_page_numbers_and_picture(tmp_path: Path) -> None:
    write(tmp_path / "in" / "one", run_rows("kda"), "rows.jsonl")
    write(tmp_path / "in" / "two", run_rows("gdn"), "rows.jsonl")
    write(tmp_path / "in", [{"kind": "synthetic"}], "summary.jsonl")
    out, image = tmp_path / "new" / "page.html", tmp_path / "images" / "curves.svg"
    command = ["training", str(tmp_path / "in"), "--out", str(out), "--image", str(image)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.parent.iterdir()} == {"page.html", "page.csv", "page.jsonl"}
    page = out.read_text(encoding="utf-8")
    assert "one/rows.jsonl, two/rows.jsonl" in page
    assert all(f'href="{name}"' in page for name in ("page.csv", "page.jsonl"))
    assert image.read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (run_rows(), ["--out", "page.csv"], "--out must end in .html"),
        (run_rows(), ["--out", "some.html"], "--out must have another name than the rows that are read"),
        (throughput_rows(), ["--image", "a.svg"], "--image must have training runs to draw"),
    ],
    ids=["ending", "own-rows", "nothing-to-draw"],
)
def test_a_call_that_cannot_be_served_writes_nothing(
    tmp_path: Path, rows: list[dict[str, Any]], options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, rows)
    result = CliRunner().invoke(app, ["training", str(path), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert path.read_text(encoding="utf-8") == lines(rows)


def test_the_picture_in_the_documents_is_that_of_the_rows_beside_it() -> None:
    runs, _ = read_training([MEASURED])
    drawn = picture(compare(best_rates(runs)[0]), WRONG)
    assert (MEASURED.parent / "images" / "training.svg").read_text(encoding="utf-8") == drawn


def test_measured_rows_are_condensed_ones() -> None:
    found = read_training([MEASURED])
    kept = (MEASURED / "rows.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in condensed(*found, 50).splitlines()] == [
        json.loads(line) for line in kept.splitlines()
    ]

"""The benchmark's rows and page: read strictly, compared like with like, no number for what is refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from kda_reports.command import app
from kda_reports.fields import RowError
from kda_reports.timing_page import render_bench
from kda_reports.timings import comparisons, operator_ratios, read_timings
from synthetic_rows import lines
from synthetic_timings import LENGTHS, SLOWER, finish_row, refused_row, sample, timing_row
from typer.testing import CliRunner

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(lines(rows), encoding="utf-8")
    return path


def render(folder: Path, rows: list[dict[str, Any]]) -> str:
    return render_bench(*read_timings([write(folder, rows)]), ["rows.jsonl"])


def test_curves_hold_all_that_differs_in_one_size_only(tmp_path: Path) -> None:
    other_gate = timing_row("quick", 4096, gate="bounded")
    timings, _ = read_timings([write(tmp_path, [*sample(), other_gate])])
    (panel,) = comparisons(timings)
    assert (panel.axis, [curve.name for curve in panel.curves]) == ("T", list(SLOWER))
    for curve in panel.curves:
        assert [point[0] for point in curve.points] == list(LENGTHS)
        assert [point[1] / point[0] for point in curve.points] == pytest.approx(
            [1e-7 * SLOWER[curve.name]] * len(LENGTHS)
        )


def test_one_size_is_no_curve(tmp_path: Path) -> None:
    timings, _ = read_timings([write(tmp_path, [timing_row("quick")])])
    assert comparisons(timings) == operator_ratios(timings) == []


def test_ratios_are_to_the_first_implementation_on_the_same_workload(tmp_path: Path) -> None:
    timings, _ = read_timings([write(tmp_path, sample())])
    (panel,) = operator_ratios(timings)
    assert "quick" in panel.title
    assert {curve.name: curve.points[0][1] for curve in panel.curves} == pytest.approx(
        {name: ratio for name, ratio in SLOWER.items() if name != "quick"}
    )
    for curve in panel.curves:
        assert all(low < ratio < high for _, ratio, low, high in curve.points)


def test_the_floor_is_the_slower_of_bytes_and_operations(tmp_path: Path) -> None:
    by_bytes, by_operations = (
        timing_row("a", least_bytes=6 * 10**9, flop=0),
        timing_row("b", least_bytes=0, flop=14 * 10**11),
    )
    timings, _ = read_timings([write(tmp_path, [by_bytes, by_operations])])
    assert [timing.floor for timing in timings] == pytest.approx([2e-3, 2e-3])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (refused_row("a", time=timing_row("a")["time"]), "time must be there if and only if the outcome is measured"),
        (timing_row("a", time=None), "time must be there if and only if the outcome is measured"),
        (timing_row("a", outcome="fast"), "outcome must be one of measured, red, error, unclaimed"),
        (timing_row("a", schema=2), "schema must be 1"),
        (timing_row("a", kind="verdict"), "kind must be one of bench, finish"),
        (finish_row(), "at least one timing"),
    ],
    ids=["red-with-a-number", "measured-without", "outcome", "schema", "kind", "empty"],
)
def test_a_row_that_contradicts_itself_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_timings([write(tmp_path, [row])])


def test_the_page_loads_nothing_and_draws_every_side(tmp_path: Path) -> None:
    page = render(tmp_path, sample())
    assert not re.search(r"https?://|<script|<link|\bsrc=|url\(|@import", page)
    assert page.count("<svg") == 2
    assert all(f">{name}</text>" in page for name in SLOWER)
    assert render(tmp_path, sample()) == page


def test_what_is_refused_stands_first_and_has_no_number(tmp_path: Path) -> None:
    page = render(tmp_path, sample())
    assert "1 timing is refused" in page
    assert "wrong is &lt;red&gt;" in page
    assert "wrong is <red>" not in page
    (cell,) = re.findall(r'<tr><th scope="row">wrong</th>\s*(<td.*?)</tr>', page, re.DOTALL)
    assert re.sub("<[^>]*>", "", cell).strip() == "red"


def test_an_unfinished_run_is_called_incomplete(tmp_path: Path) -> None:
    assert ">incomplete<" not in render(tmp_path, sample())
    assert ">incomplete<" in render(tmp_path, sample()[:-1])


def test_bytes_and_operations_are_shown_for_kda_only(tmp_path: Path) -> None:
    page = render(tmp_path, [timing_row("quick"), timing_row("fla-dplr"), finish_row()])
    assert page.count(" %</td>") == 2
    assert "DPLR, not judged" in page


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    path, out = write(tmp_path, sample()), tmp_path / "new" / "bench.html"
    result = CliRunner().invoke(app, ["bench", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text(encoding="utf-8") == render(tmp_path, sample())

"""Two runs side by side, the map of heads and channels, and errors by size, dtype and share: nothing grave is lost on the way."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kda_reports.envelopes import power_of_two, quantile_panels, size_panels
from kda_reports.errors import Standing, by_dtype, summarise
from kda_reports.fields import RowError
from kda_reports.heatmaps import heat_maps
from kda_reports.page import render_errors
from kda_reports.pairs import NUM_DIFFERENCES, pair
from kda_reports.rows import read_rows
from synthetic_rows import closed, lines, measure_row, verdict_row

if TYPE_CHECKING:
    from collections.abc import Callable

    Row = dict[str, Any]
    StandingsOf = Callable[..., list[Standing]]


@pytest.fixture
def standings_of(tmp_path: Path) -> StandingsOf:
    """Return a function from the rows of runs by name to standings."""

    def standings_of(**runs: list[Row]) -> list[Standing]:
        path = tmp_path / "rows.jsonl"
        rows = [row for name, inner in runs.items() for row in closed(name, [verdict_row(name, "any"), *inner])]
        path.write_text(lines(rows), encoding="utf-8")
        return list(summarise(read_rows([path])).standings)

    return standings_of


def summarised(scores: list[float]) -> list[Standing]:
    rows = closed("a", [verdict_row("a", "one"), *(measure_row("a", "one", "o", score) for score in scores)])
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write(lines(rows))
        file.flush()
        return list(summarise(read_rows([Path(file.name)])).standings)


def sized(score: float, **shape: int) -> Row:
    return measure_row("a", "one", "o", score, shape={"T": 1, "K": 1} | shape)


def test_calls_that_both_measured_are_paired_and_the_largest_difference_comes_first(standings_of: StandingsOf) -> None:
    one = [
        measure_row("a", "one", tensor, score) for tensor, score in {"o": 0.2, "dq": 0.3, "dk": 0.4, "dv": 0.5}.items()
    ]
    two = [
        measure_row("b", "one", tensor, score) for tensor, score in {"o": 0.2, "dq": 0.6, "dk": 0.05, "dg": 0.5}.items()
    ]
    found = pair(standings_of(a=one, b=two))
    assert found is not None
    assert (found.num_common, found.num_only) == (3, (1, 1))
    assert [(one.one.tensor, one.ratio) for one in found.differences] == [("dk", pytest.approx(0.125)), ("dq", 2.0)]


def test_what_is_not_finite_differs_most(standings_of: StandingsOf) -> None:
    one = [measure_row("a", "one", "o", 0.2), measure_row("a", "one", "dq", 0.2)]
    two = [measure_row("b", "one", "o", 30.0), measure_row("b", "one", "dq", math.nan)]
    found = pair(standings_of(a=one, b=two))
    assert found is not None
    assert [one.one.tensor for one in found.differences] == ["dq", "o"]


def test_scores_far_below_the_bound_do_not_differ(standings_of: StandingsOf) -> None:
    found = pair(standings_of(a=[measure_row("a", "one", "o", 1e-9)], b=[measure_row("b", "one", "o", 1e-3)]))
    assert found is not None
    assert found.differences == []


def test_laws_with_another_outcome_are_named(standings_of: StandingsOf) -> None:
    one = [
        verdict_row("a", "same"),
        verdict_row("a", "lost"),
        verdict_row("a", "lost", "unclaimed"),
        verdict_row("a", "gone"),
    ]
    two = [verdict_row("b", "same"), verdict_row("b", "lost"), verdict_row("b", "lost", "fail")]
    found = pair(standings_of(a=one, b=two))
    assert found is not None
    assert found.laws == {"lost": ("pass", "fail")}
    assert found.drawing is None


def test_one_or_three_are_no_pair(standings_of: StandingsOf) -> None:
    assert pair(standings_of(a=[])) is None
    assert pair(standings_of(a=[], b=[], c=[])) is None


def test_the_page_shows_two_runs_side_by_side(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        rows = [measure_row(name, "one", "o", 0.1 + i / 20, case=f"T={i}") for i in range(3)]
        rows += [
            measure_row("b", "two", "o", 0.9 if name == "a" else 0.02, case=f"T={i}", run=f"run-{name}")
            for i in range(30)
        ]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text(lines(closed(name, [verdict_row(name, "one"), *rows])), encoding="utf-8")
    page = render_errors(read_rows(paths), ["a.jsonl", "b.jsonl"])
    section = page[page.index('id="pair"') : page.index('id="distribution"')]
    assert "33 tensors of calls that both measured" in section
    assert section.count("<svg") == 1
    assert section.count('<td class="number">0.90</td><td class="number">0.02</td>') == NUM_DIFFERENCES
    (caption,) = re.findall(r"<figcaption>(.*?)</figcaption>", section, re.DOTALL)
    for part in ("a.jsonl, b.jsonl", "commit 0123456789", "n = 33", "standard deviations", "claimed arithmetic"):
        assert part in caption


def test_the_map_is_of_the_worst_tensor_that_has_one(standings_of: StandingsOf) -> None:
    rows = [
        measure_row("a", "one", "o", 0.2),
        measure_row("a", "one", "dq", 0.7),
        measure_row("a", "one", "dA_log", 0.9, by_channel=None),
    ]
    (found,) = heat_maps(standings_of(a=rows, b=[measure_row("b", "one", "dA_log", 0.9, by_channel=None)]))
    assert (found.standing.name, found.measure.tensor) == ("a", "dq")
    # A cell of its own for each head and bin of channels.
    assert found.drawing.count("<path") >= 12
    assert "url(" not in found.drawing


def test_a_map_of_what_is_not_finite_is_drawn(standings_of: StandingsOf) -> None:
    cells = {"head_step": 1, "channel_step": 1, "ratios": [[math.inf, math.nan, 0.0]]}
    (found,) = heat_maps(standings_of(a=[measure_row("a", "one", "o", math.inf, by_channel=cells)]))
    assert "NaN" not in found.drawing


def test_a_map_that_is_not_square_is_an_error(standings_of: StandingsOf) -> None:
    cells = {"head_step": 1, "channel_step": 1, "ratios": [[1.0, 2.0], [1.0]]}
    with pytest.raises(RowError, match="ratios must hold lists of one length"):
        standings_of(a=[measure_row("a", "one", "o", 0.1, by_channel=cells)])


@given(st.integers(1, 2**20))
def test_a_size_is_in_the_bin_of_the_power_of_two_below_it(size: int) -> None:
    assert power_of_two(size) <= size < 2 * power_of_two(size)
    assert math.log2(power_of_two(size)).is_integer()


def test_a_call_of_no_tokens_has_a_place_on_the_axis(standings_of: StandingsOf) -> None:
    (panel,) = size_panels(standings_of(a=[sized(0.2, T=0), sized(0.1, T=1)]), "T")
    assert panel.series[0].points == [(1, 0.2)]


def test_the_largest_score_of_a_size_is_kept(standings_of: StandingsOf) -> None:
    standings = standings_of(a=[sized(0.1, T=64), sized(0.7, T=100), sized(0.3, T=128), sized(math.nan, T=1000)])
    (panel,) = size_panels(standings, "T")
    assert panel.series[0].points == [(64, 0.7), (128, 0.3), (512, math.inf)]
    assert panel.series[0].num_measures == 4
    (panel,) = size_panels(standings, "K")
    assert panel.series[0].points == [(1, math.inf)]


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200))
def test_a_distribution_ends_in_the_largest_score_and_never_falls(scores: list[float]) -> None:
    (panel,) = quantile_panels(summarised(scores))
    points = panel.series[0].points
    assert points[-1] == (1.0, max(scores))
    assert [y for _, y in points] == sorted(y for _, y in points)
    for share, score in points:
        assert sum(one <= score for one in scores) >= share * len(scores) - 1e-9
    assert len(points) <= 40


def test_every_output_and_gradient_has_a_distribution(standings_of: StandingsOf) -> None:
    tensors = ("final_state", "dA_log", "o", "dq")
    panels = quantile_panels(standings_of(a=[measure_row("a", "one", tensor, 0.1) for tensor in tensors]))
    assert [panel.tensor for panel in panels] == ["o", "dq", "final_state", "dA_log"]


def test_scores_are_told_by_dtype_and_tensor(standings_of: StandingsOf) -> None:
    rows = [
        measure_row("a", "one", "o", 0.2),
        measure_row("a", "one", "o", math.nan),
        measure_row("a", "one", "dq", 0.1, dtype="float32", precision="fp32"),
    ]
    first, second = by_dtype(standings_of(a=rows))
    assert (first.dtype, first.precision, first.largest["o"][1]) == ("bfloat16", "bf16", 2)
    assert math.isnan(first.largest["o"][0] or 0.0)
    assert (second.dtype, second.largest) == ("float32", {"dq": (0.1, 1)})


def test_a_declared_failure_says_why(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        lines(closed("a", [verdict_row("a", "one", "xfail", reason="slow <path> (issue 3)")])), encoding="utf-8"
    )
    page = render_errors(read_rows([path]), ["rows.jsonl"])
    assert "Declared: slow &lt;path&gt; (issue 3)" in page

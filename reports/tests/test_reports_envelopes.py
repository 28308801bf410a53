"""Envelopes are maxima over calls: no peak is lost, wherever bins fall."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kda_reports.envelopes import SMALLEST_DECAY, Panel, Series, decay_bin, decay_panels, token_panels
from kda_reports.errors import summarise
from kda_reports.rows import read_rows
from synthetic_rows import closed, lines, measure_row, verdict_row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kda_reports.errors import Standing

    StandingsOf = Callable[..., list[Standing]]


@pytest.fixture
def standings_of(tmp_path: Path) -> StandingsOf:
    """Return a function from profiles of the tensor o to standings."""

    def standings_of(*profiles: list[list[float]], tensor: str = "o") -> list[Standing]:
        measures = [measure_row("a", "one", tensor, 0.1, by_token=profile, by_decay=profile) for profile in profiles]
        path = tmp_path / "rows.jsonl"
        path.write_text(lines(closed("a", [verdict_row("a", "one"), *measures])), encoding="utf-8")
        return list(summarise(read_rows([path])).standings)

    return standings_of


def points(panels: list[Panel]) -> list[tuple[float, float]]:
    (panel,) = panels
    (series,) = panel.series
    return list(series.points)


def test_an_envelope_is_the_maximum_over_calls(standings_of: StandingsOf) -> None:
    panels = token_panels(standings_of([[0, 0.1], [1, 0.9]], [[0, 0.3], [1, 0.2]]))
    assert points(panels) == [(0, 0.3), (1, 0.9)]
    assert panels[0].series[0].num_measures == 2


def test_a_peak_of_one_token_survives_binning(standings_of: StandingsOf) -> None:
    long = [[float(token), 5.0 if token == 1234 else 0.1] for token in range(4096)]
    found = points(token_panels(standings_of(long)))
    assert len(found) <= 48
    assert [place for place, ratio in found if ratio == 5.0] == [1234 // 86 * 86]


def test_an_error_that_is_not_a_number_is_infinite_in_an_envelope(standings_of: StandingsOf) -> None:
    assert points(token_panels(standings_of([[0, 0.1], [1, math.nan]]))) == [(0, 0.1), (1, math.inf)]


def test_tensors_without_a_profile_have_no_panel(standings_of: StandingsOf) -> None:
    assert token_panels(standings_of([])) == []
    assert decay_panels(standings_of([[0, 0.1]], tensor="final_state")) == []


@given(st.floats(0, 1e6))
def test_a_decay_lies_in_its_bin(nats: float) -> None:
    low = decay_bin(nats)
    assert low == SMALLEST_DECAY or low <= nats * (1 + 1e-8)
    assert nats <= max(SMALLEST_DECAY, low * 10**0.25 * (1 + 1e-8))
    assert decay_bin(low) == pytest.approx(low)


@pytest.mark.parametrize("quarter", range(-11, 24))
def test_an_edge_belongs_to_the_bin_it_opens(quarter: int) -> None:
    edge = 10.0 ** (quarter / 4)
    assert decay_bin(edge) == edge


def test_a_table_has_a_row_for_every_position_of_any_series() -> None:
    one = Series(name="a", points=[(0, 0.1), (2, 0.3)], num_measures=1)
    two = Series(name="b", points=[(1, 0.2), (2, 0.4)], num_measures=1)
    assert Panel(tensor="o", series=[one, two]).rows() == [(0, [0.1, None]), (1, [None, 0.2]), (2, [0.3, 0.4])]

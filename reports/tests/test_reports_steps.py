"""Steps: planted ones are found, noise and drift are not taken for steps, and the document says how often."""

from __future__ import annotations

import math
import re

import pytest
import step_study
from kda_reports.metrics import METRICS
from kda_reports.steps import LEAST_COMMITS, course, is_relevant, verdict
from synthetic_history import NUM_COMMITS, bimodal, noisy

TIME, REGISTERS = METRICS["time"], METRICS["registers"]


def test_the_document_has_the_figures_of_the_study() -> None:
    found = step_study.study()
    assert step_study.table(found) in step_study.DOCUMENT.read_text(encoding="utf-8"), (
        "run `python reports/tests/step_study.py`"
    )
    tallies = {one.what: one for one in found}
    # What the figures must at least be, whatever they are.
    for what, one in tallies.items():
        if re.match(r"step of (5|10)%, (80|10) ", what):
            assert one.found == step_study.NUM_SERIES
    assert tallies["nothing but noise"].wrong <= 0.02 * step_study.NUM_SERIES
    assert tallies["two speeds 5% apart, at random"].wrong <= 0.05 * step_study.NUM_SERIES
    assert tallies["drift of 10% over the history"].drifting == step_study.NUM_SERIES


def test_a_step_has_its_place_and_its_levels() -> None:
    (step,) = course(noisy(0, step=0.10), TIME).steps
    assert step.position == 120
    assert step.before == pytest.approx(1e-3, rel=0.005)
    assert step.after == pytest.approx(1.1e-3, rel=0.005)
    assert step.relevant
    assert step.confirmed


def test_a_small_step_is_significant_and_not_relevant() -> None:
    (step,) = course(noisy(1, step=0.02, noise=0.005), TIME).steps
    assert not step.relevant


def test_two_steps_are_two() -> None:
    values = [value * (1.1 if 60 <= i < 140 else 1.0) for i, value in enumerate(noisy(3))]
    assert [step.position for step in course(values, TIME).steps] == [60, 140]


@pytest.mark.parametrize("num_new", range(1, LEAST_COMMITS))
def test_the_newest_commits_can_only_be_suspected(num_new: int) -> None:
    (step,) = course(noisy(0, step=0.10, at=NUM_COMMITS - num_new), TIME).steps
    assert step.position == NUM_COMMITS - num_new
    assert not step.confirmed


def test_one_far_value_is_no_step() -> None:
    values = noisy(0)
    values[100] *= 2
    assert course(values, TIME).steps == []


def test_a_drift_is_said_to_be_one_and_how_large() -> None:
    found = course(noisy(0, drift=0.10), TIME)
    assert found.steps == []
    assert found.drift == pytest.approx(1e-4, rel=0.1)


def test_two_speeds_at_random_are_noise() -> None:
    found = course(bimodal(0), TIME)
    assert (found.steps, found.drift) == ([], None)


def test_a_series_without_noise_steps_wherever_it_changes() -> None:
    found = course([128.0] * 3 + [168.0] + [128.0] * 2, REGISTERS)
    assert [(step.position, step.relevant, step.confirmed) for step in found.steps] == [
        (3, True, True),
        (4, True, True),
    ]
    assert course([128.0] * 9, REGISTERS).steps == []


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_a_level_of_its_own(bad: float) -> None:
    (step,) = course([*noisy(0)[:20], bad], TIME).steps[-1:]
    assert step.position == 20
    assert step.relevant
    assert verdict(step.before, step.after, TIME) == "worse"


def test_a_short_series_has_no_steps_but_may_be_suspected_of_one() -> None:
    assert course([1e-3], TIME).steps == []
    assert course(noisy(0)[:9], TIME).steps == []
    (step,) = course([*noisy(0)[:8], 2e-3], TIME).steps
    assert not step.confirmed


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (1e-3, 1.03e-3, True),
        (1e-3, 1.02e-3, False),
        (1e-6, 1.5e-6, False),  # large for its size, and too small to matter
        (1e-3, 1e-3, False),
        (0.0, 1e-3, True),
        (math.inf, math.inf, False),
        (math.nan, math.nan, False),
        (1.0, math.nan, True),
    ],
)
def test_relevance_asks_for_both_sizes(before: float, after: float, expected: bool) -> None:  # noqa: FBT001 - a parameter
    assert is_relevant(before, after, TIME) is expected


@pytest.mark.parametrize(
    ("metric", "before", "after", "word"),
    [
        ("time", 1.0, 2.0, "worse"),
        ("time", 2.0, 1.0, "better"),
        ("conformance", 1.0, 0.0, "worse"),
        ("conformance", 0.0, 1.0, "better"),
        ("matrix-instructions", 2.0, 1.0, "changed"),
        ("error-over-bound", math.inf, math.nan, "worse"),
        ("error-over-bound", math.nan, 0.1, "better"),
    ],
)
def test_which_way_is_better_is_the_metrics_to_say(metric: str, before: float, after: float, word: str) -> None:
    assert verdict(before, after, METRICS[metric]) == word


def test_the_document_has_the_metrics_and_their_thresholds() -> None:
    rows = [
        f"| `{name}` | {one.unit} | {one.better} | {one.relative:.0%} | {one.absolute:g} |"
        for name, one in METRICS.items()
    ]
    assert "\n".join(rows) + "\n" in step_study.DOCUMENT.read_text(encoding="utf-8")

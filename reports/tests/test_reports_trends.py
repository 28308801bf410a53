"""Series over commits, and two commits side by side: nothing across machines, nothing of what is not judged right."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from kda_reports.comparison import Change, compare, overall
from kda_reports.fields import RowError
from kda_reports.markdown import MOST_LINES, comparison_markdown, escaped
from kda_reports.quantities import percent, quantity
from kda_reports.trends import Series, trends
from synthetic_history import GPU, commit, green, measured, noisy, timed

if TYPE_CHECKING:
    from kda_reports.measurement import Measurement

EXACT = {"metric": "registers", "unit": "registers", "source": "compile", "samples": None, "spread": None}


def series_of(rows: list[Measurement], metric: str = "time") -> list[Series]:
    return [series for series in trends(rows).series if series.like.metric == metric]


def changes_of(rows: list[Measurement], base: int, new: int, metric: str = "time") -> list[Change]:
    found = compare(trends(rows), rows, commit(base), commit(new))
    return [change for change in found if change.series.like.metric == metric]


def repeated(i: int, value: float, **changes: Any) -> Measurement:
    """Return a timing of ten samples."""
    return measured(i, value, n=10, samples=tuple(value * (1 + k / 1000) for k in range(-5, 5)), **changes)


def test_a_point_is_a_commit_and_the_median_of_its_runs() -> None:
    rows = [green(0), *(measured(0, value, run=f"run-{value}") for value in (1.0, 2.0, 9.0))]
    (series,) = series_of(rows)
    (point,) = series.points
    assert (point.value, point.num_runs, point.n) == (2.0, 3, 9)
    assert point.versions == {"torch": "2.13.0", "triton": "3.7.1", "suite": "0.1.0", "steady": "1.2.3"}


def test_commits_are_in_their_own_order_whenever_they_were_measured() -> None:
    rows = timed([1.0, 2.0, 3.0])
    late = [green(1, time="2027-01-01T00:00:00+00:00"), measured(1, 2.0, time="2027-01-01T00:00:00+00:00")]
    rows = [row for row in rows if row.commit != commit(1)] + late
    (series,) = series_of(rows)
    assert [point.value for point in series.points] == [1.0, 2.0, 3.0]


def test_a_checkout_with_changes_is_no_commit() -> None:
    rows = [*timed([1.0, 2.0]), measured(1, 9.0, dirty=True), green(2, dirty=True), measured(2, 9.0)]
    found = trends(rows)
    assert [point.value for point in series_of(rows)[0].points] == [1.0, 2.0]
    assert found.num_dirty == 2
    assert list(found.withheld.values()) == [1]


@pytest.mark.parametrize(
    "judged",
    [
        [],
        [green(1, 0.0)],
        [green(1), green(1, 0.0, run="another seed", seed=1)],
        [green(1, implementation="other")],
        [green(1, device="cpu")],
        [green(1, machine={**GPU, "gpu": "Another"})],
    ],
    ids=["never", "red", "red-once", "other-implementation", "other-device", "other-gpu"],
)
def test_throughput_is_shown_only_where_the_commit_is_green(judged: list[Measurement]) -> None:
    rows = [green(0), measured(0, 1.0), *judged, measured(1, 2.0), measured(1, 5e7, metric="peak-memory", unit="bytes")]
    found = trends(rows)
    assert [point.commit for series in found.series if series.like.source == "bench" for point in series.points] == [
        commit(0)
    ]
    assert sum(found.withheld.values()) == 2


def test_another_driver_is_another_machine_and_no_reason_to_withhold() -> None:
    rows = [*timed([1.0, 1.0]), green(2), measured(2, 9.0, machine={**GPU, "driver": "9"})]
    one, two = series_of(rows)
    assert {len(one.points), len(two.points)} == {1, 2}
    assert one.identifier != two.identifier


def test_a_series_is_named_the_same_whatever_else_is_there() -> None:
    (series,) = series_of(timed([1.0]))
    others = series_of([*timed([1.0, 2.0]), *timed([3.0], implementation="other")])
    assert series.identifier in {one.identifier for one in others}


def test_an_unknown_metric_or_unit_is_an_error() -> None:
    for changes in ({"metric": "speed"}, {"unit": "ms"}):
        with pytest.raises(RowError, match="metric must be one of"):
            trends([green(0), measured(0, 1.0, **changes)])


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(RowError, match="must hold something to show"):
        trends([measured(0, 1.0)])


def test_a_change_beyond_the_noise_of_the_series_is_worse() -> None:
    rows = timed([*noisy(0)[:30], 1.2e-3, 1.001e-3])
    (change,) = changes_of(rows, 29, 30)
    assert (change.word, change.significant, change.relevant) == ("worse", True, True)
    assert "noise of 31 commits" in change.why
    (change,) = changes_of(rows, 29, 31)
    assert change.word == "unchanged"
    assert not change.significant


def test_without_a_history_samples_decide_where_there_are_enough() -> None:
    rows = [green(0), green(1), repeated(0, 1e-3), repeated(1, 1.1e-3)]
    (change,) = changes_of(rows, 0, 1)
    assert change.word == "worse"
    assert "Mann-Whitney over 10 and 10 samples" in change.why
    (change,) = changes_of(timed([1e-3, 1.1e-3]), 0, 1)
    assert change.word == "not comparable"
    assert change.why == "too few: 1 commits, 3 and 3 samples"


def test_a_repeatable_number_differs_or_does_not() -> None:
    rows = [measured(i, value, **EXACT) for i, value in enumerate([128.0, 128.0, 168.0, 126.0])]
    words = [changes_of(rows, 0, i, "registers")[0].word for i in range(1, 4)]
    assert words == ["unchanged", "worse", "unchanged"]


def test_nan_after_nan_is_unchanged_and_after_a_number_worse() -> None:
    kind = EXACT | {"metric": "error-over-bound", "unit": "bound"}
    rows = [measured(i, value, **kind) for i, value in enumerate([math.nan, math.nan, 0.5, math.nan])]
    assert changes_of(rows, 0, 1, "error-over-bound")[0].word == "unchanged"
    assert changes_of(rows, 2, 3, "error-over-bound")[0].word == "worse"


def test_machines_are_never_compared() -> None:
    rows = [green(0), repeated(0, 1e-3), green(1), repeated(1, 9e-3, machine={**GPU, "driver": "9"})]
    found = changes_of(rows, 0, 1)
    assert [change.word for change in found] == ["not comparable"] * 2
    assert {change.why for change in found} == {
        f"not measured (or not judged right) on this machine at {commit(i)[:10]}" for i in range(2)
    }


def test_the_beginning_of_several_commits_is_refused() -> None:
    rows = timed([1.0, 2.0])
    with pytest.raises(RowError, match="new must begin one commit of the history, got '', which begins 2"):
        compare(trends(rows), rows, commit(0), "")


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ((), "not comparable"),
        (("not comparable",), "not comparable"),
        (("unchanged", "not comparable"), "unchanged"),
        (("unchanged", "better"), "better"),
        (("worse", "changed"), "worse"),
        (("worse", "better", "unchanged"), "mixed"),
    ],
)
def test_one_word_for_many(words: tuple[str, ...], word: str) -> None:
    assert overall(words) == word


def test_the_summary_names_what_is_worse_first_and_what_cannot_be_compared() -> None:
    rows = [
        measured(i, value, call=call, **EXACT)
        for call, pair in {"up": (8, 80), "down": (80, 8), "same": (8, 8)}.items()
        for i, value in enumerate(map(float, pair))
    ]
    rows.append(measured(1, 1.0, call="new", **EXACT))
    text = comparison_markdown(compare(trends(rows), rows, commit(0), commit(1)), commit(0), commit(1))
    assert text.startswith(f"### Mixed: {commit(1)[:10]} against {commit(0)[:10]}\n")
    assert "1 worse, 1 better, 0 changed, 1 unchanged, 1 not comparable of 4 series." in text
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in table] == ["| worse", "| better"]
    assert "| 8 registers | 80 registers | +900.0 % |" in table[0]
    assert f"not measured (or not judged right) on this machine at {commit(0)[:10]}" in text


def test_a_long_summary_says_what_it_leaves_out() -> None:
    rows = [measured(i, 8.0 + 80 * i, call=f"call-{k}", **EXACT) for k in range(MOST_LINES + 3) for i in range(2)]
    text = comparison_markdown(compare(trends(rows), rows, commit(0), commit(1)), commit(0), commit(1))
    assert text.count("| worse |") == MOST_LINES
    assert "3 more are not in this table." in text


def test_names_cannot_inject_markup_into_a_comment() -> None:
    hostile = "a|b <script> [x](http://y) *z* `c`\n# d @all _e_ #1"
    rows = [measured(i, 8.0 + 80 * i, call=hostile, implementation=hostile, **EXACT) for i in range(2)]
    text = comparison_markdown(compare(trends(rows), rows, commit(0), commit(1)), commit(0), commit(1))
    (line,) = [line for line in text.splitlines() if line.startswith("| worse")]
    assert escaped(hostile) in line
    for raw in ("<script>", "@all", "#1", " [x]", " *z*", " `c`", "a|b"):
        assert raw not in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.5e-3, "s", "1.5 ms"), (2e-7, "s", "200 ns"), (0.0, "s", "0 ns"), (12.0, "s", "12 s"),
        (2**20 * 1.5, "bytes", "1.5 MiB"), (12.0, "bytes", "12 bytes"), (0.43219, "bound", "0.4322"),
        (168.0, "registers", "168 registers"), (math.inf, "s", "inf"),
    ],
)  # fmt: skip
def test_a_quantity_has_its_unit(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (1.0, 1.105, "+10.5 %"),
        (2.0, 1.0, "-50.0 %"),
        (0.0, 1.0, "from zero"),
        (0.0, 0.0, "unchanged"),
        (1.0, math.inf, "not finite"),
    ],
)
def test_a_change_is_relative_to_the_old_value(before: float, after: float, text: str) -> None:
    assert percent(before, after) == text

"""The dashboard: is anything worse than a week ago, what, since which commit; pages that load nothing and believe no name."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from kda_reports import dashboard
from kda_reports.command import app
from kda_reports.dashboard import render_dashboard
from kda_reports.findings import Finding, Findings, findings
from kda_reports.glossary import TREND_GLOSSARY
from kda_reports.metrics import METRICS
from kda_reports.store import Store
from kda_reports.trends import trends
from synthetic_history import commit, green, measured, noisy, timed
from test_reports_page import Outline
from test_reports_trends import EXACT
from typer.testing import CliRunner

if TYPE_CHECKING:
    from pathlib import Path

    from kda_reports.measurement import Measurement

# Commits are six hours apart, so a week is 28 of them.
WEEK = 28


def found_in(rows: list[Measurement], days: int = 7) -> Findings:
    return findings(trends(rows), days)


def of(rows: list[Measurement], metric: str = "time") -> Finding:
    (finding,) = [finding for finding in found_in(rows).each if finding.series.like.metric == metric]
    return finding


def rendered(rows: list[Measurement]) -> dict[str, str]:
    return render_dashboard(trends(rows), 7, 0)


def exact(values: list[float], **changes: Any) -> list[Measurement]:
    return [measured(i, value, **EXACT | changes) for i, value in enumerate(values)]


def test_a_step_within_the_week_is_worse_and_names_its_commits() -> None:
    finding = of(timed(noisy(0, step=0.10, at=190)))
    assert finding.word == "worse"
    assert finding.first is not None
    assert finding.last is not None
    assert (finding.last.commit, finding.first.commit) == (commit(189), commit(190))
    assert (finding.why, finding.versions) == ("", [])


def test_a_step_before_the_week_is_no_news() -> None:
    assert of(timed(noisy(0, step=0.10, at=120))).word == "unchanged"


def test_what_is_faster_is_better() -> None:
    assert of(timed(noisy(0, step=-0.10, at=190))).word == "better"


def test_a_step_of_the_newest_commits_is_said_to_be_unconfirmed() -> None:
    finding = of(timed(noisy(0, step=0.10, at=198)))
    assert finding.word == "worse"
    assert finding.why == "unconfirmed: only 2 commits since"


def test_what_came_back_is_unchanged() -> None:
    finding = of(exact([128.0] * 190 + [168.0] * 3 + [128.0] * 7), "registers")
    assert (finding.word, finding.why) == ("unchanged", "it changed and came back")


def test_of_several_steps_the_largest_in_the_direction_of_the_change_is_named() -> None:
    finding = of(exact([128.0] * 180 + [136.0] * 5 + [200.0] * 5 + [192.0] * 10), "registers")
    assert (finding.before, finding.after, finding.word) == (128.0, 192.0, "worse")
    assert finding.first is not None
    assert finding.first.commit == commit(185)


def test_a_drift_is_judged_by_the_week_and_names_no_commit() -> None:
    slow, fast = of(timed(noisy(0, drift=0.10))), of(timed(noisy(0, drift=0.60)))
    assert (slow.word, fast.word) == ("unchanged", "worse")
    assert fast.first is None
    assert "drifts" in fast.why


def test_what_was_not_measured_then_or_since_cannot_be_compared() -> None:
    rows = [*timed(noisy(0)), *exact([1.0] * 100, call="gone"), measured(199, 1.0, **EXACT, call="new")]
    why = {finding.series.like.call: finding.why for finding in found_in(rows).each if finding.word == "not comparable"}
    assert why == {"gone": "not measured since 2026-01-25", "new": "first measured 2026-02-19"}


def test_what_else_changed_at_a_step_is_said() -> None:
    rows = exact([128.0] * 190 + [168.0] * 10)
    rows = [
        row if i < 190 else measured(i, row.value, **EXACT, libraries={"triton": "3.9.0"}) for i, row in enumerate(rows)
    ]
    assert of(rows, "registers").versions == ["torch 2.13.0 to unknown", "triton 3.7.1 to 3.9.0"]


@pytest.mark.parametrize(
    ("series", "headline", "word"),
    [
        ([[1.0] * 60], "Nothing is worse than AGO, of 1 series.", "unchanged"),
        ([[1.0] * 50 + [9.0] * 10], "1 of 1 series is worse than AGO.", "worse"),
        (
            [[1.0] * 50 + [9.0] * 10] * 2 + [[9.0] * 50 + [1.0] * 10],
            "2 of 3 series are worse, 1 better than AGO.",
            "mixed",
        ),
        ([[1.0] * 5], "Nothing can be compared with AGO.", "not comparable"),
    ],
)
def test_the_headline_answers_the_question(series: list[list[float]], headline: str, word: str) -> None:
    rows = [row for i, values in enumerate(series) for row in exact(values, call=f"call-{i}")]
    found = found_in(rows)
    assert (found.headline, found.word) == (headline.replace("AGO", "7 days before the newest commit"), word)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """Render a history with every kind of series once."""
    rows = [
        *timed(noisy(0, step=0.10, at=190)),
        *timed(noisy(1), implementation="other"),
        *exact(
            [0.0] * 190 + [48.0] * 10, metric="spilled", unit="bytes", machine={"target": "sm_90", "triton": "3.7.1"}
        ),
        *exact([0.3] * 150 + [math.inf] + [0.3] * 49, metric="error-over-bound", unit="bound"),
        *[measured(i, 5e8, metric="peak-memory", unit="bytes", samples=None, spread=None) for i in range(200)],
        measured(3, 1.0, implementation="unjudged"),
        measured(3, 1.0, dirty=True),
    ]
    return rendered(rows)


def test_there_is_a_page_for_each_kind_and_downloads(files: dict[str, str]) -> None:
    assert set(files) == {
        "index.html", "speed.html", "memory.html", "accuracy.html", "compile.html", "history.csv", "history.json", "summary.md",
    }  # fmt: skip
    assert set(rendered(timed([1.0]))) == {
        "index.html", "speed.html", "accuracy.html", "history.csv", "history.json", "summary.md",
    }  # fmt: skip


def test_pages_are_well_formed_and_ask_for_nothing(files: dict[str, str]) -> None:
    for name, page in files.items():
        if name.endswith(".html"):
            outline = Outline(page)
            assert outline.open == []
            assert len(set(outline.having("id"))) == len(outline.having("id"))
            assert not {tag for tag, _ in outline.elements} & {"link", "img", "iframe", "object", "embed", "source"}
            assert outline.having("src") == []
            assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest", page)
            assert "default-src 'none'" in page


def test_every_link_leads_somewhere(files: dict[str, str]) -> None:
    anchors = {name: set(Outline(page).having("id")) for name, page in files.items() if name.endswith(".html")}
    for name in anchors:
        for target in Outline(files[name]).having("href"):
            page, _, anchor = target.partition("#")
            assert page in ("", *files), target
            assert not anchor or anchor in anchors[page or name], target


def test_the_first_words_answer_the_question(files: dict[str, str]) -> None:
    assert "<h1>2 of 7 series are worse than 7 days before the newest commit.</h1>" in files["index.html"]
    assert commit(190)[:10] in files["index.html"]


def test_what_is_not_shown_is_said(files: dict[str, str]) -> None:
    assert "1 rows were measured on checkouts with changes" in files["index.html"]
    assert "unjudged" in files["index.html"]
    assert "unjudged" not in files["speed.html"]


def test_every_figure_states_its_data_commits_and_number(files: dict[str, str]) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", files["speed.html"], re.DOTALL)
    assert len(captions) == 2
    for caption in captions:
        assert "n = 200 commits, 200 runs, 600 values" in caption
        assert commit(0)[:10] in caption
        assert commit(199)[:10] in caption
        assert "noise " in caption
        assert "data: rows of series" in caption


def test_downloads_hold_every_point(files: dict[str, str]) -> None:
    rows = list(csv.DictReader(io.StringIO(files["history.csv"])))
    found = json.loads(files["history.json"])
    assert len(rows) == sum(len(series["points"]) for series in found["series"]) == 7 * 200
    assert found["word"] == "worse"
    assert {row["value"] for row in rows if row["metric"] == "error-over-bound"} == {"0.3", "inf"}
    (spilled,) = [series for series in found["series"] if series["metric"] == "spilled"]
    assert (spilled["word"], spilled["since"], spilled["before"], spilled["after"]) == ("worse", commit(190), 0.0, 48.0)


def test_the_same_rows_give_the_same_files(files: dict[str, str]) -> None:
    rows = timed(noisy(0))
    assert rendered(rows) == rendered(rows[::-1])
    assert files.keys() > rendered(rows).keys()


def test_names_cannot_inject_markup() -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"
    changes = {
        "implementation": hostile,
        "version": hostile,
        "call": hostile,
        "pass_name": hostile,
        "dtype": hostile,
        "op": hostile,
    }
    machine = {"gpu": hostile, "cpu": hostile}
    libraries = [{hostile: "1"}, {hostile: "2"}]
    kind = EXACT | {"metric": "registers", "unit": "registers"}
    rows = [
        measured(
            i, 8.0 + 80 * (i > 40), **kind, **changes, shape={hostile: 1}, machine=machine, libraries=libraries[i > 40]
        )
        for i in range(60)
    ]
    rows += [green(0, implementation=hostile), measured(1, 1.0, implementation=hostile, call=hostile)]
    files = rendered(rows)
    for name, page in files.items():
        if name.endswith(".html"):
            outline = Outline(page)
            assert outline.open == []
            assert [tag for tag, _ in outline.elements].count("script") == 1
            assert not [attributes for _, attributes in outline.elements if "onerror" in attributes]
            assert "<img src=x onerror=alert(1)>" in "".join(outline.text)
    assert "<script>" not in files["summary.md"]


def test_a_page_without_room_says_what_it_leaves_out_and_draws_what_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "MOST_CHARTS", 1)
    rows = [*exact([8.0] * 60, call="a"), *exact([8.0] * 50 + [80.0] * 10, call="b"), *exact([8.0] * 60, call="c")]
    page = rendered(rows)["compile.html"]
    assert "2 series are not drawn" in page
    assert page.count("<svg") == 1
    assert page.index("<svg") > page.index('data-word="worse"')
    assert page.index("<svg") < page.index('data-word="unchanged"')


def test_a_page_stays_under_five_megabytes_however_many_series_there_are() -> None:
    values = noisy(0, step=0.10, at=190)
    one, three = (
        len(rendered([row for k in range(number) for row in timed(values, implementation=f"name-{k}")])["speed.html"])
        for number in (1, 3)
    )
    assert one + dashboard.MOST_CHARTS * (three - one) / 2 < 5_000_000


def test_the_command_writes_the_pages_and_prints_the_summary(tmp_path: Path) -> None:
    Store(tmp_path / "history").add(timed(noisy(0, step=0.10, at=190)))
    path = tmp_path / "history" / "rows.jsonl"
    path.write_text(path.read_text() + "torn")
    result = CliRunner().invoke(
        app, ["dashboard", "--store", str(tmp_path / "history"), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("### Worse: 1 of 2 series is worse than 7 days before the newest commit.")
    assert (tmp_path / "out" / "summary.md").read_text() == result.stdout
    assert "rows.jsonl line 401" in result.stderr
    assert "1 lines of the store are no rows" in (tmp_path / "out" / "index.html").read_text()


def test_without_a_history_there_are_no_pages(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["dashboard", "--store", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_every_word_of_the_verdicts_and_every_metric_is_explained() -> None:
    words = " ".join(TREND_GLOSSARY)
    for word in ("significant", "relevant", "better", "worse", "mixed", "not comparable", "unconfirmed", "drift"):
        assert word in words
    assert all(metric.meaning.endswith(".") for metric in METRICS.values())

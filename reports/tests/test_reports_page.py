"""The page: one file, the same bytes for the same rows, nothing green that was not earned, nothing foreign executed."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from kda_reports import charts
from kda_reports.errors import Cell
from kda_reports.page import cell_class, explained, format_ratio, render_errors, soft_breaks
from kda_reports.rows import Verdict, read_rows
from synthetic_rows import (
    GOLDEN,
    closed,
    command,
    lines,
    measure_row,
    run_row,
    sample,
    verdict_row,
)

RENEW = "run `python reports/tests/synthetic_rows.py`, read the difference, and commit it if it is meant"


class Outline(HTMLParser):
    """The elements of a page, with their attributes and whether every element was closed."""

    VOID = ("meta", "br", "wbr", "link", "img", "hr", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def render(folder: Path, rows: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text(rows, encoding="utf-8")
    return render_errors(read_rows([path]), [path.name])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Render the page of the sample once."""
    return render(tmp_path_factory.mktemp("page"), lines(sample()))


def test_golden_rows_are_those_of_the_sample() -> None:
    assert (GOLDEN / "rows.jsonl").read_text(encoding="utf-8") == lines(sample()), RENEW


def test_golden_rows_give_the_golden_page(page: str) -> None:
    golden = (GOLDEN / "errors.html").read_text(encoding="utf-8")
    assert page == golden, RENEW


def test_the_page_is_well_formed(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    identifiers = outline.having("id")
    assert len(identifiers) == len(set(identifiers))


def test_every_link_leads_to_a_place_on_the_page(page: str) -> None:
    outline = Outline(page)
    places = {f"#{identifier}" for identifier in outline.having("id")}
    links = outline.having("href")
    assert len(links) > 8
    assert set(links) <= places


def test_the_page_asks_for_nothing_from_anywhere(page: str) -> None:
    outline = Outline(page)
    assert not {tag for tag, _ in outline.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "source",
        "video",
        "audio",
    }
    assert outline.having("src") == []
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest", page)
    assert "default-src 'none'" in page


def test_names_cannot_inject_markup(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
    rows = [
        run_row(
            hostile,
            version=hostile,
            device=hostile,
            effort=hostile,
            fingerprint={hostile: hostile},
            claims={hostile: {hostile: hostile}},
        ),
        measure_row(
            hostile,
            hostile,
            "o",
            3.0,
            regime=hostile,
            worst={"index": {hostile: 1}, "got": 1, "expected": 1, "bound": 1},
        ),
        verdict_row(
            hostile, hostile, "fail", test=hostile, case=hostile, message=hostile, dtype=hostile, precision=hostile
        ),
        verdict_row(hostile, hostile + "2", "xfail", message=hostile),
    ]
    outline = Outline(render(tmp_path, lines(rows)))
    assert outline.open == []
    assert [tag for tag, _ in outline.elements].count("script") == 1
    assert not [attributes for _, attributes in outline.elements if "onerror" in attributes]
    assert "<img src=x onerror=alert(1)>" in "".join(outline.text)


def test_the_first_words_say_who_fails(page: str) -> None:
    (headline,) = re.findall(r"<h1>(.*)</h1>", page)
    assert headline.startswith("wrong breaks at least one law")


def test_an_unfinished_run_is_never_shown_as_a_pass(tmp_path: Path) -> None:
    page = render(tmp_path, lines([run_row("torn"), verdict_row("torn", "one")]))
    badges = re.findall(r'class="badge (\w+)"', page)
    assert badges == ["incomplete"]


def test_states_are_told_by_words_not_only_by_colour(page: str) -> None:
    for word in ("pass", "fail", "error", "declared failure", "not claimed", "recorded only"):
        assert f'<span class="only-read">{word}' in page


def test_every_figure_states_its_data_commit_number_and_bound(page: str) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert len(captions) == 6
    for caption in captions:
        for part in (
            "rows.jsonl",
            "commit 0123456789",
            "n = ",
            "standard deviations",
            "claimed arithmetic",
            "Logarithmic",
        ):
            assert part in caption


def test_every_chart_has_a_table_beside_it(page: str) -> None:
    assert page.count("<svg") == page.count("as a table</summary>") > 0


def test_every_colour_of_a_chart_has_one_for_dark_pages() -> None:
    style = (Path(charts.__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
    light, _, rest = style.partition("prefers-color-scheme: dark")
    dark = rest.partition("@media print")[0]
    for i, colour in enumerate(charts.COLOURS):
        assert f"--series-{i}: {colour}" in light
        assert f"--series-{i}: #" in dark


def test_commands_are_whole_in_a_box_that_can_be_copied(page: str) -> None:
    reproduction = command("wrong", "forward-matches-reference").replace('"', "&#34;")
    assert f"<pre><code>{reproduction}</code></pre>" in page


def test_a_run_without_measurements_has_no_empty_figures(tmp_path: Path) -> None:
    page = render(tmp_path, lines(closed("a", [verdict_row("a", "one")])))
    assert "<figure>" not in page
    assert 'id="worst"' not in page
    assert 'id="broken"' not in page
    assert Outline(page).open == []


def test_an_installed_copy_without_a_commit_says_so(tmp_path: Path) -> None:
    rows = [run_row("a", fingerprint={"commit": None, "dirty": None}), verdict_row("a", "one")]
    assert "of an installed copy unknown" in render(tmp_path, lines(rows))


def test_a_dirty_checkout_says_so(tmp_path: Path) -> None:
    rows = [run_row("a", fingerprint={"commit": "abcdef0123456789", "dirty": True}), verdict_row("a", "one")]
    assert "commit abcdef0123 with changes" in render(tmp_path, lines(rows))


def test_a_large_run_stays_a_page_under_two_megabytes(tmp_path: Path) -> None:
    rows = []
    for name in [f"implementation-{i}" for i in range(8)]:
        tests = []
        for i in range(40):
            for j in range(30):
                tests.append(measure_row(name, f"law-{i}", ("o", "dq", "dk", "dv", "dg", "dbeta")[j % 6], 5.0 + j))
                tests.append(verdict_row(name, f"law-{i}", "fail", score=5.0 + j, message="x" * 5000))
        rows += closed(name, tests)
    page = render(tmp_path, lines(rows))
    assert len(page.encode()) < 2_000_000


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (None, ""),
        (0.0, "0.00"),
        (0.004, "<0.01"),
        (0.434, "0.43"),
        (9.99, "9.99"),
        (12.4, "12"),
        (5394.9, "5,395"),
        (3e7, "3e7"),
        (math.inf, "\N{INFINITY}"),
        (math.nan, "NaN"),
    ],
)
def test_a_ratio_is_written_with_the_digits_that_say_something(score: float | None, text: str) -> None:
    assert format_ratio(score) == text


@pytest.mark.parametrize(
    ("score", "style"),
    [
        (None, "pass"),
        (0.05, "pass shade-0"),
        (0.2, "pass shade-1"),
        (0.5, "pass shade-2"),
        (0.6, "pass shade-3"),
        (0.9, "pass shade-4"),
    ],
)
def test_a_pass_is_shaded_by_how_close_it_came(score: float | None, style: str) -> None:
    assert cell_class(Cell(outcome="pass", score=score, num_failed=0, num_judged=1, num_unclaimed=0)) == style


def test_a_failure_is_never_shaded_as_a_pass() -> None:
    assert cell_class(Cell(outcome="fail", score=0.2, num_failed=1, num_judged=1, num_unclaimed=0)) == "fail"


def test_an_explanation_leaves_out_the_command_beside_it_and_ends_somewhere() -> None:
    verdict = Verdict(
        law="one",
        test="",
        case="",
        dtype="",
        precision="",
        outcome="fail",
        score=None,
        message="why\n  do it again",
        reproduction="do it again",
    )
    assert explained(verdict) == "why"
    long = Verdict(
        law="one",
        test="",
        case="",
        dtype="",
        precision="",
        outcome="fail",
        score=None,
        message="x" * 9999,
        reproduction="",
    )
    assert explained(long).endswith("x [...]")
    assert len(explained(long)) < 1300


def test_names_may_break_after_hyphens_and_stay_escaped() -> None:
    assert soft_breaks("a-b_<c>") == "a-<wbr>b_<wbr>&lt;c&gt;"

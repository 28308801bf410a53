"""The pages in a real browser: charts are drawn, links and filters work, nothing is loaded, nothing foreign is run.

Skipped where there is no Chromium or Playwright; ``nox -s browser`` installs the latter.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from browser_pages import browser, chromium, write_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("playwright", reason="playwright is not installed; nox -s browser installs it")
if chromium() is None:
    pytest.skip("no chromium on this machine; Debian's package chromium is one", allow_module_level=True)

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
PAGES = (
    "dashboard/index.html", "dashboard/speed.html", "dashboard/memory.html", "dashboard/accuracy.html", "dashboard/compile.html",
    "report.html", "two.html", "mutants.html", "bench.html", "table.html", "training.html",
)  # fmt: skip
LEAST_CONTRAST = 4.5
# Contrast as WCAG 2 defines it, of every text against the nearest background that is painted behind it.
CONTRASTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = element => {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] > 250 ? colour : behind(element.parentElement);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const says = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!says || !element.checkVisibility() || element.closest(".only-read, script, style, option")) continue;
    const style = getComputedStyle(element), front = rgba(element.closest("svg") ? style.fill : style.color);
    const [low, high] = [luminance(front), luminance(behind(element))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.textContent.trim().slice(0, 40)]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render every page once."""
    folder = tmp_path_factory.mktemp("pages")
    assert {str(path.relative_to(folder)) for path in write_pages(folder)} == set(PAGES)
    return folder


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as started:
        yield started


@contextmanager
def opened(chrome: Any, path: Path, **context: Any) -> Iterator[Any]:
    """Open a page and, in the end, demand that it complained of nothing and asked for nothing but pages beside it."""
    with chrome.new_context(viewport={"width": 1280, "height": 900}, **context) as held:
        page = held.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        assert complaints == []
        assert {url.partition("#")[0].rpartition("/")[0] for url in requests} == {path.parent.as_uri()}
        assert all(url.partition("#")[0].endswith(".html") for url in requests)


@pytest.mark.parametrize("name", PAGES)
def test_every_chart_is_drawn_within_its_page(chrome: Any, folder: Path, name: str) -> None:
    with opened(chrome, folder / name) as page:
        charts = page.locator("svg").all()
        assert len(charts) > 0 or name in ("dashboard/index.html", "mutants.html", "table.html")
        for chart in charts:
            box = chart.bounding_box()
            assert box["width"] > 100
            assert box["height"] > 60
            assert chart.locator("path, text").count() > 5
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_window_needs_no_sideways_scrolling(chrome: Any, folder: Path, name: str) -> None:
    with opened(chrome, folder / name) as page:
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_can_be_read_in_light_and_dark(chrome: Any, folder: Path, name: str, scheme: str) -> None:
    with opened(chrome, folder / name, color_scheme=scheme) as page:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(252, 252, 250)" if scheme == "light" else "rgb(20, 22, 26)")
        found = page.evaluate(CONTRASTS)
        assert len(found) > 20
        assert [one for one in found if one[0] < LEAST_CONTRAST] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_within_a_page_lead_to_what_they_name(chrome: Any, folder: Path, name: str) -> None:
    with opened(chrome, folder / name) as page:
        anchors = page.eval_on_selector_all("a[href^='#']", "links => links.map(link => link.hash.slice(1))")
        lost = "names => names.filter(name => !document.getElementById(decodeURIComponent(name)))"
        assert page.evaluate(lost, anchors) == []


def test_a_finding_leads_to_its_chart(chrome: Any, folder: Path) -> None:
    with opened(chrome, folder / "dashboard/index.html") as page:
        page.locator("#worse a").first.click()
        target = page.locator("article:target")
        target.wait_for()  # the click leads to another page
        assert target.count() == 1
        assert target.get_attribute("data-word") == "worse"
        assert target.locator("svg").is_visible()
        page.locator("nav a", has_text="overview").click()
        assert page.url.endswith("index.html")


@pytest.mark.parametrize("name", ["dashboard/index.html", "dashboard/speed.html"])
def test_a_filter_shows_what_matches_and_can_be_linked_to(chrome: Any, folder: Path, name: str) -> None:
    with opened(chrome, folder / name) as page:
        items = page.locator("[data-name]")
        total = items.count()
        page.fill("input[name=q]", "softplus time")
        shown = [item for item in items.all() if item.is_visible()]
        assert 0 < len(shown) < total
        assert all("softplus" in item.get_attribute("data-name") for item in shown)
        page.select_option("select[name=word]", "worse")
        worse = [item for item in items.all() if item.is_visible()]
        assert 0 < len(worse) < len(shown)
        assert all(item.get_attribute("data-word") == "worse" for item in worse)
        assert page.locator("output").inner_text() == f"{len(worse)} of {total} shown"
        address = page.url
        page.goto("about:blank")
        page.goto(address)
        assert sum(item.is_visible() for item in page.locator("[data-name]").all()) == len(worse)
        page.fill("input[name=q]", "")
        page.select_option("select[name=word]", "")
        assert sum(item.is_visible() for item in page.locator("[data-name]").all()) == total


def test_an_address_of_a_series_is_no_filter(chrome: Any, folder: Path) -> None:
    with opened(chrome, folder / "dashboard/speed.html") as page:
        page.locator("article a").nth(2).click()
        assert all(item.is_visible() for item in page.locator("[data-name]").all())


@pytest.mark.parametrize("name", PAGES)
def test_everything_that_can_be_used_is_reached_by_the_keyboard(chrome: Any, folder: Path, name: str) -> None:
    with opened(chrome, folder / name) as page:
        usable = "a[href], button, input, select, summary, [tabindex='0']"
        # A scrolling region inside closed details cannot be seen, and is not stopped at.
        count = page.eval_on_selector_all(usable, "found => found.filter(one => one.checkVisibility()).length")
        reached = set()
        for _ in range(count + 2):
            page.keyboard.press("Tab")
            reached.add(page.evaluate(f"[...document.querySelectorAll(`{usable}`)].indexOf(document.activeElement)"))
            outlined = "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle !== 'none'"
            assert page.evaluate(outlined)
        assert len(reached - {-1}) == count


def test_a_table_opens_by_the_keyboard(chrome: Any, folder: Path) -> None:
    with opened(chrome, folder / "dashboard/speed.html") as page:
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        table = page.locator("details table").first
        assert table.is_visible()
        assert table.locator("tbody tr").count() == 60


def test_downloads_lie_beside_the_pages(chrome: Any, folder: Path) -> None:
    for path, name in (("dashboard/index.html", "history.csv"), ("training.html", "training.csv")):
        with chrome.new_context() as context:
            page = context.new_page()
            page.goto((folder / path).as_uri())
            with page.expect_download() as download:
                page.locator(f"nav a[href='{name}']").click()
            assert (folder / path).with_name(name).read_text() == download.value.path().read_text()
    # What a browser can show it shows, where a page was opened from a file.
    shown = (
        ("dashboard/index.html", "history.json"),
        ("dashboard/index.html", "summary.md"),
        ("training.html", "training.jsonl"),
    )
    for path, name in shown:
        with chrome.new_context() as context:
            page = context.new_page()
            page.goto((folder / path).as_uri())
            page.locator(f"nav a[href='{name}']").click()
            page.wait_for_url("**/" + name)
            assert page.locator("body").inner_text().strip() == (folder / path).with_name(name).read_text().strip()


def test_names_are_text_whatever_they_say(chrome: Any, tmp_path: Path) -> None:
    for path in write_pages(tmp_path, HOSTILE):
        with opened(chrome, path) as page:
            assert page.locator("img").count() == 0
            assert page.locator("script").count() <= 1
            assert HOSTILE in page.locator("body").inner_text(), path


def test_pages_say_all_without_scripts(chrome: Any, folder: Path) -> None:
    with opened(chrome, folder / "dashboard/index.html", java_script_enabled=False) as page:
        assert not page.locator("form").is_visible()
        assert all(item.is_visible() for item in page.locator("[data-name]").all())

"""Take the pictures that the documents show: ``python reports/tests/screenshots.py``, or ``nox -s browser -- --screenshots``.

The pages are those that the programs render, of made-up rows; the error report is of a real run where its rows are given.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser_pages import browser, write_pages
from kda_reports.page import render_errors
from kda_reports.rows import read_rows

IMAGES = Path(__file__).parents[2] / "docs" / "images"
# Picture: page, colour scheme, and what of the page; None is what a window of this size shows first.
PICTURES = {
    "dashboard.png": ("dashboard/index.html", "light", None),
    "dashboard-dark.png": ("dashboard/speed.html", "dark", None),
    "report.png": ("report.html", "light", None),
    "report-channels.png": ("report.html", "dark", "#by-channel"),
    "report-side-by-side.png": ("two.html", "light", "#pair"),
}
WINDOW = {"width": 1200, "height": 800}


def main(rows: list[str]) -> None:
    """Render the pages and take the pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, browser() as chrome:
        folder = Path(name)
        write_pages(folder)
        if rows:
            page = render_errors(read_rows(map(Path, rows)), [Path(row).name for row in rows])
            (folder / "report.html").write_text(page, encoding="utf-8")
        for picture, (path, scheme, part) in PICTURES.items():
            with chrome.new_context(viewport=WINDOW, color_scheme=scheme) as context:
                page = context.new_page()
                page.goto((folder / path).as_uri())
                shown = page if part is None else page.locator(part)
                shown.screenshot(path=IMAGES / picture)


if __name__ == "__main__":
    main(sys.argv[1:])

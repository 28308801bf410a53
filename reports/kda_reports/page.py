"""The error report: a summary and its charts as one HTML file that asks for nothing from anywhere.

Rendering is pure: the same rows give the same bytes. Every time and version on the page comes from the rows.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kda_reports import charts
from kda_reports.errors import by_dtype, summarise
from kda_reports.figures import figures
from kda_reports.glossary import GLOSSARY
from kda_reports.heatmaps import heat_maps
from kda_reports.kills import count_kills
from kda_reports.pairs import pair

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.errors import Cell
    from kda_reports.rows import Run, Verdict

INFINITE, NOT_A_NUMBER = "\N{INFINITY}", "NaN"
SHADES = (0.1, 0.25, 0.5, 0.75)
WORDS = {
    "pass": "pass",
    "fail": "fail",
    "error": "error",
    "xfail": "declared failure",
    "unclaimed": "not claimed",
    "may": "recorded only",
    "absent": "not run",
    "incomplete": "incomplete",
    "nothing": "nothing judged",
}
SIGNS = {
    "pass": "\N{CHECK MARK}",
    "fail": "\N{MULTIPLICATION X}",
    "error": "!",
    "xfail": "\N{BLACK FLAG}",
    "unclaimed": "\N{EN DASH}",
    "may": "\N{WHITE CIRCLE}",
    "absent": "",
    "incomplete": "\N{HORIZONTAL ELLIPSIS}",
    "nothing": "\N{EMPTY SET}",
}
LARGEST_WRITTEN_OUT = 1e5
SMALLEST_SHOWN = 0.005
LONGEST_MESSAGE = 1200


def render_errors(runs: Sequence[Run], sources: Sequence[str]) -> str:
    """Render the error report.

    Parameters
    ----------
    runs
        What was read from the rows.
    sources
        Names of the rows files, as the page gives its data source.

    Returns
    -------
    str
        A complete HTML document.
    """
    summary = summarise(runs)
    return (
        templates()
        .get_template("errors.html")
        .render(
            summary=summary,
            figures=figures(summary.standings),
            by_dtype=by_dtype(summary.standings),
            heat_maps=heat_maps(summary.standings),
            pair=pair(summary.standings),
            cell_class=cell_class,
            words=WORDS,
            signs=SIGNS,
            unbounded=(INFINITE, NOT_A_NUMBER),
            glossary=GLOSSARY,
            sources=sources,
            commits=sorted({commit_of(run.fingerprint) for run in runs}),
            efforts=sorted({run.effort for run in runs}),
            devices=sorted({run.device for run in runs}),
            fingerprint_rows=side_by_side([run.fingerprint for run in runs]),
            claim_rows=side_by_side([run.claims for run in runs]),
        )
    )


def render_mutants(runs: Sequence[Run], sources: Sequence[str]) -> str:
    """Render the matrix of planted bugs and laws.

    Parameters
    ----------
    runs
        What was read from the rows of ``kda mutants``.
    sources
        Names of the rows files.

    Returns
    -------
    str
        A complete HTML document.

    Raises
    ------
    RowError
        If a run says nothing of what is planted in it.
    """
    return (
        templates()
        .get_template("mutants.html")
        .render(
            kills=count_kills(runs),
            sources=sources,
            commits=sorted({commit_of(run.fingerprint) for run in runs}),
            efforts=sorted({run.effort for run in runs}),
            started=min(run.started for run in runs),
        )
    )


def templates() -> Environment:
    """Return the environment that all pages are rendered in."""
    environment = Environment(
        loader=PackageLoader("kda_reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "ratio": format_ratio,
        "significant": format_value,
        "explained": explained,
        "soft": soft_breaks,
    }
    environment.globals |= {
        "colours": charts.COLOURS,
        "chart_ink": {"ink": charts.INK, "grid": charts.GRID, "limit": charts.LIMIT},
    }
    return environment


def format_ratio(score: float | None) -> str:
    """Write an error as a fraction of its bound: two decimals near one, powers of ten far beyond."""
    if score is None:
        return ""
    if math.isnan(score):
        return NOT_A_NUMBER
    if math.isinf(score):
        return INFINITE
    if score >= LARGEST_WRITTEN_OUT:
        mantissa, _, exponent = f"{score:.0e}".partition("e+")
        return f"{mantissa}e{int(exponent)}"
    if 0 < score < SMALLEST_SHOWN:
        return "<0.01"
    return f"{score:.2f}" if score < 10 else f"{score:,.0f}"  # noqa: PLR2004 - where decimals cease to say anything


def format_value(value: float) -> str:
    """Write a number with six significant digits, so that got and expected can be told apart."""
    return f"{value:.6g}"


def explained(verdict: Verdict) -> str:
    """Return a verdict's message without the command that stands beside it, cut to what a card can hold."""
    message = verdict.message.replace(verdict.reproduction, "").rstrip() if verdict.reproduction else verdict.message
    return message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + " [...]"


def soft_breaks(name: str) -> Markup:
    """Allow a line break after each hyphen, underscore and slash of a name."""
    return Markup("<wbr>").join(re.split(r"(?<=[-_/])", name))


def cell_class(cell: Cell) -> str:
    """Return the style of a cell: its outcome, and for a pass how close to the bound it came."""
    score = cell.score
    if cell.outcome != "pass" or score is None:
        return cell.outcome
    return f"pass shade-{sum(score > limit for limit in SHADES)}"


def commit_of(fingerprint: Mapping[str, object]) -> str:
    """Return the commit of a fingerprint as a page names it."""
    commit = fingerprint.get("commit")
    if not commit:
        return "of an installed copy unknown"
    return f"{str(commit)[:10]}{' with changes' if fingerprint.get('dirty') else ''}"


def side_by_side(mappings: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str]]]:
    """Return one row per key of any mapping, in order of first appearance, with a value for each."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    return [(key.replace("_", " "), [_plain(mapping.get(key)) for mapping in mappings]) for key in keys]


def _plain(value: object) -> str:
    if value is None:
        return SIGNS["unclaimed"]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)

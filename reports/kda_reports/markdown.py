"""Summaries as Markdown, for a comment on a pull request: names cannot inject markup, and nothing is cut without saying so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kda_reports.comparison import overall
from kda_reports.findings import WORDS
from kda_reports.quantities import percent, quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.comparison import Change
    from kda_reports.findings import Finding, Findings

MOST_LINES = 40
RULE = (
    "A change counts when it stands out of the noise of its series (significant) and is as large as its metric asks for (relevant). "
    "Machines are never compared with each other."
)
SPECIAL = re.compile(r"([\\`*_\[\]|~])")
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "#": "&#35;"})


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split())).translate(ENTITIES)


def comparison_markdown(changes: Sequence[Change], base: str, new: str) -> str:
    """Return what changed between two commits: one word, the counts, and a table of what is not unchanged."""
    compared = [change for change in changes if change.word != "not comparable"]
    count = {
        word: sum(change.word == word for change in changes)
        for word in ("worse", "better", "changed", "unchanged", "not comparable")
    }
    lines = [
        f"### {overall(change.word for change in compared).capitalize()}: {escaped(new[:10])} against {escaped(base[:10])}",
        "",
        ", ".join(f"{number} {word}" for word, number in count.items()) + f" of {len(changes)} series.",
    ]
    shown = [change for word in ("worse", "better", "changed") for change in changes if change.word == word]
    if shown:
        lines += ["", "| | metric | series | machine | before | after | change |", "|---|---|---|---|---|---|---|"]
        lines += [_line(change) for change in shown[:MOST_LINES]]
        if len(shown) > MOST_LINES:
            lines += ["", f"{len(shown) - MOST_LINES} more are not in this table."]
    if reasons := {change.why for change in changes if change.word == "not comparable"}:
        lines += ["", "Not comparable:", "", *(f"- {escaped(reason)}" for reason in sorted(reasons))]
    lines += [
        "",
        RULE,
    ]
    return "\n".join(lines) + "\n"


def findings_markdown(found: Findings) -> str:
    """Return what became of all series since then: the answer, the counts, and a table of what is not unchanged."""
    count = ", ".join(f"{len(found.those(word))} {word}" for word in WORDS)
    lines = [f"### {found.word.capitalize()}: {escaped(found.headline)}", "", f"{count} of {len(found.each)} series."]
    shown = found.those("worse", "better", "changed")
    if shown:
        lines += [
            "",
            "| | metric | series | machine | then | now | change | since |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_finding(finding) for finding in shown[:MOST_LINES]]
        if len(shown) > MOST_LINES:
            lines += ["", f"{len(shown) - MOST_LINES} more are not in this table."]
    lines += ["", RULE]
    return "\n".join(lines) + "\n"


def _finding(finding: Finding) -> str:
    series = finding.series
    assert finding.before is not None  # noqa: S101 - what is better or worse has both levels
    assert finding.after is not None  # noqa: S101 - likewise
    since = [finding.first.commit[:10]] if finding.first else []
    since += [*finding.versions, finding.why] if finding.why else finding.versions
    cells = [
        finding.word,
        series.like.metric,
        series.title,
        series.machine,
        quantity(finding.before, series.metric.unit),
        quantity(finding.after, series.metric.unit),
        percent(finding.before, finding.after),
        "; ".join(since),
    ]
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def _line(change: Change) -> str:
    unit = change.series.metric.unit
    assert change.before is not None  # noqa: S101 - both values of a change that is comparable are there
    assert change.after is not None  # noqa: S101 - likewise
    cells = [
        change.word,
        change.series.like.metric,
        change.series.title,
        change.series.machine,
        quantity(change.before, unit),
        quantity(change.after, unit),
        percent(change.before, change.after),
    ]
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"

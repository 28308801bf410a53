"""The page of training runs: curves, a table and shares of a step as one HTML file, with its numbers in two files beside it."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from kda_reports import charts
from kda_reports.page import templates
from kda_reports.training_charts import QUANTITIES, draw, draw_shares
from kda_reports.training_panels import REACHED, best_rates, compare, condensed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.training import Throughput, TrainingRun
    from kda_reports.training_charts import Quantity
    from kda_reports.training_panels import Comparison, Panel

ENDED = {"steps": "all steps", "accuracy": "accuracy reached", None: "stopped"}
COLUMNS = ("data", "length", "mixer", "learning_rate", "seed", "step", "loss", "accuracy", "gradient_norm", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One quantity, and each panel with its drawing."""

    quantity: Quantity
    panels: Sequence[tuple[Panel, Markup]]


def render_training(
    runs: Sequence[TrainingRun], throughputs: Sequence[Throughput], sources: Sequence[str], *, name: str, every: int
) -> dict[str, str]:
    """Render the page of training runs; where learning rates were tried, curves and the table are of the best one.

    Parameters
    ----------
    runs, throughputs
        What was read from the rows; one of them may be empty.
    sources
        Names of the rows files, as the page gives its data source.
    name
        Name of the page's file without its ending.
    every
        Of how many steps the rows beside the page keep one.

    Returns
    -------
    dict[str, str]
        Texts by ending: ``.html``, ``.csv`` with every logged step, ``.jsonl`` with the condensed rows, from which the command
        makes the page again.
    """
    chosen, tried = best_rates(runs)
    comparison = compare(chosen) if runs else None
    page = templates().get_template("training.html")
    return {
        ".html": page.render(
            comparison=comparison,
            figures=_figures(comparison) if comparison else [],
            headline=_headline(comparison, throughputs),
            throughputs=[(throughput, _markup(draw_shares(throughput))) for throughput in throughputs],
            tried=tried,
            rates=sorted({rate for one in tried for rate in one.rates}),
            num_runs=len(runs),
            stopped=[run for run in runs if run.ended is None],
            sources=sources,
            name=name,
            every=every,
            reached=REACHED,
            endings=ENDED,
        ),
        ".csv": _csv(runs),
        ".jsonl": condensed(runs, throughputs, every),
    }


def _figures(comparison: Comparison) -> list[Figure]:
    return [
        Figure(
            quantity=quantity,
            panels=[(panel, _markup(draw(panel, comparison, quantity))) for panel in comparison.panels],
        )
        for quantity in QUANTITIES
    ]


def _markup(svg: str) -> Markup:
    # The only foreign text in a drawing are names, which the renderer escapes.
    return Markup(charts.without_namespaces(svg))  # noqa: S704


def _headline(comparison: Comparison | None, throughputs: Sequence[Throughput]) -> str:
    if comparison is None:
        return f"{throughputs[0].tokens_per_second:,.0f} tokens a second in training"
    level = REACHED[-1]
    counts = []
    for name in comparison.names:
        runs = comparison.runs_of(name)
        counts.append(f"{name} {sum(run.reached(level) is not None for run in runs)} of {len(runs)}")
    return f"Runs that reached an accuracy of {level}: {'; '.join(counts)}"


def _csv(runs: Sequence[TrainingRun]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        for point in run.points:
            labels = (run.data, run.length, run.mixer, repr(run.learning_rate), run.seed)
            numbers = (point.loss, point.accuracy, point.gradient_norm, point.seconds)
            writer.writerow([*labels, point.step, *map(repr, numbers)])
    return text.getvalue()

"""Render the error report: one HTML file that needs nothing else."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from kda_reports import charts, errors
from kda_reports.rows import Run, Verdict

FINGERPRINT = ("python", "torch", "triton", "numpy", "platform", "cpu", "gpu", "commit", "dirty")


def render_errors(runs: list[Run]) -> str:
    """Return the page for some runs; the same rows give the same bytes."""
    environment = Environment(
        loader=PackageLoader("kda_reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    headlines = [errors.headline(run) for run in runs]
    by_token, by_decay = errors.curve(runs, "token"), errors.curve(runs, "decay")
    return environment.get_template("errors.html").render(
        headlines=headlines,
        num_pass=sum(entry.outcome == "pass" for entry in headlines),
        runs=runs,
        matrix=errors.matrix(runs),
        figures=[
            ("Error against token position", "token + 1", charts.ratio_chart(by_token, "token + 1 (log)"), by_token),
            (
                "Error against cumulative decay",
                "nats + 1",
                charts.ratio_chart(by_decay, "decay since the sequence began, mean over channels, nats + 1 (log)"),
                by_decay,
            ),
        ],
        worst=errors.worst_measures(runs),
        failures=errors.failures(runs),
        fingerprint_names=FINGERPRINT,
        num_measures=sum(len(run.measures) for run in runs),
        num_verdicts=sum(len(run.verdicts) for run in runs),
    )

"""The pages of all reports, rendered from made-up rows into a folder, and a headless Chromium to open them with."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import synthetic_timings
import synthetic_training
from kda_reports.dashboard import render_dashboard
from kda_reports.page import render_errors, render_mutants
from kda_reports.results import Said, as_text, collect, read_results
from kda_reports.rows import read_rows
from kda_reports.table import render_table
from kda_reports.timing_page import render_bench
from kda_reports.timings import read_timings
from kda_reports.training import read_training
from kda_reports.training_page import render_training
from kda_reports.trends import trends
from synthetic_history import GPU, bimodal, measured, noisy, timed
from synthetic_rows import closed, lines, measure_row, sample, verdict_row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kda_reports.measurement import Measurement

Row = dict[str, Any]
TARGET = {"target": "sm_90", "triton": "3.7.1"}
PLANTED = {"kind": "bug", "what": "a sign", "trigger": "any call", "source": "own", "part": "chunk", "argument": ""}


def chromium() -> str | None:
    """Return the Chromium of this machine, Debian's package ``chromium`` or what ``KDA_CHROMIUM`` names, or ``None``."""
    return os.environ.get("KDA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def browser() -> Iterator[Any]:
    """Start the browser."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - not installed where no page is tested in a browser

    # Chromium cannot sandbox what root runs.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=options)
        yield started
        started.close()


def history(name: str = "steady") -> list[Measurement]:
    """Return 200 commits: steps of 2, 5 and 10 % and of other sizes, noise, a drift, two speeds, a spill and a lost law."""
    rows: list[Measurement] = []
    for step, at in ((0.02, 150), (0.05, 185), (0.10, 190), (0.0, 0), (-0.08, 180)):
        tokens = 4096 << len(rows) // 400
        call, shape = f"forward-softplus-T{tokens}-H16", {"B": 1, "T": tokens, "H": 16}
        rows += timed(noisy(len(rows), step=step, at=at), implementation=name, call=call, shape=shape)
    rows += timed(noisy(7, drift=0.10), implementation=name, call="backward-softplus-T8192-H16")
    rows += timed(bimodal(3), implementation=name, call="decode-T1-H16")
    single: Row = {"samples": None, "spread": None, "n": 1, "implementation": name}
    compiled: Row = {
        **single,
        "shape": {"K": 128, "V": 128},
        "source": "compile",
        "machine": TARGET,
        "device": "sm_90",
        "call": "launch 0",
    }
    for i in range(200):
        rows += [
            measured(i, 5.2e8 if i < 188 else 4.1e8, metric="peak-memory", unit="bytes", **single),
            measured(i, 168.0 if i < 192 else 255.0, metric="registers", unit="registers", **compiled),
            measured(i, 0.0 if i < 192 else 48.0, metric="spilled", unit="bytes", **compiled),
            measured(
                i, float("inf") if i == 120 else 0.31, metric="error-over-bound", unit="bound", source="verify",
                **{**single, "call": "dq, standard effort"},
            ),
        ]  # fmt: skip
    return [*rows, measured(3, 1.0, implementation=f"{name} unjudged", machine=GPU)]


def write_pages(folder: Path, name: str | None = None) -> list[Path]:
    """Render every page; with ``name`` everything that has a name is called that.

    Returns
    -------
    list[Path]
        The pages.
    """
    files = {
        f"dashboard/{path}": text for path, text in render_dashboard(trends(history(name or "steady")), 7, 1).items()
    }
    rows, two, planted, timings = sample(), _two_runs(), _planted(), synthetic_timings.sample()
    steps = synthetic_training.sample()
    if name is not None:
        for row in (*rows, *two, *planted, *timings, *steps):
            _rename(row, name)
    files["report.html"] = render_errors(read_rows([_written(folder, "rows", rows)]), ["rows.jsonl"])
    files["two.html"] = render_errors(read_rows([_written(folder, "two", two)]), ["two.jsonl"])
    files["mutants.html"] = render_mutants(read_rows([_written(folder, "mutants", planted)]), ["mutants.jsonl"])
    files["bench.html"] = render_bench(*read_timings([_written(folder, "bench", timings)]), ["bench.jsonl"])
    files["table.html"] = _table(folder, rows, name)
    training = read_training([_written(folder, "steps", steps)])
    beside = render_training(*training, ["steps.jsonl"], name="training", every=50)
    files |= {f"training{ending}": text for ending, text in beside.items()}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return [folder / path for path in files if path.endswith(".html")]


def _table(folder: Path, rows: list[Row], name: str | None) -> str:
    """Return the table of the sample, with something that a person says of each result and of its first law."""
    collect(read_rows([_written(folder, "rows", rows)]), folder / "results")
    for result in read_results(folder / "results"):
        said = Said(verdict="pass", of=result.computed, reason=name or "read, and right", finding=name or "docs/one.md")
        of_law = replace(said, verdict="fail", of="pass", finding="https://example.org/1")
        laws = [replace(law, human=None if i else of_law) for i, law in enumerate(result.laws)]
        told = replace(result, human=said, laws=laws)
        (folder / "results" / result.filename).write_text(as_text(told), encoding="utf-8")
    return render_table(read_results(folder / "results"))


def _written(folder: Path, name: str, rows: list[Row]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text(lines(rows), encoding="utf-8")
    return path


def _rename(row: Row, name: str) -> None:
    for field in (
        "implementation",
        "version",
        "message",
        "case",
        "reproduction",
        "reason",
        "regime",
        "dtype",
        "workload",
        "data",
        "mixer",
    ):
        if field in row and not (field == "workload" and row[field].startswith("forward-softplus")):
            row[field] = f"{row[field]}{name}" if field in ("implementation", "workload") else name


def _two_runs() -> list[Row]:
    rows = []
    for i, run in enumerate(("before", "after")):
        measures = [
            measure_row(
                run,
                "one",
                tensor,
                0.05 * (1 + k) * (1 + i * (k % 3)),
                case=f"T={2**k} seed={k}",
                shape={"T": 2**k, "K": 16},
            )
            for k in range(12)
            for tensor in ("o", "dq", "dk")
        ]
        rows += closed(run, [verdict_row(run, "one", "fail" if i else "pass", score=0.5), *measures])
    return rows


def _planted() -> list[Row]:
    rows = []
    for name, outcome in (("caught", "fail"), ("alive", "pass")):
        run = closed(name, [verdict_row(name, "one", outcome, score=3.0)])
        run[0]["planted"] = PLANTED
        rows += run
    return rows

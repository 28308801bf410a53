"""The null study: how often, and how nearly, a correct computation is called wrong.

The correct variants of every arithmetic class are judged, outputs and gradients alike, on calls that Hypothesis draws from a seed of
the study. The rows are those of an ordinary run, so the error report shows them; a verdict that fails is a false alarm.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kda_conformance import strategies
from kda_conformance.implementation import FunctionImplementation
from kda_conformance.planted.planting import PACKAGE, variants
from kda_conformance.rows import RowWriter, run_row
from kda_conformance.subject import Call, LawViolation, Subject

if TYPE_CHECKING:
    from rich.console import Console

    from kda_conformance.cases import Case

LAW = "null-study"


@dataclass(frozen=True, slots=True)
class Margin:
    """How far the correct runs of one arithmetic class stayed below the limit.

    Attributes
    ----------
    precision
        The class.
    scores
        The largest score of each run, over outputs and gradients; at most 1 passes.
    """

    precision: str
    scores: tuple[float, ...]

    @property
    def alarms(self) -> int:
        """Return how many runs were called wrong."""
        return sum(not score <= 1 for score in self.scores)

    def quantile(self, share: float) -> float:
        """Return the score that a share of the runs stays below."""
        return float(np.quantile(self.scores, share))


def run(num_runs: int, seed: int, out: Path, console: Console) -> list[Margin]:
    """Judge at least ``num_runs`` correct runs of every class on drawn calls, and write ``out/rows.jsonl``."""
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    classes: dict[str, list[str]] = defaultdict(list)
    for name, entry in variants().items():
        classes[entry.precision].append(name)
    found: dict[str, Margin] = {}
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
        # One process a class: its variants are judged on the same calls, whose budgets they share.
        pool = ProcessPoolExecutor(
            os.cpu_count() or 1,
            mp_context=get_context("spawn"),
            initializer=keep_budgets_in,
            initargs=(str(Path(folder) / "budgets"),),
        )
        task = progress.add_task("arithmetic classes", total=len(classes))
        with pool:
            # The class with the fewest variants needs the most calls, and starts first.
            order = sorted(classes, key=lambda precision: len(classes[precision]))
            for done in as_completed(
                [pool.submit(judge_class, each, classes[each], num_runs, seed, Path(folder)) for each in order]
            ):
                margin = done.result()
                found[margin.precision] = margin
                progress.advance(task)
        rows = "".join((Path(folder) / f"{name}.jsonl").read_text(encoding="utf-8") for name in variants())
    (out / "rows.jsonl").write_text(rows, encoding="utf-8")
    return [found[precision] for precision in classes]


def keep_budgets_in(folder: str) -> None:
    """Let this process keep its budgets in a folder of the study."""
    os.environ["KDA_CACHE_DIR"] = folder


def judge_class(precision: str, names: list[str], num_runs: int, seed: int, folder: Path) -> Margin:
    """Judge the variants of a class on the same calls; write the rows of each to ``folder``."""
    torch.set_num_threads(1)
    trials = []
    for name in names:
        implementation = FunctionImplementation(variants()[name].function(), name)
        subject = Subject(
            implementation=implementation,
            claims=implementation.claims,
            device="cpu",
            spec=f"{PACKAGE}.bugs:{name}",
            law=LAW,
            test=LAW,
        )
        writer = RowWriter(folder / f"{name}.jsonl")
        writer.write(run_row(subject, "exhaustive", writer.run))
        trials.append((subject, writer))
    claims = trials[0][0].claims
    (dtype,) = claims.precision
    scores: list[float] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=-(-num_runs // len(trials)),
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.cases(claims, dtype))
    def calls(case: Case) -> None:
        for subject, writer in trials:
            scores.append(record(subject, Call(case, dtype), writer))

    calls()
    for _, writer in trials:
        writer.finish("fail" if writer.counts["fail"] else "pass")
    return Margin(precision, tuple(scores))


def record(subject: Subject, call: Call, writer: RowWriter) -> float:
    """Judge one call, write its verdict and measures, and return its largest score."""
    subject.measures = []
    inputs = subject.inputs(call)
    found = subject.evaluate(call, inputs, *call.case.cotangents(inputs))
    outcome, message = "pass", ""
    try:
        subject.judge(call, found, subject.budget(call, inputs))
    except LawViolation as violation:
        outcome, message = "fail", str(violation)
    score = max(float(measure["score"]) for measure in subject.measures)
    verdict = {
        "law": LAW,
        "test": LAW,
        "case": str(call.case),
        "dtype": call.dtype,
        "precision": subject.claims.precision[call.dtype],
        "outcome": outcome,
        "score": score,
        "message": message,
        "reproduction": subject.reproduction(call),
        "seconds": 0.0,
    }
    slim = [{**measure, "by_token": [], "by_decay": []} for measure in subject.measures]
    writer.verdict(verdict, slim)
    return score

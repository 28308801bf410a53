"""The null study: how often, and how nearly, a correct computation is called wrong.

The correct variants of every arithmetic class are judged, outputs and gradients alike, on calls that Hypothesis draws from a seed of
the study. The rows are those of an ordinary run, so the error report shows them; a verdict that fails is a false alarm.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from kda_reference import CertificateError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kda_conformance import strategies
from kda_conformance.implementation import FunctionImplementation
from kda_conformance.planted.planting import PACKAGE, variants
from kda_conformance.rows import RowWriter, run_row
from kda_conformance.subject import Call, LawViolation, Subject

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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
    unjudged
        Runs of calls that the reference is not certain enough of to judge; they are no alarms, and none of ``scores``.
    """

    precision: str
    scores: tuple[float, ...]
    unjudged: int = 0

    @property
    def alarms(self) -> int:
        """Return how many runs were called wrong."""
        return sum(not score <= 1 for score in self.scores)

    def quantile(self, share: float) -> float:
        """Return the score that a share of the runs stays below."""
        return float(np.quantile(self.scores, share))


def run(
    num_runs: int, seeds: Sequence[int], out: Path, console: Console, *, processes: int = 1, resume: bool = False
) -> list[Margin]:
    """Judge at least ``num_runs`` correct runs of every class with each seed, and write ``out/rows.jsonl``.

    Parameters
    ----------
    num_runs
        Of each class and seed: calls are drawn until its variants have made so many.
    seeds
        What the calls are drawn from. Each is a study of its own; their runs add up.
    out
        Folder of the results. What one class does with one seed is kept in a folder of ``out/parts`` as it comes.
    processes
        How many judge at a time, one class with one seed each.
    resume
        Whether what is whole in ``out/parts`` is taken from there, instead of judged again.
    """
    classes: dict[str, list[str]] = defaultdict(list)
    for name, entry in variants().items():
        classes[entry.precision].append(name)
    # A class of few variants needs the most calls for its runs, and starts first.
    order = sorted(classes, key=lambda precision: len(classes[precision]))
    parts = {(seed, each): out / "parts" / f"{seed}-{each}" for seed in seeds for each in order}
    missing = {key: part for key, part in parts.items() if not (resume and _is_whole(part, classes[key[1]], num_runs))}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as budgets:
        pool = ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=keep_budgets_in, initargs=(budgets,)
        )
        task = progress.add_task("classes and seeds", total=len(parts), completed=len(parts) - len(missing))
        with pool:
            waiting = []
            for (seed, precision), part in missing.items():
                shutil.rmtree(part, ignore_errors=True)
                waiting.append(pool.submit(judge_class, classes[precision], num_runs, seed, part))
            for done in as_completed(waiting):
                done.result()
                progress.advance(task)
    found = {
        name: [_rows(part / f"{name}.jsonl") for (_, each), part in parts.items() if each == variants()[name].precision]
        for name in variants()
    }
    rows = "".join(json.dumps(row) + "\n" for files in found.values() for row in joined(files))
    (out / "rows.jsonl").write_text(rows, encoding="utf-8")
    return [
        margin(precision, [row for name in names for rows in found[name] for row in rows])
        for precision, names in classes.items()
    ]


def _is_whole(part: Path, names: Sequence[str], num_runs: int) -> bool:
    """Tell whether every variant of a class was judged to the end, and on as many calls as are asked for."""
    files = [_rows(part / f"{name}.jsonl") for name in names]
    closed = all(rows and rows[-1]["kind"] == "finish" for rows in files)
    return closed and sum(row["kind"] == "verdict" for rows in files for row in rows) >= num_runs


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def joined(files: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of one variant with several seeds as those of one run."""
    opening, closing = files[0][0], files[0][-1]
    between = [{**row, "run": opening["run"]} for rows in files for row in rows[1:-1]]
    counts = {name: sum(rows[-1]["counts"][name] for rows in files) for name in closing["counts"]}
    ending = "fail" if any(rows[-1]["exit"] == "fail" for rows in files) else closing["exit"]
    seconds = round(sum(rows[-1]["seconds"] for rows in files), 2)
    return [opening, *between, {**closing, "exit": ending, "counts": counts, "seconds": seconds}]


def margin(precision: str, rows: Sequence[dict[str, Any]]) -> Margin:
    """Return the margin of a class by the rows of its variants."""
    verdicts = [row for row in rows if row["kind"] == "verdict"]
    scores = tuple(float(row["score"]) for row in verdicts if row["outcome"] != "error")
    return Margin(precision, scores, len(verdicts) - len(scores))


def keep_budgets_in(folder: str) -> None:
    """Let this process keep its budgets in a folder of the study."""
    os.environ["KDA_CACHE_DIR"] = folder


def judge_class(names: Sequence[str], num_runs: int, seed: int, folder: Path) -> None:
    """Judge the variants of a class on the same drawn calls; write the rows of each to ``folder`` as they come."""
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
            record(subject, Call(case, dtype), writer)

    calls()
    for _, writer in trials:
        writer.finish("fail" if writer.counts["fail"] else "pass")


def record(subject: Subject, call: Call, writer: RowWriter) -> None:
    """Judge one call, and write its verdict and measures."""
    subject.measures = []
    inputs = subject.inputs(call)
    found = subject.evaluate(call, inputs, *call.case.cotangents(inputs))
    outcome, message = "pass", ""
    try:
        subject.judge(call, found, subject.budget(call, inputs))
    except LawViolation as violation:
        outcome, message = "fail", str(violation)
    except CertificateError as error:
        outcome, message = "error", str(error)
    verdict = {
        "law": LAW,
        "test": LAW,
        "case": str(call.case),
        "dtype": call.dtype,
        "precision": subject.claims.precision[call.dtype],
        "outcome": outcome,
        "score": max((float(measure["score"]) for measure in subject.measures), default=None),
        "message": message,
        "reproduction": subject.reproduction(call),
        "seconds": 0.0,
    }
    slim = [{**measure, "by_token": [], "by_decay": [], "by_channel": None} for measure in subject.measures]
    writer.verdict(verdict, slim)

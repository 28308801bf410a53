"""The null study: how often, and how nearly, a correct computation is called wrong.

Every correct variant is judged on calls that Hypothesis draws from a seed of their own, outputs and gradients alike. The rows are those of
an ordinary run, so the error report shows them; a verdict that fails is a false alarm.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
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


def run(num_calls: int, seed: int, out: Path, console: Console) -> int:
    """Judge every variant on ``num_calls`` drawn calls, write ``out/rows.jsonl``, and return the number of false alarms."""
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    names, alarms = list(variants()), 0
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
        # Variants of one class draw the same calls; their budgets are shared, and not kept.
        pool = ProcessPoolExecutor(
            os.cpu_count() or 1,
            mp_context=get_context("spawn"),
            initializer=keep_budgets_in,
            initargs=(str(Path(folder) / "budgets"),),
        )
        task = progress.add_task("correct variants", total=len(names))
        paths = {name: Path(folder) / f"{name}.jsonl" for name in names}
        with pool:
            for done in as_completed([pool.submit(judge, name, num_calls, seed, paths[name]) for name in names]):
                alarms += done.result()
                progress.advance(task)
        rows = "".join(path.read_text(encoding="utf-8") for path in paths.values())
    (out / "rows.jsonl").write_text(rows, encoding="utf-8")
    return alarms


def keep_budgets_in(folder: str) -> None:
    """Let this process keep its budgets in a folder of the study."""
    os.environ["KDA_CACHE_DIR"] = folder


def judge(name: str, num_calls: int, seed: int, path: Path) -> int:
    """Judge one variant and append its rows to ``path``; return the number of false alarms."""
    torch.set_num_threads(1)
    implementation = FunctionImplementation(variants()[name].function(), name)
    subject = Subject(
        implementation=implementation, claims=implementation.claims, device="cpu", spec=f"{PACKAGE}.bugs:{name}"
    )
    subject.law, subject.test = LAW, LAW
    (dtype,) = subject.claims.precision
    writer = RowWriter(path)
    writer.write(run_row(subject, "exhaustive", writer.run))

    @hypothesis.seed(seed)
    @settings(
        max_examples=num_calls,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.cases(subject.claims, dtype))
    def calls(case: Case) -> None:
        record(subject, Call(case, dtype), writer)

    calls()
    writer.finish("fail" if writer.counts["fail"] else "pass")
    return writer.counts["fail"]


def record(subject: Subject, call: Call, writer: RowWriter) -> None:
    """Judge one call and write its verdict and measures."""
    subject.measures = []
    inputs = subject.inputs(call)
    found = subject.evaluate(call, inputs, *call.case.cotangents(inputs))
    outcome, message = "pass", ""
    try:
        subject.judge(call, found, subject.budget(call, inputs))
    except LawViolation as violation:
        outcome, message = "fail", str(violation)
    verdict = {
        "law": LAW,
        "test": LAW,
        "case": str(call.case),
        "dtype": call.dtype,
        "precision": subject.claims.precision[call.dtype],
        "outcome": outcome,
        "score": max(measure["score"] for measure in subject.measures),
        "message": message,
        "reproduction": subject.reproduction(call),
        "seconds": 0.0,
    }
    slim = [{**measure, "by_token": [], "by_decay": []} for measure in subject.measures]
    writer.verdict(verdict, slim)

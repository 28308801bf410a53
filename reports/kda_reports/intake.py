"""From the rows of one run to rows of the history: what ``kda verify``, ``kda bench`` and the compile report leave behind.

Of a conformance run are kept its verdict and the largest error over bound by dtype and tensor; of a benchmark every timing and peak; of a
compile report what each kernel needs. What is not kept is said in a sentence, never passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kda_reports.errors import gravity, summarise
from kda_reports.fields import Fields, RowError, each_row
from kda_reports.measurement import COMMIT, SOURCES, Measurement, moment
from kda_reports.metrics import METRICS
from kda_reports.rows import read_rows
from kda_reports.timings import read_timings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kda_reports.errors import Standing
    from kda_reports.rows import Measure

MACHINE = ("gpu", "cpu", "platform", "driver", "threads")
LIBRARIES = ("python", "torch", "triton", "numpy", "cuda")
COMPILED = ("compile", "finish")


@dataclass(slots=True)
class Taken:
    """What a file gives: rows for the history, and sentences about what of it is not kept."""

    rows: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def take(path: Path) -> Taken:
    """Turn a file of rows into rows of the history.

    Raises
    ------
    RowError
        If the file is no rows file of a known kind, if it lacks a commit, or if nothing in it can be kept.
    """
    kind = _kind(path)
    taken = {"verify": _verify, "bench": _bench, "compile": _compile}[kind](path)
    if not taken.rows:
        message = f"{path.name} must hold something to keep, got none ({'; '.join(taken.notes) or 'no rows'}); run `kda {kind}` again"
        raise RowError(message)
    return taken


def _kind(path: Path) -> str:
    row = next(each_row([path], "kda verify"), None)
    if row is None:
        message = f"{path.name} must hold rows, got an empty file; run `kda verify` or `kda bench` to make some"
        raise RowError(message)
    kind = row.get("kind", str)
    kind = "verify" if kind == "run" else kind
    if kind not in SOURCES:
        raise row.error("kind", "be run, bench or compile in the first row", repr(kind))
    return kind


def _origin(fingerprint: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields that a fingerprint gives, which must name a commit."""
    commit = fingerprint.get("commit")
    if not isinstance(commit, str) or COMMIT.fullmatch(commit) is None:
        message = (
            f"{where}: commit must be known, got {commit!r}; a history is one of commits, so measure from a checkout"
        )
        raise RowError(message)
    told = Fields(fingerprint, where)
    return {
        "commit": commit,
        # A checkout of which nothing is known may have changes.
        "dirty": fingerprint.get("dirty") is not False,
        "commit_time": None if fingerprint.get("commit_time") is None else moment(told, "commit_time"),
        "suite_version": fingerprint.get("suite"),
        "machine": {name: fingerprint.get(name) for name in MACHINE},
        "libraries": {name: fingerprint[name] for name in LIBRARIES if fingerprint.get(name) is not None},
    }


def _number(metric: str, value: float, n: int, **others: Any) -> dict[str, Any]:  # noqa: ANN401 - fields of any type
    return {
        "metric": metric, "unit": METRICS[metric].unit, "value": value, "n": n, "spread": None, "samples": None, **others,
    }  # fmt: skip


def _verify(path: Path) -> Taken:
    taken = Taken()
    for standing in summarise(read_rows([path])).standings:
        run = standing.run
        if run.planted is not None:
            message = (
                f"{path.name}: run {run.identifier} must be of a real implementation, got the planted {run.implementation}; "
                "what is planted has no history"
            )
            raise RowError(message)
        _take_run(standing, taken, f"{path.name} run {run.identifier}")
    return taken


def _take_run(standing: Standing, taken: Taken, where: str) -> None:
    run, counts = standing.run, standing.counts
    shared = _origin(run.fingerprint, where) | {
        "time": moment(Fields({"started": run.started}, where), "started"), "source": "verify", "run": run.identifier,
        "seed": run.seed, "device": run.device, "implementation": run.implementation, "version": run.version, "op": "KDA",
        "pass_name": "all", "call": f"{run.effort} effort", "shape": {},
    }  # fmt: skip
    judged = max(1, standing.num_judged)
    taken.rows.append(
        Measurement(**shared, dtype="all", **_number("conformance", float(standing.status == "pass"), judged))
    )
    if not standing.is_decided or run.finish is None:
        taken.notes.append(f"{run.implementation}: only that it is not judged right is kept. {standing.summary}")
        return
    broken = float(counts["fail"] + counts["error"])
    taken.rows.append(Measurement(**shared, dtype="all", **_number("laws-broken", broken, judged)))
    groups: dict[tuple[str, str], list[Measure]] = {}
    for measure in run.measures:
        groups.setdefault((measure.dtype, measure.tensor), []).append(measure)
    for (dtype, tensor), measures in groups.items():
        worst = max(measures, key=lambda measure: gravity(measure.score))
        fields = shared | {"call": f"{tensor}, {run.effort} effort", "dtype": dtype}
        taken.rows.append(Measurement(**fields, **_number("error-over-bound", worst.score, len(measures))))


def _bench(path: Path) -> Taken:
    taken = Taken()
    timings, unfinished = read_timings([path])
    for timing in timings:
        where = f"{path.name} run {timing.run}"
        if timing.time is None:
            taken.notes.append(f"{timing.implementation} on {timing.workload} has no time: {timing.outcome}")
            continue
        shared = _origin(timing.fingerprint, where) | {
            "time": moment(Fields({"started": timing.started}, where), "started"), "source": "bench", "run": timing.run,
            "seed": timing.seed, "device": timing.device, "implementation": timing.implementation, "version": timing.version,
            "op": timing.operator, "pass_name": timing.pass_name, "dtype": timing.dtype, "shape": timing.sizes,
            "call": timing.workload if timing.mode == "calls" else f"{timing.workload}, {timing.mode}",
        }  # fmt: skip
        time = timing.time
        number = _number("time", time.median, time.num_samples, spread=time.mad, samples=time.samples)
        taken.rows.append(Measurement(**shared, **number))
        if timing.peak_bytes is not None:
            taken.rows.append(Measurement(**shared, **_number("peak-memory", float(timing.peak_bytes), 1)))
    taken.notes += [f"run {run} has no proper end" for run in unfinished]
    return taken


def _compile(path: Path) -> Taken:
    taken = Taken()
    for row in each_row([path], "nox -s compile"):
        if row.one_of("kind", COMPILED) == "finish":
            continue
        name = f"{row.get('kernel', str)} launch {row.get('launch', int)}"
        if row.one_of("outcome", ("compiled", "error")) == "error":
            taken.notes.append(f"{name} does not compile for {row.get('target', str)}: {row.get('message', str)}")
            continue
        target, triton = row.get("target", str), row.get("triton", str)
        shared = _origin(row.get("fingerprint", dict), row.where) | {
            "time": moment(row, "started"), "source": "compile", "run": row.get("run", str), "seed": None, "device": target,
            "implementation": row.get("kernel", str), "version": "", "op": "KDA", "pass_name": row.get("pass", str),
            "call": f"launch {row.get('launch', int)}", "shape": row.counts("shape"), "dtype": row.get("dtype", str),
            # What the compiler makes depends on the target and the compiler, and on no machine that it runs on.
            "machine": {"target": target, "triton": triton},
        }  # fmt: skip
        numbers = {
            "registers": row.get("registers", int), "spilled": row.get("spilled_bytes", int),
            "shared-memory": row.get("shared_bytes", int), "code-size": row.get("code_bytes", int),
            "matrix-instructions": sum(row.counts("matrix_instructions").values()),
        }  # fmt: skip
        taken.rows += [Measurement(**shared, **_number(metric, float(value), 1)) for metric, value in numbers.items()]
    return taken

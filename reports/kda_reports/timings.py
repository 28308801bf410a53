"""Timings: the rows of a benchmark, read strictly, and what is compared in them.

One row of kind ``bench`` is one side on one workload and complete in itself; a row whose gate is red has no number. A run is closed by a
``finish`` row, without which it is incomplete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.fields import Fields, RowError, each_row
from kda_reports.rows import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

OUTCOMES = ("measured", "red", "error", "unclaimed")
MODES = ("calls", "graph")
KDA = "KDA"
AXES = {"tokens": "T", "small": "T", "operators": "T", "heads": "H", "batch": "B", "chunk": "C"}
FEWEST_POINTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Repeated measurements of the time of a call, in seconds: median, its median absolute deviation, quartiles, all of them."""

    median: float
    mad: float
    q1: float
    q3: float
    samples: tuple[float, ...]

    @property
    def num_samples(self) -> int:
        """Return how many times it was measured."""
        return len(self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One side on one workload.

    Attributes
    ----------
    run, started, device, implementation, version, seed
        Who, when, where, on which draw of the inputs.
    operator
        ``KDA``, or that of another recurrence, which is not judged, or the part of a layer.
    judged
        Whether it was judged before it was timed; bytes and operations are counted for what is.
    workload, labels, pass_name, mode, gate, dtype
        What was called; ``mode`` is one of ``MODES``.
    sizes
        T, H, B, K, V, N, and C for the chunk length.
    outcome, message, score
        One of ``OUTCOMES``, why it is not ``measured``, and the error over its bound that the gate found.
    time, peak_bytes
        ``None`` unless measured; the peak also on a CPU.
    least_bytes, flop
        What must be moved and computed.
    copy_bytes_per_s, matmul_flop_per_s, matmul_dtype
        What the machine reached in the same run.
    """

    run: str
    started: str
    device: str
    implementation: str
    version: str
    seed: int
    operator: str
    judged: bool
    workload: str
    labels: tuple[str, ...]
    pass_name: str
    mode: str
    gate: str
    dtype: str
    sizes: Mapping[str, int]
    outcome: str
    message: str
    score: float | None
    time: Spread | None
    peak_bytes: int | None
    least_bytes: int
    flop: int
    copy_bytes_per_s: float
    matmul_flop_per_s: float
    matmul_dtype: str
    fingerprint: Mapping[str, object]

    @property
    def floor(self) -> float:
        """Seconds that no call can undercut at the ceilings: bytes over copy rate or operations over product rate."""
        return max(self.least_bytes / self.copy_bytes_per_s, self.flop / self.matmul_flop_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One side along one axis: ``points`` are ``(size, median, first quartile, third quartile)``, by size."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Curves that share a panel: everything but the size on the axis is the same."""

    axis: str
    title: str
    curves: tuple[Curve, ...]


def read_timings(paths: Iterable[Path]) -> tuple[list[Timing], list[str]]:
    """Read rows files of ``kda bench``.

    Returns
    -------
    tuple[list[Timing], list[str]]
        The timings in the order in which they were made, and the runs that have no proper end.

    Raises
    ------
    RowError
        If a file cannot be read, a line is no row of a benchmark, or there is no timing at all.
    """
    found: list[Timing] = []
    closed = set()
    for row in each_row(paths, "kda bench"):
        kind = row.one_of("kind", ("bench", "finish"))
        if kind == "finish":
            closed.add(row.get("run", str))
        else:
            found.append(_timing(row))
    if not found:
        message = "rows must hold at least one timing, got none; nothing timed is no result"
        raise RowError(message)
    return found, sorted({timing.run for timing in found} - closed)


def _timing(row: Fields) -> Timing:
    schema = row.get("schema", int)
    if schema != SCHEMA:
        raise row.error("schema", f"be {SCHEMA}", str(schema))
    outcome = row.one_of("outcome", OUTCOMES)
    time = None if row.get("time", object) is None else _spread(row.inner("time"))
    if (time is not None) != (outcome == "measured"):
        raise row.error("time", "be there if and only if the outcome is measured", f"outcome {outcome!r}")
    ceilings = row.inner("ceilings")
    return Timing(
        run=row.get("run", str),
        started=row.get("started", str),
        device=row.get("device", str),
        implementation=row.get("implementation", str),
        version=row.get("version", str),
        seed=row.get("seed", int),
        operator=row.get("operator", str),
        judged=row.get("judged", bool),
        workload=row.get("workload", str),
        labels=tuple(map(str, row.get("labels", list))),
        pass_name=row.get("pass", str),
        mode=row.one_of("mode", MODES),
        gate=row.get("gate", str),
        dtype=row.get("dtype", str),
        sizes=row.counts("shape") | {"C": row.get("chunk_size", int)},
        outcome=outcome,
        message=row.get("message", str),
        score=None if row.get("score", object) is None else row.number("score"),
        time=time,
        peak_bytes=None if row.get("peak_bytes", object) is None else row.get("peak_bytes", int),
        least_bytes=row.get("least_bytes", int),
        flop=row.get("flop", int),
        copy_bytes_per_s=ceilings.number("copy_bytes_per_s"),
        matmul_flop_per_s=ceilings.number("matmul_flop_per_s"),
        matmul_dtype=ceilings.get("matmul_dtype", str),
        fingerprint=row.get("fingerprint", dict),
    )


def _spread(row: Fields) -> Spread:
    return Spread(
        median=row.number("median"),
        mad=row.number("mad"),
        q1=row.number("q1"),
        q3=row.number("q3"),
        samples=row.numbers("samples"),
    )


def comparisons(timings: Sequence[Timing]) -> list[Comparison]:
    """Return the panels: for every axis, the curves of the workloads that differ in nothing else."""
    panels: dict[tuple[str, str], dict[str, dict[float, Spread]]] = {}
    for timing in timings:
        for axis in dict.fromkeys(AXES[label] for label in timing.labels if label in AXES):
            if timing.time is not None:
                curves = panels.setdefault((axis, _others(timing, axis)), {})
                curves.setdefault(timing.implementation, {})[timing.sizes[axis]] = timing.time
    found = []
    for (axis, title), curves in panels.items():
        drawn = tuple(_curve(name, times) for name, times in curves.items() if len(times) >= FEWEST_POINTS)
        if drawn:
            found.append(Comparison(axis=axis, title=title, curves=drawn))
    return found


def _others(timing: Timing, axis: str) -> str:
    sizes = [f"{name}={timing.sizes[name]}" for name in "BTHKC" if name != axis]
    words = [timing.pass_name, timing.gate, timing.dtype, *sizes]
    return ", ".join([*words, "graph"] if timing.mode == "graph" else words)


def _curve(name: str, times: Mapping[float, Spread]) -> Curve:
    points = tuple((size, time.median, time.q1, time.q3) for size, time in sorted(times.items()))
    return Curve(name=name, points=points)


def operator_ratios(timings: Sequence[Timing]) -> list[Comparison]:
    """Return, for every gate, how many times longer each side takes than the first KDA implementation, along T [KL fig. 2]."""
    compared = [timing for timing in timings if "operators" in timing.labels and timing.time is not None]
    base = next((timing.implementation for timing in compared if timing.operator == KDA), None)
    bases = {(t.run, t.workload): t.time for t in compared if t.implementation == base}
    panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for timing in sorted(compared, key=lambda timing: timing.sizes["T"]):
        unit = bases.get((timing.run, timing.workload))
        if unit is None or timing.time is None or timing.implementation == base:
            continue
        ratio = timing.time.median / unit.median
        # The worst that both quartiles allow.
        point = (timing.sizes["T"], ratio, timing.time.q1 / unit.q3, timing.time.q3 / unit.q1)
        panels.setdefault(_others(timing, "T"), {}).setdefault(timing.implementation, []).append(point)
    return [
        Comparison(
            axis="T",
            title=f"times {base}: {title}",
            curves=tuple(
                Curve(name=name, points=tuple(points))
                for name, points in curves.items()
                if len(points) >= FEWEST_POINTS
            ),
        )
        for title, curves in panels.items()
        if any(len(points) >= FEWEST_POINTS for points in curves.values())
    ]

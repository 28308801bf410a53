"""Read the rows of conformance runs, strictly: a line that is not what the schema says is an error, not a gap in the report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SCHEMA = 1
OUTCOMES = ("pass", "fail", "error", "xfail", "unclaimed", "may")
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RowError(ValueError):
    """A rows file does not follow the schema, or holds nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of one test of a law."""

    law: str
    test: str
    case: str
    dtype: str
    outcome: str
    score: float | None
    message: str
    reproduction: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How one tensor of one call compared with its budget; ``score`` is the error as a fraction of its bound."""

    law: str
    case: str
    dtype: str
    precision: str
    tensor: str
    score: float
    relative_error: float
    index: dict[str, int]
    got: float
    expected: float
    bound: float
    by_token: list[tuple[float, float]]
    by_decay: list[tuple[float, float]]
    regime: str
    reproduction: str


@dataclass(slots=True, kw_only=True)
class Run:
    """One implementation judged once.

    Attributes
    ----------
    exit
        How the run ended: ``pass``, ``fail``, ``nothing``; ``incomplete`` when its closing row is missing.
    """

    run: str
    implementation: str
    version: str
    effort: str
    started: str
    device: str
    claims: dict[str, Any]
    fingerprint: dict[str, Any]
    exit: str = "incomplete"
    seconds: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        """Return how many verdicts have an outcome."""
        return sum(verdict.outcome == outcome for verdict in self.verdicts)


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read all runs of some rows files, in the order they began.

    Raises
    ------
    RowError
        If a line is no JSON object of a known kind, lacks a field, belongs to no run, or there is no run at all.
    """
    runs: dict[str, Run] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                _take(runs, json.loads(line, parse_constant=_refuse))
            except (KeyError, TypeError, ValueError) as error:
                message = f"row {number} of {path} must follow schema {SCHEMA}, got {type(error).__name__}: {error}; write it again"
                raise RowError(message) from error
    if not runs:
        message = f"rows must hold at least one run, got none in {[str(path) for path in paths]}; an empty run is no pass"
        raise RowError(message)
    return list(runs.values())


def _take(runs: dict[str, Run], row: dict[str, Any]) -> None:
    kind = row["kind"]
    if kind == "run":
        if row["schema"] != SCHEMA:
            message = f"schema must be {SCHEMA}, got {row['schema']}"
            raise ValueError(message)
        names = ("run", "implementation", "version", "effort", "started", "device", "claims", "fingerprint")
        runs[row["run"]] = Run(**{name: row[name] for name in names})
        return
    run = runs[row["run"]]
    if kind == "finish":
        run.exit, run.seconds = row["exit"], float(row["seconds"])
    elif kind == "verdict":
        if row["outcome"] not in OUTCOMES:
            message = f"outcome must be one of {OUTCOMES}, got {row['outcome']!r}"
            raise ValueError(message)
        score = None if row["score"] is None else _number(row["score"])
        names = ("law", "test", "case", "dtype", "outcome", "message", "reproduction")
        run.verdicts.append(Verdict(**{name: row[name] for name in names}, score=score))
    elif kind == "measure":
        names = ("law", "case", "dtype", "precision", "tensor", "regime", "reproduction")
        worst = row["worst"]
        run.measures.append(
            Measure(
                **{name: row[name] for name in names},
                **{name: _number(row[name]) for name in ("score", "relative_error")},
                **{name: _number(worst[name]) for name in ("got", "expected", "bound")},
                index=worst["index"],
                by_token=[(_number(x), _number(y)) for x, y in row["by_token"]],
                by_decay=[(_number(x), _number(y)) for x, y in row["by_decay"]],
            )
        )
    else:
        message = f"kind must be run, verdict, measure or finish, got {kind!r}"
        raise ValueError(message)


def _number(value: float | str) -> float:
    return NON_FINITE[value] if isinstance(value, str) else float(value)


def _refuse(constant: str) -> float:
    message = f"{constant} must be written as a string"
    raise ValueError(message)

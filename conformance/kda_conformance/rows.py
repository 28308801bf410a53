"""Rows: what a run leaves behind, one JSON object a line, each complete in itself."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
import uuid
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kda_conformance import __version__

if TYPE_CHECKING:
    from kda_conformance.subject import Subject

SCHEMA = 1
VERDICTS = ("pass", "fail", "error", "xfail", "unclaimed", "may")


class RowWriter:
    """Appends the rows of one run to a file, so that a reader sees every finished test at once.

    Attributes
    ----------
    run
        Identifier that all rows of the run carry.
    counts
        Verdicts so far, by outcome.
    outcomes
        All outcomes there may be.
    """

    def __init__(self, path: Path, outcomes: tuple[str, ...] = VERDICTS) -> None:
        self.path, self.outcomes = path, outcomes
        self.run = uuid.uuid4().hex[:12]
        self.counts: Counter[str] = Counter()
        self.implementation = ""
        self.started = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self.implementation = row.get("implementation", self.implementation)
        with self.path.open("a") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")

    def verdict(self, verdict: dict[str, Any], measures: list[dict[str, Any]]) -> None:
        """Append the verdict of one test and what it measured."""
        self.counts[verdict["outcome"]] += 1
        common = {"run": self.run, "implementation": self.implementation}
        for measure in measures:
            self.write({"kind": "measure", **common, **measure})
        self.write({"kind": "verdict", **common, **verdict})

    def finish(self, outcome: str) -> None:
        """Append the closing row."""
        seconds = round(time.monotonic() - self.started, 2)
        counts = {name: self.counts[name] for name in self.outcomes}
        self.write(
            {
                "kind": "finish",
                "run": self.run,
                "implementation": self.implementation,
                "exit": outcome,
                "counts": counts,
                "seconds": seconds,
            }
        )


def run_row(subject: Subject, effort: str, run: str) -> dict[str, Any]:
    """Return the opening row: who is judged, on what claims, where."""
    opening = _opening(subject.implementation.name, subject.implementation.version, effort, run)
    return {**opening, "seed": subject.seed, "device": subject.device, "claims": subject.claims.describe()}


def _opening(implementation: str, version: str, effort: str, run: str) -> dict[str, Any]:
    return {
        "kind": "run",
        "schema": SCHEMA,
        "run": run,
        "implementation": implementation,
        "version": version,
        "effort": effort,
        "started": now(),
        "fingerprint": fingerprint(),
        "seed": 0,
    }


def unloaded_rows(path: Path, spec: str, effort: str, message: str) -> None:
    """Write the rows of an implementation that could not be loaded, so that a report does not pass over it."""
    writer = RowWriter(path)
    opening = _opening(spec, "unknown", effort, writer.run)
    writer.write({**opening, "device": "none", "claims": {}})
    verdict = {
        "law": "loading", "test": "loading", "case": "", "dtype": "", "precision": "", "outcome": "error", "score": None,
        "message": message, "reproduction": "", "seconds": 0.0,
    }  # fmt: skip
    writer.verdict(verdict, [])
    writer.finish("usage")


def now() -> str:
    """Return the time as rows say it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def fingerprint() -> dict[str, Any]:
    """Return what identifies machine, libraries and source state."""
    commit, commit_time, dirty = _source_state()
    return {
        "suite": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "commit": commit,
        "commit_time": commit_time,
        "dirty": dirty,
    }


def finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value with non-finite numbers written as the strings nan, inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the model of the processor, which the platform module does not know on Linux."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Return driver, clocks and power limit of the first GPU, as the driver's own tool says."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)  # noqa: S603 - fixed words
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip()


def _source_state() -> tuple[str | None, str | None, bool | None]:
    """Return commit, its time and dirty flag of the checkout this package runs from, or ``None`` for an installed copy."""
    try:
        commit, _, commit_time = _git("show", "--no-patch", "--format=%H %cI", "HEAD").partition(" ")
        return commit, commit_time, bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None, None


def _git(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed words
        ["git", *arguments],  # noqa: S607 - whichever git is on the path
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()

"""Judge several implementations side by side: one pytest process each, rows collected as they come.

Processes keep implementations from disturbing each other: a crash, a leaked setting or a patched library stays where it happened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.live import Live
from rich.table import Table

from kda_conformance.devices import num_cores
from kda_conformance.rows import unloaded_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

    from rich.console import Console

POLL_SECONDS = 0.5
# The quickest of those with every claim goes first: the budgets it computes serve the slow ones beside and after it.
DEFAULT_CPU = ("torch-chunkwise", "triton-chunk", "triton-recurrent", "transformers-chunk", "transformers-recurrent")
DEFAULT_CUDA = ("triton-chunk", "triton-recurrent", "fla-chunk", "fla-recurrent")


@dataclass
class Trial:
    """One implementation being judged.

    Attributes
    ----------
    spec
        What ``--impl`` is given.
    rows
        The file its process appends rows to.
    order
        Options that say where it begins: every second one at the end, so that two that run side by side compute each budget once.
    counts, worst
        Verdicts so far, and the largest score.
    exit
        pytest's exit status once the process has ended.
    """

    spec: str
    rows: Path
    log: Path
    order: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    last: str = "waiting"
    exit: int | None = None
    started: float = 0.0
    seconds: float = 0.0
    offset: int = 0

    def read_new_rows(self) -> None:
        """Take in the rows written since the last look."""
        if not self.rows.is_file():
            return
        with self.rows.open() as file:
            file.seek(self.offset)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                self.offset += len(line.encode())
                self._take(json.loads(line))

    def _take(self, row: dict[str, object]) -> None:
        if row["kind"] == "verdict":
            self.counts[str(row["outcome"])] += 1
            self.last = str(row["law"])
        if row["kind"] == "measure":
            self.worst = max(self.worst, float(row["score"]))  # type: ignore[arg-type]


def judge_side_by_side(
    specs: Sequence[str], options: Sequence[str], out: Path, console: Console, processes: int | None = None
) -> dict[str, int]:
    """Run the suite on every implementation, show progress, and write ``out/rows.jsonl``.

    Parameters
    ----------
    specs
        Implementations, as ``--impl`` takes them.
    options
        Further pytest options, the same for all; ``--effort`` is among them.
    out
        Folder of the results; existing rows are replaced.
    processes
        How many processes judge at a time; ``None`` means one a core. What is left over when each implementation has one is shared
        out among them.

    Returns
    -------
    dict[str, int]
        pytest's exit status per implementation.
    """
    processes = processes or num_cores()
    at_once = min(len(specs), processes)
    options = [*options, *shared_by(processes // max(at_once, 1))]
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trials = [
            Trial(spec, Path(folder) / f"{i}.jsonl", out / f"log-{i}.txt", ("--kda-backwards",) * (i % 2))
            for i, spec in enumerate(specs)
        ]
        _run(trials, options, at_once, console)
        for trial in trials:
            if not trial.rows.is_file():
                unloaded_rows(trial.rows, trial.spec, options[options.index("--effort") + 1], _last_lines(trial.log))
        rows.write_text("".join(trial.rows.read_text() for trial in trials))
    for trial in trials:
        if trial.exit in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.INTERRUPTED):
            console.print(f"[bold]{trial.spec}[/bold]: {_last_lines(trial.log)}")
    return {
        trial.spec: trial.exit if trial.exit is not None else int(pytest.ExitCode.INTERNAL_ERROR) for trial in trials
    }


def _run(trials: list[Trial], options: Sequence[str], at_once: int, console: Console) -> None:
    waiting = list(trials)
    with Live(_table(trials), console=console, refresh_per_second=2, transient=False) as live:
        while any(trial.exit is None for trial in trials):
            running = [trial for trial in trials if trial.process is not None and trial.exit is None]
            while waiting and len(running) < at_once:
                trial = waiting.pop(0)
                trial.process, trial.started, trial.last = _start(trial, options), time.monotonic(), "loading"
                running.append(trial)
            for trial in running:
                assert trial.process is not None  # noqa: S101 - it is running
                status = trial.process.poll()
                trial.read_new_rows()
                trial.seconds = time.monotonic() - trial.started
                if status is not None:
                    trial.exit, trial.last = status, "done"
            live.update(_table(trials))
            time.sleep(POLL_SECONDS)


def suite_command(spec: str, *options: str) -> list[str]:
    """Return the command that judges one implementation in a process of its own."""
    return [
        sys.executable, "-m", "pytest", "--pyargs", "kda_conformance.suite", "-q", "--tb=short", "-p", "no:cacheprovider",
        "--impl", spec, *options,
    ]  # fmt: skip


def shared_by(processes: int) -> tuple[str, ...]:
    """Return the options that let so many processes share the judging of one implementation."""
    # Of several processes pytest-benchmark warns, which is an error where warnings are.
    return ("-n", str(processes), "--dist", "worksteal", "--benchmark-disable") if processes > 1 else ()


def _start(trial: Trial, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = suite_command(trial.spec, "--kda-rows", str(trial.rows), *trial.order, *options)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    log: TextIO
    with trial.log.open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)  # noqa: S603 - our own command


def _table(trials: list[Trial]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("implementation", "passed", "failed", "unclaimed", "worst error / bound", "seconds", "law"):
        table.add_column(name, justify="left" if name in ("implementation", "law") else "right")
    for trial in trials:
        failed = trial.counts["fail"] + trial.counts["error"]
        table.add_row(
            trial.spec,
            str(trial.counts["pass"]),
            f"[bold red]{failed}[/]" if failed else "0",
            str(trial.counts["unclaimed"]),
            f"{trial.worst:.2f}",
            f"{trial.seconds:.0f}",
            trial.last,
        )
    return table


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return "\n".join(lines[-3:])

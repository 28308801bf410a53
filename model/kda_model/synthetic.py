"""``python -m kda_model.synthetic``: the report's synthetic tasks, KDA beside GDN and a decay without the delta rule.

Each run is a process of ``kda_model.train`` in a folder of its own, several at a time: the models are small, and one alone leaves
most of a GPU idle. A command that is given again takes up what is unfinished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path  # noqa: TC003 - typer reads annotations when it runs
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kda_model.config import MIXERS
from kda_model.training.run import ROWS
from kda_model.training.tasks import TASKS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LEARNED = 0.99


class Cell(NamedTuple):
    """One run of the comparison."""

    task: str
    length: int
    mixer: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Return where its rows go."""
        return out / f"{self.task}-{self.length}-{self.mixer}-{self.seed}"


def start(cell: Cell, out: Path, options: list[str]) -> None:
    """Train one cell to its end.

    Raises
    ------
    RuntimeError
        If the process fails; holds the end of what it printed.
    """
    command = [
        sys.executable, "-m", "kda_model.train", cell.task, "--out", str(cell.folder(out)), "--length", str(cell.length),
        "--mixer", cell.mixer, "--seed", str(cell.seed), "--no-progress", *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603 - our own module
    if done.returncode:
        message = f"{cell.folder(out).name} failed:\n{done.stderr[-2000:]}"
        raise RuntimeError(message)


def summary(cell: Cell, out: Path) -> dict[str, Any]:
    """Return what became of a cell: its last accuracy, the best, and the first logged step at which it had learned the task."""
    rows = [json.loads(line) for line in (cell.folder(out) / ROWS).read_text(encoding="utf-8").splitlines()[1:]]
    learned = next((row["step"] for row in rows if row["accuracy"] >= LEARNED), None)
    return {
        "kind": "synthetic", **cell._asdict(), "steps": rows[-1]["step"], "accuracy": rows[-1]["accuracy"],
        "best": max(row["accuracy"] for row in rows), "learned_at": learned, "seconds": rows[-1]["seconds"],
    }  # fmt: skip


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="folder of all runs; summary.jsonl holds one row of each")],
    tasks: Annotated[str, typer.Option(help="separated by commas")] = ",".join(TASKS),
    lengths: Annotated[str, typer.Option(help="tokens of a sequence, separated by commas")] = "256",
    mixers: Annotated[str, typer.Option(help="separated by commas")] = ",".join(MIXERS),
    seeds: Annotated[str, typer.Option(help="separated by commas")] = "0",
    parallel: Annotated[int, typer.Option(help="runs at a time")] = 9,
    steps: int = 4000,
    rows: Annotated[int, typer.Option(help="sequences of a step")] = 64,
    learning_rate: float = 1e-3,
    precision: str = "bfloat16",
    model: str = "synthetic",
    device: str = "",
    save_every: int = 500,
) -> None:
    """Train every combination, and tabulate accuracies."""
    cells = [
        Cell(task, int(length), mixer, int(seed))
        for task, length, mixer, seed in product(*(text.split(",") for text in (tasks, lengths, mixers, seeds)))
    ]
    options = [
        "--steps", str(steps), "--rows", str(rows), "--learning-rate", str(learning_rate), "--precision", precision, "--model", model,
        "--device", device, "--stop-at", "0.999", "--save-every", str(save_every),
    ]  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found, failures = [], []
    with Progress(*columns) as bar, ThreadPoolExecutor(parallel) as pool:
        task = bar.add_task("runs", total=len(cells))
        futures = {pool.submit(start, cell, out, options): cell for cell in cells}
        for future in as_completed(futures):
            bar.advance(task)
            error = future.exception()
            if error is None:
                found.append(summary(futures[future], out))
            else:
                failures.append(str(error))
    shown = Table(title=f"{model}, {steps} steps of {rows} sequences")
    for title in ("task", "length", "mixer", "seed", "accuracy", f"{LEARNED} at step", "s"):
        shown.add_column(title, justify="right")
    found.sort(key=lambda row: (row["task"], row["length"], row["mixer"], row["seed"]))
    for row in found:
        cells_shown = (
            row["task"],
            row["length"],
            row["mixer"],
            row["seed"],
            f"{row['accuracy']:.4f}",
            row["learned_at"],
            f"{row['seconds']:.0f}",
        )
        shown.add_row(*map(str, cells_shown))
    Console().print(shown)
    (out / "summary.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    if failures:
        raise typer.BadParameter("\n".join(failures))


if __name__ == "__main__":
    app()

"""``python -m kda_model.synthetic``: the report's synthetic tasks, KDA beside GDN and a decay without the delta rule.

As in the report, each is tried at several learning rates, and the best counts. Runs are those of ``kda_model.train``, in a folder each,
several at a time in this process. A command that is given again takes up what is unfinished.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path  # noqa: TC003 - typer reads annotations when it runs
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kda_model.config import MIXERS
from kda_model.training.recipe import Recipe
from kda_model.training.run import ROWS, Pace, Run
from kda_model.training.side_by_side import train_side_by_side
from kda_model.training.tasks import TASKS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LEARNED = 0.99


class Cell(NamedTuple):
    """One run of the comparison."""

    task: str
    length: int
    mixer: str
    learning_rate: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Return where its rows go."""
        return out / f"{self.task}-{self.length}-{self.mixer}-{self.learning_rate:g}-{self.seed}"


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
    learning_rates: Annotated[str, typer.Option(help="separated by commas, the likeliest first")] = "5e-4,1e-3,1e-4",
    seeds: Annotated[str, typer.Option(help="separated by commas")] = "0",
    parallel: Annotated[int, typer.Option(help="runs at a time")] = 9,
    steps: int = 4000,
    rows: Annotated[int, typer.Option(help="sequences of a step")] = 64,
    precision: str = "bfloat16",
    model: str = "synthetic",
    operator: Annotated[str | None, typer.Option(help="triton, torch, reference or module:callable")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one")] = "",
    graph: Annotated[bool, typer.Option(help="replay steps from a CUDA graph, on a GPU")] = True,  # noqa: FBT002 - an option
    save_every: int = 500,
    log_every: int = 10,
) -> None:
    """Train every combination, all of one seed and learning rate before the next, and tabulate accuracies."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    axes = (seeds, learning_rates, lengths, tasks, mixers)
    cells = [
        Cell(task, int(length), mixer, float(rate), int(seed))
        for seed, rate, length, task, mixer in product(*(text.split(",") for text in axes))
    ]

    def run_of(cell: Cell) -> Run:
        recipe = Recipe(
            data=cell.task, length=cell.length, rows=rows, model=model, mixer=cell.mixer, operator=operator, steps=steps,
            learning_rate=cell.learning_rate, precision=precision, seed=cell.seed, stop_at=0.999,
        )  # fmt: skip
        return Run(recipe, cell.folder(out), where, graph=graph)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failures: dict[Path, str] = {}
    with Progress(*columns) as bar:
        task = bar.add_task("runs", total=len(cells))
        for run, error in train_side_by_side(map(run_of, cells), parallel, Pace(save_every, log_every)):
            bar.advance(task)
            if error is not None:
                failures[run.folder] = f"{run.folder.name}: {error}"
    found = [summary(cell, out) for cell in sorted(cells) if cell.folder(out) not in failures]
    shown = Table(title=f"{model}, {steps} steps of {rows} sequences")
    for title in ("task", "length", "mixer", "learning rate", "seed", "accuracy", f"{LEARNED} at step", "s"):
        shown.add_column(title, justify="right")
    for row in found:
        labels = (row["task"], row["length"], row["mixer"], f"{row['learning_rate']:g}", row["seed"])
        shown.add_row(*map(str, (*labels, f"{row['accuracy']:.4f}", row["learned_at"], f"{row['seconds']:.0f}")))
    Console().print(shown)
    (out / "summary.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    if failures:
        raise typer.BadParameter("\n".join(failures.values()))


if __name__ == "__main__":
    app()

"""The command ``python -m kda_reports``: turn rows into pages, and keep their history. It never runs an implementation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kda_reports.dashboard import render_dashboard
from kda_reports.fields import RowError
from kda_reports.history_command import STORE, StoreOption, history, read_naming, refusing
from kda_reports.page import render_errors, render_mutants
from kda_reports.rows import read_rows
from kda_reports.store import Store
from kda_reports.table_command import table
from kda_reports.timing_page import render_bench
from kda_reports.timings import read_timings
from kda_reports.training import ROWS, files_of, read_training
from kda_reports.training_charts import WRONG, picture
from kda_reports.training_page import render_training
from kda_reports.training_panels import best_rates, compare
from kda_reports.trends import trends

if TYPE_CHECKING:
    from collections.abc import Callable

USAGE = 2

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


app.add_typer(history, name="history")
app.add_typer(table, name="table")


@app.callback()
def root() -> None:
    """Turn rows into pages."""


@app.command()
def errors(
    rows: Annotated[list[Path], typer.Argument(help="Rows files of conformance runs (JSONL).")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Render the error report: who obeys which law, how close to the bound, where and why not."""
    _write(lambda: render_errors(read_rows(rows), _names(rows)), out)


@app.command()
def mutants(
    rows: Annotated[list[Path], typer.Argument(help="Rows files of `kda mutants` (JSONL).")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("mutants.html"),
) -> None:
    """Render the matrix of planted bugs and laws: what catches what, and what nothing catches."""
    _write(lambda: render_mutants(read_rows(rows), _names(rows)), out)


@app.command()
def bench(
    rows: Annotated[list[Path], typer.Argument(help="Rows files of `kda bench` (JSONL).")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("bench.html"),
) -> None:
    """Render the benchmark: time against size, KDA against other operators, every timing with its spread."""
    _write(lambda: render_bench(*read_timings(rows), _names(rows)), out)


@app.command()
@refusing
def training(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Rows files of `kda_model.train` and `kda_model.throughput` (JSONL), or folders that hold such."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write; its numbers go beside it.")] = Path("training.html"),
    every: Annotated[int, typer.Option(min=1, help="Keep one of so many steps in the condensed rows.")] = 50,
    image: Annotated[Path | None, typer.Option(help="Also write the panels of wrong guesses as one SVG.")] = None,
) -> None:
    """Render training runs: accuracy and loss against steps, mixers side by side, and the shares of a step."""
    if out.suffix != ".html":
        message = f"--out must end in .html, got {str(out)!r}; the numbers beside it end in .csv and .jsonl"
        raise RowError(message)
    if overwritten := {out.with_suffix(".jsonl").resolve()} & {path.resolve() for path in files_of(runs)}:
        message = f"--out must have another name than the rows that are read, got {overwritten.pop().name!r} for both"
        raise RowError(message)
    found, throughputs = read_training(runs)
    if image is not None and not found:
        message = "--image must have training runs to draw, got rows of throughput only; leave it out"
        raise RowError(message)
    files = render_training(found, throughputs, _sources(runs), name=out.stem, every=every)
    out.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in files.items():
        out.with_suffix(ending).write_text(text, encoding="utf-8")
    if image is not None:
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_text(picture(compare(best_rates(found)[0]), WRONG), encoding="utf-8")


@app.command()
@refusing
def dashboard(
    store: StoreOption = STORE,
    days: Annotated[int, typer.Option(min=1, help="Compare with so many days before the newest commit.")] = 7,
    out: Annotated[Path, typer.Option(help="Folder for the pages.")] = Path("out/dashboard"),
) -> None:
    """Render the history: what is worse than a week ago, since which commit, and every series; print the summary."""
    rows, corrupt = read_naming(Store(store))
    files = render_dashboard(trends(rows), days, len(corrupt))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    typer.echo(files["summary.md"], nl=False)
    typer.echo(f"{len(files)} files in {out}", err=True)


def _sources(runs: list[Path]) -> list[str]:
    """Return names of rows files, with their folder where all files have one name."""
    return [str(Path(path.parent.name, path.name)) if path.name == ROWS else path.name for path in files_of(runs)]


def _names(rows: list[Path]) -> list[str]:
    return [path.name for path in rows]


def _write(render: Callable[[], str], out: Path) -> None:
    try:
        page = render()
    except RowError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USAGE) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")

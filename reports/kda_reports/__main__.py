"""The command ``python -m kda_reports``: turn rows into pages. Rendering never runs an implementation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kda_reports.page import render_errors, render_mutants
from kda_reports.rows import RowError, Run, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

USAGE = 2

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Turn rows into pages."""


@app.command()
def errors(
    rows: Annotated[list[Path], typer.Argument(help="Rows files of conformance runs (JSONL).")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Render the error report: who obeys which law, how close to the bound, where and why not."""
    _write(rows, out, render_errors)


@app.command()
def mutants(
    rows: Annotated[list[Path], typer.Argument(help="Rows files of `kda mutants` (JSONL).")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("mutants.html"),
) -> None:
    """Render the matrix of planted bugs and laws: what catches what, and what nothing catches."""
    _write(rows, out, render_mutants)


def _write(rows: list[Path], out: Path, render: Callable[[Sequence[Run], Sequence[str]], str]) -> None:
    try:
        page = render(read_rows(rows), [path.name for path in rows])
    except RowError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USAGE) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    app(prog_name="python -m kda_reports")

"""``python -m kda_reports errors ROWS... --out report.html``: render stored rows, measuring nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kda_reports.page import render_errors
from kda_reports.rows import RowError, read_runs

app = typer.Typer(help="Render reports from rows.", no_args_is_help=True, pretty_exceptions_enable=False)
BAD_INPUT = 2


@app.callback()
def reports() -> None:
    """Keep the reports apart as commands."""


@app.command()
def errors(
    rows: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Rows files.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Render the numerical error report."""
    try:
        page = render_errors(read_runs(rows))
    except RowError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(BAD_INPUT) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)


if __name__ == "__main__":
    app()

"""The command ``python -m kda_reports``: turn rows into pages. Rendering never runs an implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kda_reports.page import render_errors
from kda_reports.rows import RowError, read_rows

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
    try:
        page = render_errors(read_rows(rows), [path.name for path in rows])
    except RowError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USAGE) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    app(prog_name="python -m kda_reports")

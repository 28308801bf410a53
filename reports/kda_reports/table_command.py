"""The commands ``kda table``: results from rows, what a person says of them, and the page that shows both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kda_reports.history_command import refusing
from kda_reports.results import as_text, collect, differences, read_result, read_results, say
from kda_reports.rows import read_rows
from kda_reports.table import render_table

RESULTS = Path("conformance/results")
Results = Annotated[Path, typer.Option("--results", help="Folder of the results.")]

table = typer.Typer(help="Results of all implementations, as data and as a page.", no_args_is_help=True)


@table.command("collect")
@refusing
def collect_command(
    rows: Annotated[list[Path], typer.Argument(help="Rows files of conformance runs (JSONL).")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Write one file for each implementation and version, keeping what a person said of them."""
    paths = collect(read_rows(rows), out)
    for path in paths:
        result = read_result(path)
        typer.echo(f"{path}: {result.computed}, {len(differences([result]))} open")


@table.command("say")
@refusing
def say_command(
    file: Annotated[Path, typer.Argument(help="The file of a result.")],
    verdict: Annotated[
        str, typer.Option(help="pass: the law is at fault; fail: it is wrong; unclaimed: not promised.")
    ],
    reason: Annotated[str, typer.Option(help="Why, in a sentence.")],
    law: Annotated[str | None, typer.Option(help="The law. Default: the implementation as a whole.")] = None,
    finding: Annotated[str, typer.Option(help="The report on it; a failure needs one.")] = "",
) -> None:
    """Put down what a person says of a computed verdict."""
    file.write_text(as_text(say(read_result(file), law, verdict, reason, finding)), encoding="utf-8")


@table.command("render")
@refusing
def render_command(
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("out/table/index.html"),
) -> None:
    """Render the table from the results alone."""
    page = render_table(read_results(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")

"""The commands ``kda history``: add measurements to the store, list them, compare two commits, prune."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kda_reports.comparison import compare
from kda_reports.fields import RowError
from kda_reports.intake import take
from kda_reports.markdown import comparison_markdown
from kda_reports.store import Store, queried
from kda_reports.trends import trends

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kda_reports.measurement import Measurement
    from kda_reports.store import Corrupt

USAGE = 2
STORE = Path("out/history")
LISTED = """
select
    metric, implementation, call, dtype, device, count(distinct commit) as commits, count(*) as rows,
    arg_max(value, coalesce(commit_time, time)) as newest, any_value(unit) as unit,
    arg_max(commit, coalesce(commit_time, time)) as at, series
from history where metric like ? and implementation like ?
group by series, metric, implementation, call, dtype, device
order by metric, implementation, call, dtype, device, series
"""
NEWEST_COMMITS = """
select commit from history group by commit order by max(coalesce(commit_time, time)) desc, commit limit ?
"""

history = typer.Typer(help="Keep measurements of many commits, and compare them.", no_args_is_help=True)
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the history.")]
Pattern = Annotated[str, typer.Option(help="SQL pattern that names must match: % stands for anything.")]


def refusing(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command say what is wrong with its rows, as bad usage, instead of raising."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:  # noqa: ANN401 - whatever the command takes
        try:
            command(*arguments, **options)
        except RowError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USAGE) from error

    return wrapped


def read_naming(store: Store) -> tuple[Sequence[Measurement], Sequence[Corrupt]]:
    """Read a store and name on standard error what in it is no row."""
    contents = store.read()
    for entry in contents.corrupt:
        typer.echo(f"set aside: {entry.reason}", err=True)
    if contents.corrupt:
        typer.echo(
            f"{len(contents.corrupt)} of its lines count for nothing; `kda history prune --yes` moves them", err=True
        )
    return contents.rows, contents.corrupt


@history.command()
@refusing
def add(
    rows: Annotated[list[Path], typer.Argument(help="Rows of `kda verify`, `kda bench` or `nox -s compile` (JSONL).")],
    store: StoreOption = STORE,
) -> None:
    """Add the measurements of runs; what the history holds already is not added again."""
    # All files are read before any is added, so that a bad one leaves nothing half done.
    taken = {path: take(path) for path in rows}
    for path, found in taken.items():
        new = Store(store).add(found.rows)
        typer.echo(f"{path}: {new} rows added, {len(found.rows) - new} were there")
        for note in found.notes:
            typer.echo(f"  not kept: {note}")
    read_naming(Store(store))


@history.command("list")
@refusing
def list_command(store: StoreOption = STORE, metric: Pattern = "%", implementation: Pattern = "%") -> None:
    """List the series: what was measured alike on one machine, at how many commits, and its newest value."""
    rows, _ = read_naming(Store(store))
    table = Table(
        "metric",
        "implementation",
        "call",
        "dtype",
        "device",
        "commits",
        "rows",
        "newest",
        "unit",
        "at",
        "series",
        box=None,
    )
    with queried(rows) as database:
        for line in database.execute(LISTED, [metric, implementation]).fetchall():
            *words, value, unit, commit, series = line
            table.add_row(*map(str, words), f"{value:.6g}", unit, commit[:10], series)
    if not table.row_count:
        message = f"--metric and --implementation must match a series, got none of {len(rows)} rows; leave them out to see all"
        raise RowError(message)
    Console(width=None if Console().is_terminal else 240).print(table)


@history.command("compare")
@refusing
def compare_command(
    base: Annotated[str, typer.Argument(help="A commit of the history, or its beginning.")],
    new: Annotated[str, typer.Argument(help="Another.")],
    store: StoreOption = STORE,
) -> None:
    """Compare two commits and print the result as Markdown, fit for a comment on a pull request."""
    rows, _ = read_naming(Store(store))
    typer.echo(comparison_markdown(compare(trends(rows), rows, base, new), base, new), nl=False)


@history.command()
@refusing
def prune(
    store: StoreOption = STORE,
    before: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Remove commits made before this day (UTC).")
    ] = None,
    keep: Annotated[int, typer.Option(min=0, help="Never remove the newest commits, this many.")] = 0,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Otherwise it is only said what would be done.")] = False,
) -> None:
    """Remove old commits, and move lines that are no rows to set-aside.jsonl."""
    contents = Store(store).read()
    with queried(contents.rows) as database:
        kept = {commit for (commit,) in database.execute(NEWEST_COMMITS, [keep]).fetchall()}
    oldest = "" if before is None else before.replace(tzinfo=UTC).isoformat(timespec="seconds")

    def is_kept(row: Measurement) -> bool:
        return row.commit in kept or (row.commit_time or row.time) >= oldest

    if yes:
        removed, aside = Store(store).prune(is_kept)
        typer.echo(f"{removed} rows removed, {aside} lines set aside")
    else:
        removed = sum(not is_kept(row) for row in contents.rows)
        typer.echo(f"would remove {removed} rows and set {len(contents.corrupt)} lines aside; say --yes to do it")

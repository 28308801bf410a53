"""The command ``kda``: judge implementations, reproduce a failure, list what is installed.

Exit status: 0 all pass, 1 something fails, 2 bad usage, 5 nothing was judged.
"""

from __future__ import annotations

import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from rich.console import Console

from kda_conformance import discovery, verify
from kda_conformance.claims import UsageError
from kda_conformance.devices import interpret_triton_without_gpu
from kda_conformance.planted import matrix, null_study

FAIL, USAGE, NOTHING = 1, 2, 5

app = typer.Typer(
    help="The neutral referee for Kimi Delta Attention.", no_args_is_help=True, pretty_exceptions_enable=False
)


class Effort(StrEnum):
    """How much is run: under 2 minutes, under 10, as long as it takes; or model-sized calls, for a GPU."""

    quick = "quick"
    standard = "standard"
    exhaustive = "exhaustive"
    wide = "wide"


Implementations = Annotated[
    list[str] | None,
    typer.Option(
        "--impl",
        help="Entry point, package.module:callable or path/file.py:callable; repeatable. Default: all that are installed.",
    ),
]


@app.command("verify")
def verify_command(
    impl: Implementations = None,
    effort: Annotated[Effort, typer.Option(help="How much is run.")] = Effort.standard,
    claims: Annotated[Path | None, typer.Option(help="TOML that narrows what the implementations claim.")] = None,
    deviations: Annotated[Path | None, typer.Option(help="TOML of declared failures.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where available and claimed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for rows, logs and the report.")] = Path("out/verify"),
) -> None:
    """Judge implementations side by side and write rows.jsonl and report.html."""
    interpret_triton_without_gpu()
    console = Console()
    specs = list(impl) if impl else default_implementations()
    options = ["--effort", effort.value]
    for name, value in (("--claims", claims), ("--deviations", deviations), ("--kda-device", device)):
        if value is not None:
            options += [name, str(value)]
    statuses = verify.judge_side_by_side(specs, options, out, console)
    report = _report(out)
    for spec, status in statuses.items():
        console.print(f"{spec}: {_words(status)}")
    console.print(f"rows {out / 'rows.jsonl'}" + (f", report {report}" if report else ", no report was rendered"))
    raise typer.Exit(overall(list(statuses.values())))


@app.command()
def reproduce(
    impl: Annotated[str, typer.Option("--impl", help="The implementation.")],
    law: Annotated[str, typer.Option(help="The law that failed.")],
    dtype: Annotated[str, typer.Option(help="Input dtype.")],
    case: Annotated[
        str | None, typer.Option(help="The text of the case; not for laws that make their own calls.")
    ] = None,
    claims: Annotated[Path | None, typer.Option(help="The claims file of the run.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
) -> None:
    """Run one law on one case again, as a failure's last line says."""
    interpret_triton_without_gpu()
    # Generated calls are judged by the laws of the battery, all tensors at once.
    laws = ["training-forward-matches-reference", "gradients-match-reference"] if law.startswith("generated") else [law]
    status = int(pytest.ExitCode.OK)
    for name in laws:
        options = ["--law", name, "--dtype", dtype]
        for option, value in (("--case", case), ("--claims", claims), ("--kda-device", device)):
            if value is not None:
                options += [option, str(value)]
        status = max(status, subprocess.run(verify.suite_command(impl, *options), check=False).returncode)  # noqa: S603 - our own command
    raise typer.Exit(overall([status]))


@app.command()
def mutants(
    names: Annotated[
        list[str] | None, typer.Argument(help="Entries of the catalogue. Default: all, and the correct variants.")
    ] = None,
    effort: Annotated[Effort, typer.Option(help="How much is run.")] = Effort.standard,
    out: Annotated[Path, typer.Option(help="Folder for rows and the page.")] = Path("out/mutants"),
) -> None:
    """Judge the suite: run it over planted bugs and correct variants, and write the matrix of bugs and laws."""
    console = Console()
    try:
        entries = matrix.chosen(names or [])
    except UsageError as error:
        console.print(str(error))
        raise typer.Exit(USAGE) from error
    runs = matrix.run(entries, effort.value, out, console)
    alive, alarms = matrix.survivors(runs), matrix.false_alarms(runs)
    bugs = sum(rows[0]["planted"]["kind"] == "bug" for rows in runs)
    console.print(f"{bugs - len(alive)} of {bugs} bugs caught; survivors: {', '.join(alive) or 'none'}")
    console.print(f"{len(runs) - bugs} correct; failed: {', '.join(alarms) or 'none'}")
    page = out / "mutants.html"
    command = [sys.executable, "-m", "kda_reports", "mutants", str(out / "rows.jsonl"), "--out", str(page)]
    rendered = subprocess.run(command, check=False).returncode == 0  # noqa: S603 - our own command
    console.print(f"rows {out / 'rows.jsonl'}, {f'page {page}' if rendered else 'no page was rendered'}")
    raise typer.Exit(FAIL if alive or alarms else 0)


@app.command("null-study")
def null_study_command(
    calls: Annotated[int, typer.Option(min=1, help="Calls drawn for each correct variant.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the drawn calls; one that was never used for tuning.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for rows and the report.")] = Path("out/null"),
) -> None:
    """Judge the judge: correct variants on many drawn calls; a failure is a false alarm."""
    console = Console()
    alarms = null_study.run(calls, seed, out, console)
    report = _report(out)
    console.print(
        f"{alarms} false alarms; rows {out / 'rows.jsonl'}"
        + (f", report {report}" if report else ", no report was rendered")
    )
    raise typer.Exit(FAIL if alarms else 0)


@app.command("list")
def list_command() -> None:
    """List the implementations that are installed."""
    for name in discovery.installed_names():
        typer.echo(name)


def default_implementations() -> list[str]:
    """Return the implementations judged when none is named: those of this machine's device that can be loaded."""
    wanted = verify.DEFAULT_CUDA if torch.cuda.is_available() else verify.DEFAULT_CPU
    # A peer that is not installed is no failure; a name of ours that cannot be loaded is, and stays in the list.
    return [name for name in wanted if not name.startswith(("fla", "transformers")) or _loads(name)]


def _loads(name: str) -> bool:
    try:
        discovery.find_implementation(name)
    except UsageError:
        return False
    return True


def overall(statuses: list[int]) -> int:
    """Turn pytest's statuses into the command's: usage errors outrank failures, failures outrank empty runs."""
    if any(status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR) for status in statuses):
        return USAGE
    if any(status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) for status in statuses):
        return FAIL
    if not statuses or any(status == pytest.ExitCode.NO_TESTS_COLLECTED for status in statuses):
        return NOTHING
    return 0


def _words(status: int) -> str:
    return {0: "pass", 1: "FAIL", 4: "bad usage", 5: "nothing was judged, which is no pass"}.get(
        status, f"ended with status {status}"
    )


def _report(out: Path) -> Path | None:
    """Render the report in a process of its own: measuring and rendering are separate, and this package knows no report."""
    page = out / "report.html"
    command = [sys.executable, "-m", "kda_reports", "errors", str(out / "rows.jsonl"), "--out", str(page)]
    done = subprocess.run(command, check=False)  # noqa: S603 - our own command
    return page if done.returncode == 0 else None


def main() -> None:
    """Run the command."""
    app()

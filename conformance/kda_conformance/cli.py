"""The command ``kda``: judge implementations, time them, reproduce a failure, list what is installed.

Exit status: 0 all pass, 1 something fails, 2 bad usage, 5 nothing was judged or timed.
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
from rich.table import Table

from kda_conformance import bench, compiling, discovery, verify, workloads
from kda_conformance.claims import UsageError, narrow, read_claims
from kda_conformance.contenders import contenders, installed_operators
from kda_conformance.devices import choose_device, interpret_triton_without_gpu, num_cores
from kda_conformance.layer_contenders import installed_layers
from kda_conformance.layer_workloads import layer_catalogue
from kda_conformance.planted import matrix, null_study
from kda_conformance.planted.planting import variants
from kda_conformance.vectors.build import build
from kda_conformance.vectors.check import PUBLISHED, check

FAIL, USAGE, NOTHING = 1, 2, 5

app = typer.Typer(
    help="The neutral referee for Kimi Delta Attention.", no_args_is_help=True, pretty_exceptions_enable=False
)


vectors_app = typer.Typer(help="Test vectors: data that a port in any language can use.", no_args_is_help=True)
app.add_typer(vectors_app, name="vectors")


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


Seed = Annotated[int, typer.Option(help="Judge another draw of every call.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes that judge at a time. Default: one a core.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where a run into the same folder was stopped; keep what it judged.")
]


@app.command("verify")
def verify_command(
    impl: Implementations = None,
    effort: Annotated[Effort, typer.Option(help="How much is run.")] = Effort.standard,
    claims: Annotated[Path | None, typer.Option(help="TOML that narrows what the implementations claim.")] = None,
    deviations: Annotated[Path | None, typer.Option(help="TOML of declared failures.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where available and claimed.")] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for rows, logs and the report.")] = Path("out/verify"),
    processes: Processes = None,
) -> None:
    """Judge implementations side by side and write rows.jsonl and report.html."""
    interpret_triton_without_gpu()
    console = Console()
    specs = list(impl) if impl else default_implementations()
    options = ["--effort", effort.value, "--kda-seed", str(seed)]
    for name, value in (("--claims", claims), ("--deviations", deviations), ("--kda-device", device)):
        if value is not None:
            options += [name, str(value)]
    statuses = verify.judge_side_by_side(specs, options, out, console, processes)
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
    seed: Seed = 0,
) -> None:
    """Run one law on one case again, as a failure's last line says."""
    interpret_triton_without_gpu()
    # Generated calls are judged by the laws of the battery, all tensors at once.
    laws = ["training-forward-matches-reference", "gradients-match-reference"] if law.startswith("generated") else [law]
    status = int(pytest.ExitCode.OK)
    for name in laws:
        options = ["--law", name, "--dtype", dtype, "--kda-seed", str(seed)]
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
    *,
    effort: Annotated[Effort, typer.Option(help="How much is run.")] = Effort.standard,
    correct: Annotated[bool, typer.Option("--correct", help="Only the correct variants.")] = False,
    first_law: Annotated[
        bool,
        typer.Option("--first-law", help="Let a bug go at the first law that it breaks: caught or not, no matrix."),
    ] = False,
    seed: Seed = 0,
    processes: Processes = None,
    resume: Resume = False,
    out: Annotated[Path, typer.Option(help="Folder for rows and the page.")] = Path("out/mutants"),
) -> None:
    """Judge the suite: run it over planted bugs and correct variants, and write the matrix of bugs and laws."""
    console = Console()
    try:
        entries = matrix.chosen([*(names or []), *(variants() if correct else ())])
        plan = matrix.Plan(effort=effort.value, seed=seed, first_law=first_law, processes=processes or num_cores())
        runs = matrix.run(entries, plan, out, console, resume=resume)
    except UsageError as error:
        console.print(str(error))
        raise typer.Exit(USAGE) from error
    alive, alarms = matrix.survivors(runs), matrix.false_alarms(runs)
    bugs = sum(rows[0]["planted"]["kind"] == "bug" for rows in runs)
    console.print(f"{bugs - len(alive)} of {bugs} bugs caught; survivors: {', '.join(alive) or 'none'}")
    console.print(f"{len(runs) - bugs} correct; failed: {', '.join(alarms) or 'none'}")
    page = _render("mutants", out / "rows.jsonl", out / "mutants.html")
    console.print(f"rows {out / 'rows.jsonl'}, {f'page {page}' if page else 'no page was rendered'}")
    raise typer.Exit(FAIL if alive or alarms else 0)


@app.command("null-study")
def null_study_command(
    *,
    runs: Annotated[
        int, typer.Option(min=1, help="Correct runs of each arithmetic class with each seed, at least.")
    ] = 1000,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Of the drawn calls; one that was never used for tuning; repeatable. Default: 0."),
    ] = None,
    processes: Processes = None,
    resume: Resume = False,
    out: Annotated[Path, typer.Option(help="Folder for rows and the report.")] = Path("out/null"),
) -> None:
    """Judge the judge: correct variants on many drawn calls; a failure is a false alarm."""
    console = Console()
    margins = null_study.run(runs, seed or [0], out, console, processes=processes or num_cores(), resume=resume)
    alarms = sum(margin.alarms for margin in margins)
    table = Table("class", "runs", "false alarms", "largest score", "99.9 percentile", "median", "not judged")
    for margin in margins:
        quantiles = (f"{margin.quantile(share):.2f}" for share in (1, 0.999, 0.5))
        table.add_row(margin.precision, str(len(margin.scores)), str(margin.alarms), *quantiles, str(margin.unjudged))
    console.print(table)
    report = _report(out)
    console.print(
        f"{alarms} false alarms; rows {out / 'rows.jsonl'}"
        + (f", report {report}" if report else ", no report was rendered")
    )
    raise typer.Exit(FAIL if alarms else 0)


@app.command("bench")
def bench_command(
    impl: Implementations = None,
    other: Annotated[
        list[str] | None, typer.Option(help="Another operator to time beside them: fla-dplr, fla-gdn; repeatable.")
    ] = None,
    select: Annotated[
        list[str] | None, typer.Option(help="Shell pattern for names or labels of workloads; repeatable.")
    ] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="The workloads labelled quick: a minute.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the workloads selected and their labels.")] = False,
    rounds: Annotated[int | None, typer.Option(min=2, help="Turns of each side. Default: 30 on a GPU, 10.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where available and claimed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for rows and the page.")] = Path("out/bench"),
) -> None:
    """Time implementations side by side, each on what it is judged right on, and write rows.jsonl and bench.html."""
    interpret_triton_without_gpu()
    console = Console()
    try:
        others = other if other is not None or impl else installed_operators()
        decoders = [] if impl else default_decoders()
        sides, place = contenders(impl or default_contenders(), others or [], device, decoders)
    except UsageError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(USAGE) from error
    sides += [] if impl else installed_layers(place)
    offered: list[bench.Timed] = [*workloads.catalogue(place), *layer_catalogue(place)]
    chosen = workloads.select(offered, [*(select or []), *(["quick"] if quick else [])])
    chosen = [workload for workload in chosen if any(side.takes(workload) for side in sides)]
    if not chosen:
        console.print(f"--select must match a workload, got {select}; `kda bench --list` names them", markup=False)
        raise typer.Exit(NOTHING)
    if show:
        for workload in chosen:
            typer.echo(f"{workload.name}  [{' '.join(sorted(workload.labels))}]")
        return
    rows = bench.run(sides, chosen, place, rounds or bench.ROUNDS[place], out, console)
    console.print(bench.tables(rows))
    page = _render("bench", out / "rows.jsonl", out / "bench.html")
    console.print(f"rows {out / 'rows.jsonl'}, {f'page {page}' if page else 'no page was rendered'}")
    measured = any(row["outcome"] == "measured" for row in rows)
    raise typer.Exit(FAIL if bench.failed(rows) else 0 if measured else NOTHING)


@app.command("compile")
def compile_command(
    targets: Annotated[
        list[str] | None, typer.Argument(help="sm_90, gfx942, ... Default: sm_80, sm_90, sm_100, gfx942.")
    ] = None,
    *,
    accept: Annotated[bool, typer.Option("--accept", help="Make the result the new baseline.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for rows.")] = Path("out/compile"),
) -> None:
    """Compile the kernels for GPUs that need not be here, and compare registers, spills and the like with the baseline."""
    if not compiling.run(targets or [], out, Console()):
        raise typer.Exit(USAGE)
    raise typer.Exit(compiling.compare(out, accept=accept))


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("history", context_settings=PASSED_ON)
def history_command(context: typer.Context) -> None:
    """Keep measurements of many commits: add, list, compare, prune."""
    raise typer.Exit(_reports("history", *context.args))


@app.command("dashboard", context_settings=PASSED_ON)
def dashboard_command(context: typer.Context) -> None:
    """Render the history: what is worse than a week ago, since which commit, and every series."""
    raise typer.Exit(_reports("dashboard", *context.args))


@app.command("table", context_settings=PASSED_ON)
def table_command(context: typer.Context) -> None:
    """Keep results as data and show them: collect, say, render."""
    raise typer.Exit(_reports("table", *context.args))


@vectors_app.command("build")
def vectors_build(out: Annotated[Path, typer.Option(help="Folder for the set.")] = PUBLISHED) -> None:
    """Build the published vectors, the only way they are ever made."""
    build(out, tell=typer.echo)


@vectors_app.command("check")
def vectors_check(
    impl: Implementations = None,
    vectors: Annotated[Path, typer.Option(help="Folder of the set.")] = PUBLISHED,
    claims: Annotated[Path | None, typer.Option(help="TOML that narrows what the implementations claim.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where available and claimed.")] = None,
) -> None:
    """Judge implementations by the published vectors of the operator."""
    interpret_triton_without_gpu()
    console = Console(soft_wrap=True)
    statuses = []
    try:
        for spec in list(impl) if impl else default_implementations():
            implementation = discovery.find_implementation(spec)
            if claims is not None:
                implementation.claims = narrow(implementation.claims, read_claims(claims), str(claims))
            standing = check(implementation, vectors, choose_device(device, implementation.claims, spec))
            for line in standing.failures:
                console.print(line, markup=False, highlight=False)
            failed = len(standing.failures)
            console.print(f"{spec}: {standing.passed} passed, {failed} failed, {standing.unclaimed} unclaimed")
            empty = pytest.ExitCode.NO_TESTS_COLLECTED
            statuses.append(int(failed > 0) if failed or standing.passed else int(empty))
    except UsageError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(USAGE) from error
    raise typer.Exit(overall(statuses))


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


def default_contenders() -> list[str]:
    """Return the implementations timed when none is named."""
    if torch.cuda.is_available():
        return [name for name in ("triton-chunk", "fla-chunk") if not name.startswith("fla") or _loads(name)]
    return ["torch-chunkwise", "reference"]


def default_decoders() -> list[str]:
    """Return the implementations timed on steps of decoding when none is named."""
    if torch.cuda.is_available():
        return [name for name in ("triton-recurrent", "fla-recurrent") if not name.startswith("fla") or _loads(name)]
    return []


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
    return _render("errors", out / "rows.jsonl", out / "report.html")


def _render(page: str, rows: Path, to: Path) -> Path | None:
    """Render a page in a process of its own: measuring and rendering are separate, and this package knows no report."""
    return to if _reports(page, str(rows), "--out", str(to)) == 0 else None


def _reports(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", "kda_reports", *words], check=False).returncode  # noqa: S603 - our own command


def main() -> None:
    """Run the command."""
    app()

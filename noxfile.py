#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.5.1"]
# ///
"""The project's commands. `nox -l` lists them; each makes its own environment, and keeps it for the next time."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
# Not uv: which indexes and wheel folders a machine offers, a CPU build of torch among them, is said in pip's
# configuration. uv does not read it and would fetch several GB of CUDA libraries.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
ROWS = ROOT / "out" / "verify" / "rows.jsonl"
BENCHMARK = ROOT / "out" / "bench" / "benchmark.json"


def install(session: nox.Session, *requirements: str, group: str | None = None) -> None:
    """Install requirements and a dependency group, at the versions that CI uses."""
    from_group = nox.project.dependency_groups(GROUPS, group) if group else ()
    session.install("--constraint", str(ROOT / "constraints.txt"), *requirements, *from_group)


def measure(session: nox.Session) -> None:
    """Set up what a session needs that runs the operator: one thread a process, since two processes share two cores."""
    install(session, "--editable", ".[fast,peers,reports]", group="test")
    session.env["OMP_NUM_THREADS"] = "1"


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests of all packages."""
    measure(session)
    session.run("pytest", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy, strictly."""
    install(session, "--editable", ".[fast,peers,reports]", group="types")
    session.run("mypy", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and spelling."""
    install(session, group="lint")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def verify(session: nox.Session) -> None:
    """Judge several implementations side by side and write the error report: the main job."""
    measure(session)
    session.run("kda", "verify", *session.posargs)


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Judge the suite: run it over planted bugs and correct variants, and write the matrix of bugs and laws."""
    measure(session)
    session.run("kda", "mutants", *session.posargs)


@nox.session(default=False)
def conformance(session: nox.Session) -> None:
    """Judge one implementation in the reader's terminal: nox -s conformance -- --impl NAME."""
    measure(session)
    session.run("pytest", "--pyargs", "kda_conformance.suite", *session.posargs)


@nox.session(default=False)
def errors_report(session: nox.Session) -> None:
    """Render the error report again from the rows of the last verify."""
    measure(session)
    rows = session.posargs or [str(ROWS), "--out", str(ROWS.with_name("report.html"))]
    session.run("python", "-m", "kda_reports", "errors", *rows)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, check what is in it, and judge an implementation with it from another folder."""
    install(session, group="lint")
    install(session, group="test")
    suite = ("pytest", "--pyargs", "kda_conformance.suite", "--impl", "torch-chunkwise", "--effort", "quick", "-q")
    # Outside the checkout, where neither its folders nor its pytest settings are found.
    with tempfile.TemporaryDirectory() as elsewhere:
        session.run("python", "-m", "build", "--outdir", elsewhere, str(ROOT), silent=True)
        (built,) = Path(elsewhere).glob("*.whl")
        session.run("check-wheel-contents", "--config", str(ROOT / "pyproject.toml"), str(built))
        install(session, str(built))
        session.install("--force-reinstall", "--no-deps", str(built))
        with session.chdir(elsewhere):
            session.run(*suite, env={"OMP_NUM_THREADS": "1"})


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Judge every implementation on the machine's GPU: nox -s gpu -- --effort exhaustive."""
    # A machine with a GPU brings its torch and Triton, which the constraints would replace.
    session.install("--editable", ".[fast,peers,reports]", "fla-core>=0.6")
    session.run("kda", "verify", "--device", "cuda", *session.posargs)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Open the pages of all reports in the machine's Chromium; nox -s browser -- --screenshots makes the documents' pictures anew."""
    install(session, "--editable", ".[reports]", *nox.project.dependency_groups(GROUPS, "browser"), group="test")
    if session.posargs[:1] == ["--screenshots"]:
        session.run("python", "reports/tests/screenshots.py", *session.posargs[1:])
    else:
        session.run("pytest", "reports/tests/test_reports_browser.py", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Time implementations side by side, each judged first: nox -s bench -- --quick; tiny sizes where there is no GPU."""
    if shutil.which("nvidia-smi"):
        session.install("--editable", ".[fast,peers,reports]", "fla-core>=0.6")
    else:
        measure(session)
        BENCHMARK.parent.mkdir(parents=True, exist_ok=True)
        suite = ("pytest", "--pyargs", "kda_conformance.benchmarks", "--impl", "torch-chunkwise")
        session.run(*suite, f"--benchmark-json={BENCHMARK}", "--benchmark-max-time=0.5")
    session.run("kda", "bench", *session.posargs)


@nox.session(default=False)
@nox.parametrize(
    "triton", ["3.6.0", "3.7.1", "3.8.0", "3.9.0"], ids=["triton-3.6.0", "triton-3.7.1", "triton-3.8.0", "triton-3.9.0"]
)
def compile(session: nox.Session, triton: str) -> None:  # noqa: A001 - the name of the session
    """Compile every kernel for GPUs that are not here and compare with the baseline: nox -s "compile(triton-3.7.1)" -- --accept."""
    measure(session)
    session.install(f"triton=={triton}")
    session.run("kda", "compile", "--out", f"out/compile-{triton}", *session.posargs)


@nox.session(default=False)
def bound_study(session: nox.Session) -> None:
    """Compare certified bounds with true errors on many drawn calls: nox -s bound_study -- --cases 3000, or --full-size."""
    measure(session)
    session.run("python", "reference/tests/bound_study.py", *session.posargs)


@nox.session(default=False)
def property_deep(session: nox.Session) -> None:
    """Search long, with new seeds, for a generated call that breaks a law: nox -s property_deep -- --impl NAME."""
    measure(session)
    law = ("--law", "generated-calls-match-reference", "--effort", "exhaustive", "--hypothesis-show-statistics")
    session.run("pytest", "--pyargs", "kda_conformance.suite", *law, *(session.posargs or ("--impl", "triton-chunk")))


if __name__ == "__main__":
    nox.main()

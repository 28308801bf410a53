"""What the documents say is there: commands, sessions, files, links, implementations, numbers."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from kda_conformance import judge
from kda_conformance.cli import app
from kda_conformance.planted.planting import catalogue, variants
from kda_reports.command import app as reports_app
from kda_reports.glossary import GLOSSARY
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


PASSED_ON = ("history", "dashboard", "table")


def short(path: Path) -> str:
    """Return a file's path inside the project."""
    return path.relative_to(ROOT).as_posix()


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    """Return the lines of the shell blocks of a document."""
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]


def sessions() -> set[str]:
    """Return the names of the nox sessions."""
    functions = [node for node in ast.parse(read("noxfile.py")).body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if any("nox.session" in ast.unparse(mark) for mark in node.decorator_list)}


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = [line for line in shell_lines(read("README.md")) if "nox -s tests" in line]
    assert len(commands) == 1
    assert read(".ci/run").splitlines()[-1] == commands[0]


def test_the_readme_has_the_main_job_in_one_line_that_sets_itself_up() -> None:
    (line,) = [line for line in shell_lines(read("README.md")) if line.endswith("nox -s verify")]
    assert line.startswith("python3 -m venv ")
    assert "-c constraints.txt" in line


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted((ROOT / ".github/workflows").glob("*.yml"))], ids=short)
def test_sessions_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = {name for names in re.findall(r"nox -s ((?:[a-z_]+ ?)+)", text) for name in names.split()}
    named |= {name for names in re.findall(r"session: \[([^\]]*)\]", text) for name in names.split(", ")}
    assert named <= sessions()


def test_every_default_session_runs_in_ci() -> None:
    default = set()
    for node in ast.parse(read("noxfile.py")).body:
        if isinstance(node, ast.FunctionDef) and any(
            ast.unparse(mark) == "nox.session" for mark in node.decorator_list
        ):
            default.add(node.name)
    (matrix,) = re.findall(r"session: \[([^\]]*)\]", read(".github/workflows/ci.yml"))
    assert default == set(matrix.split(", "))


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_files_that_are_named_exist(path: Path) -> None:
    named = re.findall(
        r"`((?:reference|optimized|model|conformance|reports|docs|\.ci|\.github)/[\w./]*)`", path.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_options_of_kda_that_are_named_exist(path: Path) -> None:
    groups = [typer.main.get_command(found) for found in (app, reports_app)]
    for line in shell_lines(path.read_text(encoding="utf-8")):
        words = shlex.split(line)
        if words[0] == "kda":
            # What is passed on has its options where it is passed to.
            command = (groups[1] if words[1] in PASSED_ON else groups[0]).commands[words[1]]  # type: ignore[attr-defined]
            command = getattr(command, "commands", {words[2]: command})[words[2]] if len(words) > 2 else command
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known


def test_the_reproduction_that_is_shown_runs() -> None:
    (line,) = [line for line in shell_lines(read("docs/adopting.md")) if line.startswith("kda reproduce")]
    done = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_readme_lists_the_implementations_that_are_registered() -> None:
    registered = set(PYPROJECT["project"]["entry-points"]["kda.implementations"]) - {"reference"}
    listed = {
        name
        for cell in re.findall(r"^\| (`[^|]+`) \|", read("README.md"), re.MULTILINE)
        for name in re.findall("`([^`]+)`", cell)
    }
    assert listed == registered


def test_the_readme_counts_the_planted_bugs_and_the_correct_variants() -> None:
    (counts,) = re.findall(r"over (\d+) planted bugs and (\d+) correct implementations", read("README.md"))
    bugs = [entry for entry in catalogue().values() if entry.equivalent is None]
    assert tuple(map(int, counts)) == (len(bugs), len(variants()))


def test_every_key_of_the_bibliography_that_is_cited_is_there() -> None:
    cited = set()
    for folder in ("reference", "optimized", "model", "conformance"):
        for path in (ROOT / folder).rglob("*.py"):
            cited |= set(re.findall(r"\[([A-Z]+) (?:eqs?|figs?|section|table)\b", path.read_text(encoding="utf-8")))
    entries = set(re.findall(r"^- \*\*\[(\w+)\]\*\*", read("docs/bibliography.md"), re.MULTILINE))
    assert {"KL"} <= cited <= entries


def test_the_glossary_is_that_of_the_reports() -> None:
    entries = "".join(f"**{word}**: {meaning}\n\n" for word, meaning in GLOSSARY.items())
    assert read("docs/glossary.md").endswith(entries.rstrip("\n") + "\n")


def test_the_limits_in_the_glossary_are_those_of_the_judge() -> None:
    limits = f"(limit {judge.Z_LIMIT:g} deviations)", f"limit {judge.SLICE_LIMIT:g})", f"(limit {judge.GAIN_LIMIT:g})"
    assert all(limit in GLOSSARY["score"] for limit in limits)


def test_ci_installs_pinned_versions_that_the_package_allows() -> None:
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    pinned = {name: Version(version) for name, version in (line.split("==") for line in lines)}
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    project, groups = PYPROJECT["project"], PYPROJECT["dependency-groups"]
    wanted = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    wanted += [entry for group in groups.values() for entry in group if isinstance(entry, str)]
    for requirement in map(Requirement, wanted):
        assert pinned[requirement.name] in requirement.specifier, requirement

"""The rules of ``docs/architecture.md`` hold: five packages, imports in one direction, nothing that has no place."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FOLDERS = ("reference", "optimized", "model", "conformance", "reports")
PACKAGES = tuple(f"kda_{folder}" for folder in FOLDERS)
LONGEST_MODULE = 500
CONTRACT = ("kda_reference.contract", "kda_reference.errors")
SEAM = ROOT / "model/kda_model/operators.py"


def sources() -> list[Path]:
    """Return every Python file of the project."""
    folders = [ROOT / folder for folder in (*FOLDERS, "docs")]
    return [ROOT / "noxfile.py", *(path for folder in folders for path in sorted(folder.rglob("*.py")))]


def imported_modules(path: Path) -> Iterator[str]:
    """Yield what a file imports, wherever in it, as ``package.module`` or ``package.module.name``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed_imports() -> dict[str, set[str]]:
    """Read the table of the page: package to the packages of ours that it may import."""
    rows = re.findall(
        r"^\| `\w+/` \| `(\w+)` \|.*\| ([^|]+) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
    return {package: set(re.findall(r"`(kda_\w+)`", cell)) for package, cell in rows}


def folder_of(package: str) -> Path:
    return ROOT / package.removeprefix("kda_") / package


def test_the_page_lists_the_five_packages() -> None:
    assert tuple(allowed_imports()) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_row_names(package: str) -> None:
    allowed = allowed_imports()[package] | {package}
    for path in folder_of(package).rglob("*.py"):
        ours = {name.partition(".")[0] for name in imported_modules(path)} & set(PACKAGES)
        assert ours <= allowed, f"{path.relative_to(ROOT)} must not import {sorted(ours - allowed)}"


@pytest.mark.parametrize("package", ["kda_optimized", "kda_model"])
def test_subjects_take_only_the_contract_from_the_reference(package: str) -> None:
    # The model's one seam offers the reference's recurrence and chunkwise form as operators beside others.
    public = {
        node.name
        for module in CONTRACT
        for node in ast.parse((folder_of("kda_reference") / f"{module.rpartition('.')[2]}.py").read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }
    for path in folder_of(package).rglob("*.py"):
        for name in imported_modules(path) if path != SEAM else ():
            if name.startswith("kda_reference"):
                module, _, symbol = name.rpartition(".")
                assert module in CONTRACT or (module == "kda_reference" and symbol in public), f"{path} imports {name}"


def test_the_wheel_holds_the_five_packages_and_no_sixth() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    wheel = settings["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == [f"{folder}/kda_{folder}" for folder in FOLDERS]
    assert wheel["sources"] == settings["hatch"]["build"]["dev-mode-dirs"] == list(FOLDERS)
    assert settings["check-wheel-contents"]["toplevel"] == list(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_typed_and_says_what_it_is(package: str) -> None:
    assert (folder_of(package) / "py.typed").is_file()
    assert ast.get_docstring(ast.parse((folder_of(package) / "__init__.py").read_text(encoding="utf-8")))


def test_a_folder_holds_one_package_and_its_tests() -> None:
    for folder in FOLDERS:
        packages = {path.parent.relative_to(ROOT / folder).parts[0] for path in (ROOT / folder).rglob("*.py")}
        assert packages <= {f"kda_{folder}", "tests"}, folder


def test_files_in_tests_folders_have_unique_names() -> None:
    # Tests folders are no packages, so two files of one name would be one module to pytest and to mypy.
    names = Counter(path.name for path in sources() if path.parent.name == "tests")
    assert [name for name, number in names.items() if number > 1] == []
    assert "__init__.py" not in names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_one_idea_in_ascii(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert text.count("\n") < LONGEST_MODULE
    assert path.stem not in ("utils", "helpers", "misc", "common")

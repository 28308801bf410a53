"""``kda compile``: what the compiler says becomes rows of one run that the history takes in; a compiler that breaks off is no result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from kda_conformance import compiling
from kda_conformance.cli import app
from kda_reports.intake import take
from rich.console import Console
from typer.testing import CliRunner

if TYPE_CHECKING:
    from pathlib import Path

COMPILER = """
import json, os, sys
assert os.environ["TRITON_INTERPRET"] == "0"
for target in sys.argv[1:] or ["sm_80", "sm_90"]:
    for launch in range(2):
        print(json.dumps({"target": target, "triton": "3.7.1", "dtype": "bfloat16", "shape": {"K": 64, "V": 64}, "pass": "forward",
            "kernel": "kda_kernel", "launch": launch, "outcome": "compiled", "message": "", "num_warps": 4, "num_stages": 1,
            "shared_bytes": 0, "registers": 64, "spilled_bytes": 0, "spill_instructions": 0, "code_bytes": 512,
            "matrix_instructions": {"HMMA": 4}}))
    if target == "broken":
        sys.exit(3)
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a compiler in the place of the real one, which takes minutes."""
    package = tmp_path / "kda_optimized"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "compiled.py").write_text(COMPILER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("compiler")
def test_rows_are_of_one_run_and_closed(tmp_path: Path) -> None:
    assert compiling.run([], tmp_path / "out", Console()) == 4
    *rows, finish = rows_of(tmp_path / "out")
    assert [(row["kind"], row["target"]) for row in rows] == [("compile", "sm_80")] * 2 + [("compile", "sm_90")] * 2
    assert {row["run"] for row in rows} == {finish["run"]}
    assert (finish["kind"], finish["exit"], finish["counts"]) == ("finish", "pass", {"compiled": 4, "error": 0})


@pytest.mark.usefixtures("compiler")
def test_the_history_takes_the_rows_in(tmp_path: Path) -> None:
    compiling.run(["sm_90"], tmp_path / "out", Console())
    found = take(tmp_path / "out" / "rows.jsonl")
    assert {row.metric: row.value for row in found.rows if row.call == "launch 1"}["registers"] == 64
    assert len({row.series for row in found.rows}) == len(found.rows) == 10


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_breaks_off_is_no_result(tmp_path: Path) -> None:
    assert compiling.run(["broken"], tmp_path / "out", Console()) == 0
    assert rows_of(tmp_path / "out")[-1]["exit"] == "usage"
    result = CliRunner().invoke(app, ["compile", "broken", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2


def test_a_target_that_is_none_is_bad_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compile", "sm90", "--out", str(tmp_path)])
    assert result.exit_code == 2

"""The command: rows in, page out; wrong rows are bad usage and leave no page behind."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from kda_reports.command import app
from synthetic_rows import GOLDEN, closed, lines, verdict_row
from typer.testing import CliRunner

if TYPE_CHECKING:
    from pathlib import Path


def test_the_command_writes_the_golden_page(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    done = subprocess.run(
        [sys.executable, "-m", "kda_reports", "errors", str(GOLDEN / "rows.jsonl"), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_bytes() == (GOLDEN / "errors.html").read_bytes()


def test_several_rows_files_make_one_page(tmp_path: Path) -> None:
    paths = []
    for name in ("first", "second"):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text(lines(closed(name, [verdict_row(name, "one")])), encoding="utf-8")
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["errors", *map(str, paths), "--out", str(out)])
    assert result.exit_code == 0
    page = out.read_text(encoding="utf-8")
    assert "All 2 implementations obey every law judged." in page
    assert "first.jsonl, second.jsonl" in page


def test_an_empty_rows_file_is_an_error_and_no_page(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "report.html"
    rows.touch()
    result = CliRunner().invoke(app, ["errors", str(rows), "--out", str(out)])
    assert result.exit_code == 2
    assert "nothing run is no pass" in result.stderr
    assert not out.exists()


def test_a_torn_row_is_named_by_its_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(lines(closed("a", [])) + '{"kind": "ver', encoding="utf-8")
    result = CliRunner().invoke(app, ["errors", str(rows), "--out", str(tmp_path / "report.html")])
    assert result.exit_code == 2
    assert "rows.jsonl line 3" in result.stderr


def test_without_the_extra_the_command_says_what_to_install() -> None:
    program = "import runpy, sys; sys.modules['duckdb'] = None; runpy.run_module('kda_reports', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: reports must have duckdb installed; run pip install 'kda-suite[reports]'\n"

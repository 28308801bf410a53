"""The command ``kda``: what it leaves behind, and what its exit status says."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from kda_conformance.verify import suite_command

if TYPE_CHECKING:
    from pathlib import Path

BAD_USAGE = 2
BROKEN = """
def crashes(*operands, **options):
    raise RuntimeError("no kernel for this device")
crashes.precision = "fp32"
"""


def kda(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kda_conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_implementation_that_cannot_be_loaded_is_in_the_rows_and_the_report(tmp_path: Path) -> None:
    done = kda("verify", "--impl", "no-such-implementation", "--effort", "quick", "--out", str(tmp_path))
    assert done.returncode == BAD_USAGE, done.stdout
    kinds = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in kinds] == ["run", "verdict", "finish"]
    assert (kinds[1]["outcome"], kinds[2]["exit"]) == ("error", "usage")
    assert "no-such-implementation" in kinds[1]["message"]
    assert "no-such-implementation" in (tmp_path / "report.html").read_text()


def test_a_law_that_makes_its_own_calls_is_reproduced_by_its_row(tmp_path: Path) -> None:
    path, rows = tmp_path / "candidate.py", tmp_path / "rows.jsonl"
    path.write_text(BROKEN)
    law = "exact-arithmetic-oracle"
    command = suite_command(f"{path}:crashes", "--law", law, "--effort", "quick", "--kda-rows", str(rows))
    subprocess.run(command, capture_output=True, check=False)
    verdict = next(row for row in map(json.loads, rows.read_text().splitlines()) if row["kind"] == "verdict")
    assert verdict["outcome"] == "fail"
    assert verdict["reproduction"] == f"kda reproduce --impl {path}:crashes --law {law} --dtype float32"
    done = kda(*verdict["reproduction"].split()[1:])
    assert done.returncode == 1, done.stdout
    assert "no kernel for this device" in done.stdout


def test_rows_are_written_once_whatever_the_number_of_processes(tmp_path: Path) -> None:
    path, rows = tmp_path / "candidate.py", tmp_path / "rows.jsonl"
    path.write_text(BROKEN)
    options = ("--law", "exact-arithmetic-oracle", "--effort", "quick", "--kda-rows", str(rows), "-n", "2")
    subprocess.run(suite_command(f"{path}:crashes", *options), capture_output=True, check=False)
    kinds = [json.loads(line)["kind"] for line in rows.read_text().splitlines()]
    assert kinds == ["run", "verdict", "finish"]


def test_backwards_judges_the_same_calls_from_the_last_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "candidate.py"
    path.write_text(BROKEN)
    command = suite_command(f"{path}:crashes", "--law", "prefix-causality", "--effort", "quick", "--collect-only")
    one, two = (
        [
            line
            for line in subprocess.run(run, capture_output=True, text=True, check=False).stdout.splitlines()
            if "::" in line
        ]
        for run in (command, [*command, "--kda-backwards"])
    )
    assert len(one) > 1
    assert two == one[::-1]


def test_the_suite_needs_nothing_that_only_reports_do() -> None:
    only = ("altair", "duckdb", "jinja2", "ruptures", "scipy", "vl_convert", "kda_reports")
    # Numba, where it is installed, imports SciPy if it can: what counts is that nothing here has to be there.
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({only})); import kda_conformance.cli, kda_conformance.plugin"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

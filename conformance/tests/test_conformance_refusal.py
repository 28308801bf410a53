"""The budget refuses to judge with a truth that it cannot trust."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from kda_conformance.arithmetic import CLASSES
from kda_conformance.budget import compute_budget
from kda_conformance.cases import Case
from kda_conformance.cli import FAIL, overall
from kda_conformance.verify import judge_side_by_side
from kda_reference import CertificateError
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

# A correct implementation, in a process where no truth is certain enough to judge it.
UNJUDGED = """
import math
import kda_conformance.budget
import torch
from kda_reference import chunkwise_kda

kda_conformance.budget.FINER = math.inf

def candidate(*operands, **options):
    return chunkwise_kda(*operands, dtype=torch.float32, **options)
candidate.precision = "fp32"
"""


@pytest.mark.parametrize("arithmetic", ["fp32", "fp64"])
def test_a_truth_whose_bound_explodes_is_refused(arithmetic: str) -> None:
    dtype = CLASSES[arithmetic].input_dtype
    inputs = Case.parse("T=16 K=8 V=6 gate=zero keys=same strengths=one").inputs(dtype)
    compute_budget(inputs, None, None, CLASSES[arithmetic])
    # A key eight times too long stretches what the next, of unit length, erases. No norm can know that it is erased.
    length = torch.where(torch.arange(16) % 2 == 0, 8.0, 1.0).to(dtype)
    stretched = inputs.replace(k=inputs.k * length[:, None, None])
    with pytest.raises(
        CertificateError, match=r"of the reference must be certified within .* got the bound .* at index"
    ):
        compute_budget(stretched, None, None, CLASSES[arithmetic])


@pytest.mark.parametrize("factor", [1.0, 2.0**-40])
def test_a_state_that_decays_to_nothing_is_judged(factor: float) -> None:
    case = Case.parse("T=300 K=60 V=20 gate=uniform gate_form=log_decay cotangent=state seed=93")
    inputs = case.inputs(torch.float32)
    _, dfinal_state = case.cotangents(inputs)
    assert dfinal_state is not None
    budget = compute_budget(inputs, None, dfinal_state * factor, CLASSES["fp32"])["dinitial_state"]
    assert budget.value.abs().max() < 1e-100
    # Far below one float32 rounding of the cotangent.
    assert budget.variance.max().sqrt() < 1e-6 * 2.0**-24 * factor * dfinal_state.abs().max()


def test_a_refused_truth_ends_the_law_as_an_error_and_is_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path / "budgets"))
    path = tmp_path / "candidate.py"
    path.write_text(UNJUDGED)
    law, case = "forward-matches-reference", "T=5 K=8 V=8"
    options = ["--effort", "quick", "--law", law, "--case", case]
    statuses = judge_side_by_side([f"{path}:candidate"], options, tmp_path, Console(quiet=True))
    assert overall(list(statuses.values())) == FAIL
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["run", "verdict", "finish"]
    assert (rows[1]["law"], rows[1]["outcome"]) == (law, "error")
    assert "must be certified within" in rows[1]["message"]
    assert (rows[2]["exit"], rows[2]["counts"]["error"], rows[2]["counts"]["pass"]) == ("fail", 1, 0)
    page = tmp_path / "report.html"
    subprocess.run([sys.executable, "-m", "kda_reports", "errors", tmp_path / "rows.jsonl", "--out", page], check=True)
    assert f"Breaks no law. 1 law ended in an error, which is no verdict: {law}." in page.read_text()

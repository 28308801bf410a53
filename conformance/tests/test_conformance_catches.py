"""The suite itself: it fails what is wrong in one place, passes what is right, and never calls an empty run a pass."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

IMPLEMENTATION = """
from kda_reference import chunkwise_kda
import torch

def right(*operands, **options):
    return chunkwise_kda(*operands, dtype=torch.float32, **options)

def one_channel_of_one_token(*operands, **options):
    o, state = right(*operands, **options)
    if o.shape[1] > 40:
        o = o.clone()
        o[:, 37, -1, 3] *= 1.0005
    return o, state

def state_of_another_sequence(*operands, **options):
    o, state = right(*operands, **options)
    return o, None if state is None else state.roll(1, 0)

def future_leaks(q, k, v, g, beta, **options):
    o, state = right(q, k, v, g, beta, **options)
    return o + 1e-5 * v.mean(), state

def gradient_of_beta_lost(q, k, v, g, beta, **options):
    return right(q, k, v, g, beta.detach() + 0 * beta, **options)

def checks_nothing(q, k, v, g, beta, initial_state=None, cu_seqlens=None, lower_bound=None, allow_neg_eigval=False,
                   use_beta_sigmoid_in_kernel=False, **options):
    if lower_bound is not None:
        lower_bound = -1.0
    if initial_state is not None:
        initial_state = initial_state.float()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.clamp(max=q.shape[1]).cummax(0).values
        cu_seqlens[0], cu_seqlens[-1] = 0, q.shape[1]
    return right(q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens, lower_bound=lower_bound,
                 allow_neg_eigval=allow_neg_eigval and use_beta_sigmoid_in_kernel,
                 use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, **options)

def checks_the_bound(*operands, lower_bound=None, **options):
    assert lower_bound is None or -5 <= lower_bound < 0
    return checks_nothing(*operands, lower_bound=lower_bound, **options)

for function in (
    checks_nothing, checks_the_bound, right, one_channel_of_one_token, state_of_another_sequence, future_leaks, gradient_of_beta_lost,
):
    function.precision = "fp32"
not_callable = 3
"""


@pytest.fixture
def implementation(tmp_path: Path) -> Path:
    path = tmp_path / "candidate.py"
    path.write_text(IMPLEMENTATION)
    return path


def run_suite(*options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--pyargs",
        "kda_conformance.suite",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("one_channel_of_one_token", "forward-matches-reference"),
        ("state_of_another_sequence", "packed-equals-separate"),
        ("future_leaks", "prefix-causality"),
        ("gradient_of_beta_lost", "gradients-match-reference"),
    ],
)
def test_a_planted_bug_breaks_the_law_that_names_it(implementation: Path, name: str, law: str) -> None:
    done = run_suite("--impl", f"{implementation}:{name}", "--effort", "quick", "--law", law)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "kda reproduce --impl" in done.stdout
    if name == "one_channel_of_one_token":
        assert "t=37, g=" in done.stdout


def test_the_unchanged_implementation_passes_and_leaves_complete_rows(implementation: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    done = run_suite(
        "--impl",
        f"{implementation}:right",
        "--effort",
        "quick",
        "--law",
        "forward-matches-reference",
        "--kda-rows",
        str(rows),
    )
    assert done.returncode == pytest.ExitCode.OK, done.stdout
    kinds = [json.loads(line)["kind"] for line in rows.read_text().splitlines()]
    assert kinds[0] == "run"
    assert kinds[-1] == "finish"
    assert kinds.count("verdict") == kinds.count("measure")


def test_refusals_are_demanded_of_who_refuses_anything_and_recorded_of_who_refuses_nothing(
    implementation: Path, tmp_path: Path
) -> None:
    outcomes = {}
    for name in ("checks_nothing", "checks_the_bound"):
        rows = tmp_path / f"{name}.jsonl"
        run_suite("--impl", f"{implementation}:{name}", "--law", "wrong-arguments-are-refused", "--kda-rows", str(rows))
        outcomes[name] = {row["outcome"] for row in map(json.loads, rows.read_text().splitlines()) if "outcome" in row}
    assert outcomes == {"checks_nothing": {"pass", "may"}, "checks_the_bound": {"pass", "fail"}}


def test_a_run_that_judges_nothing_is_no_pass(implementation: Path, tmp_path: Path) -> None:
    claims, rows = tmp_path / "claims.toml", tmp_path / "rows.jsonl"
    claims.write_text("backward = false\n")
    options = (
        "--effort",
        "quick",
        "--law",
        "gradients-match-reference",
        "--claims",
        str(claims),
        "--kda-rows",
        str(rows),
    )
    done = run_suite("--impl", f"{implementation}:right", *options)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
    assert json.loads(rows.read_text().splitlines()[-1])["exit"] == "nothing"


@pytest.mark.parametrize("spec", ["no-such-name", "no.such.module:f", "{file}:missing", "{file}:not_callable"])
def test_a_wrong_name_is_bad_usage(implementation: Path, spec: str) -> None:
    done = run_suite("--impl", spec.format(file=implementation))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--impl" in done.stdout + done.stderr


def test_a_declared_deviation_is_expected_and_a_stale_one_is_bad_usage(implementation: Path, tmp_path: Path) -> None:
    deviations = tmp_path / "deviations.toml"
    deviations.write_text(
        '[[deviation]]\ntest = "test_causality.py::test_later*"\nreason = "adds the mean"\nissue = "#1"\n'
    )
    rows = tmp_path / "rows.jsonl"
    options = (
        "--impl",
        f"{implementation}:future_leaks",
        "--effort",
        "quick",
        "--deviations",
        str(deviations),
        "--kda-rows",
        str(rows),
    )
    done = run_suite(*options, "--law", "prefix-causality")
    assert done.returncode == pytest.ExitCode.OK, done.stdout
    assert "xfailed" in done.stdout
    declared = [row for row in map(json.loads, rows.read_text().splitlines()) if row.get("outcome") == "xfail"]
    assert {row["reason"] for row in declared} == {"adds the mean (#1)"}
    fixed = run_suite("--impl", f"{implementation}:right", *options[2:], "--law", "prefix-causality")
    assert fixed.returncode == pytest.ExitCode.TESTS_FAILED, fixed.stdout
    assert "delete its entry" in fixed.stdout
    deviations.write_text('[[deviation]]\ntest = "test_gone.py::*"\nreason = "none"\nissue = "#2"\n')
    assert run_suite(*options).returncode == pytest.ExitCode.USAGE_ERROR

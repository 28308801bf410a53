"""The compile baseline: a new spill, a lost matrix instruction or a lost kernel fails and says how to accept it; the rest is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from kda_optimized.compile_baseline import ACCEPT, BASELINES, differences, main, read, regressions

if TYPE_CHECKING:
    from pathlib import Path


def row(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "compile", "target": "sm_90", "triton": "3.7.1", "dtype": "bfloat16", "shape": {"K": 128, "V": 128}, "pass": "forward",
        "kernel": "kda_kernel", "launch": 0, "outcome": "compiled", "message": "", "num_warps": 4, "num_stages": 2, "registers": 128,
        "spilled_bytes": 0, "spill_instructions": 0, "shared_bytes": 1024, "code_bytes": 4096,
        "matrix_instructions": {"HGMMA.64x64x16.F32.BF16": 4, "HMMA.16816.F32.BF16": 8},
    } | changes  # fmt: skip


def run(folder: Path, rows: list[dict[str, Any]], *options: str) -> int:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*rows, {"kind": "finish"}]))
    return main([str(path), "--baselines", str(folder / "baselines"), *options])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spilled_bytes": 48}, "must spill at most 0 bytes, got 48 (registers 128 to 128)"),
        (
            {"matrix_instructions": {"HMMA.16816.F32.BF16": 8}},
            "must keep its matrix instructions HGMMA.64x64x16.F32.BF16, got 8 HMMA.16816.F32.BF16",
        ),
        ({"matrix_instructions": {}}, "got none"),
        ({"outcome": "error", "message": "OutOfResources"}, "must still compile, got OutOfResources"),
        ({"launch": 1}, "must have an accepted row, got none"),
    ],
)
def test_a_regression_fails_and_says_what_and_how_to_accept_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], sentence: str
) -> None:
    assert run(tmp_path, [row()], "--accept") == 0
    assert run(tmp_path, [row(**changes)]) == 1
    told = capsys.readouterr().err
    assert "REGRESSION kda_kernel launch" in told
    assert "(forward, bfloat16 K=128 V=128, sm_90)" in told
    assert sentence in told
    assert ACCEPT in told
    assert run(tmp_path, [row(**changes)], "--accept") == 0
    assert run(tmp_path, [row(**changes)]) == 0


def test_a_kernel_that_is_no_longer_launched_is_missed(tmp_path: Path) -> None:
    assert run(tmp_path, [row(), row(launch=1)], "--accept") == 0
    assert run(tmp_path, [row()]) == 1


def test_what_got_better_or_larger_is_told_and_fails_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [row(spilled_bytes=48)], "--accept")
    kinds = {"HGMMA.64x64x16.F32.BF16": 2, "HMMA.16816.F32.BF16": 8}
    assert run(tmp_path, [row(registers=168, code_bytes=9000, matrix_instructions=kinds)]) == 0
    told = capsys.readouterr().out
    assert "registers 128 to 168; spilled_bytes 48 to 0; code_bytes 4096 to 9000; 4 HGMMA" in told


def test_a_run_of_one_target_misses_and_replaces_no_other(tmp_path: Path) -> None:
    run(tmp_path, [row(), row(target="sm_80")], "--accept")
    assert run(tmp_path, [row(target="sm_80")]) == 0
    run(tmp_path, [row(target="sm_80", registers=64)], "--accept")
    kept = read(tmp_path / "baselines" / "triton-3.7.1.jsonl")
    assert {(one["target"], one["registers"]) for one in kept} == {("sm_90", 128), ("sm_80", 64)}


def test_nothing_to_compare_with_is_no_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, [row()]) == 5
    assert "there is no baseline of Triton 3.7.1" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], [row(), row(launch=1, triton="3.9.0")]])
def test_rows_of_no_or_several_compilers_are_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert run(tmp_path, rows) == 2


def test_what_never_compiled_is_no_regression() -> None:
    failed = row(outcome="error", message="no")
    assert regressions([failed], [failed]) == []
    assert regressions([failed], [row()]) == []
    assert differences([failed], [row()]) == []


def test_the_committed_baselines_name_every_launch_once() -> None:
    paths = sorted(BASELINES.glob("triton-*.jsonl"))
    assert paths
    for path in paths:
        rows = read(path)
        assert {one["target"] for one in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
        assert regressions(rows, rows) == []
        assert len(
            {
                json.dumps([one[name] for name in ("target", "dtype", "shape", "pass", "kernel", "launch")])
                for one in rows
            }
        ) == len(rows)

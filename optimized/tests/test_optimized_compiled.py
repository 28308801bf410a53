"""Every kernel compiles for real GPUs, on a machine without one, within their shared memory, on tensor cores, and hardly spills."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kda_optimized
import kda_reference
import pytest
from kda_optimized.launch_config import choose, table
from kda_optimized.tune import applicable, candidates, written

MOST_SPILLED_BYTES = 288
MOST_SHARED_BYTES = {90: 227 * 1024, 80: 163 * 1024}
PROGRAM = """
import json, sys, torch
from kda_optimized.compiled import compile_launch, launches, sample
arch, dtype, width = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
for launch in launches(sample(dtype, width), arch):
    print(json.dumps(compile_launch(launch, arch)), flush=True)
"""


def compiled(arch: int, dtype: str, width: int) -> list[dict[str, Any]]:
    roots = [str(Path(inspect.getfile(package)).parents[1]) for package in (kda_optimized, kda_reference)]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [*inherited, *roots])),
    }
    command = [sys.executable, "-c", PROGRAM, str(arch), dtype, str(width)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arch", "dtype", "width"), [(90, "bfloat16", 128), (80, "bfloat16", 128), (90, "float32", 64)]
)
def test_kernels_compile_and_fit(arch: int, dtype: str, width: int) -> None:
    rows = compiled(arch, dtype, width)
    assert {row["kernel"] for row in rows} == set(table("default"))
    for row in rows:
        assert row["shared_bytes"] <= MOST_SHARED_BYTES[arch], row
        assert row["hgmma"] == 0, f"wgmma is miscompiled by the ptxas of Triton 3.6 and 3.7: {row}"
    if (arch, dtype) == (90, "bfloat16"):
        chunkwise = [row for row in rows if row["kernel"].startswith("kda_chunk") and "heads" not in row["kernel"]]
        assert all(row["hmma"] for row in chunkwise), chunkwise
        assert all(row["stack_bytes"] <= MOST_SPILLED_BYTES for row in rows), rows


@pytest.mark.parametrize("name", ["default", "interpreter"])
def test_launch_table_covers_every_call(name: str) -> None:
    for kernel, rules in table(name).items():
        for operand_bytes in (2, 4):
            for width in (16, 32, 64, 128, 256):
                config = choose(rules, operand_bytes, width)
                assert config.num_warps in (1, 2, 4, 8, 16), kernel


def test_tuning_starts_from_the_rule_that_a_call_takes() -> None:
    for rules in table("default").values():
        for operand_bytes, width in ((2, 128), (4, 256)):
            start = applicable(rules, operand_bytes, width)
            assert choose([start], operand_bytes, width) == choose(rules, operand_bytes, width)


def test_tuning_keeps_every_rule_applicable() -> None:
    for kernel, rules in table("default").items():
        for rule in rules:
            found = list(candidates(rule))
            assert rule["num_warps"] in {candidate["num_warps"] for candidate in found}, kernel
            assert all(candidate.keys() == rule.keys() for candidate in found), kernel
    assert json.loads(written(table("default"))) == table("default")

"""Compile the project's kernels for GPUs that are not here, keep what each needs as rows, and compare with what was accepted.

The kernels are another package, which this one runs in processes of their own and does not import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

from kda_conformance.rows import SCHEMA, RowWriter, fingerprint, now

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

OUTCOMES = ("compiled", "error")


def run(targets: Sequence[str], out: Path, console: Console) -> int:
    """Compile for targets and write ``out/rows.jsonl``.

    Parameters
    ----------
    targets
        Such as ``sm_90``; none means the default ones.
    out
        Folder of the rows; existing ones are replaced.

    Returns
    -------
    int
        How many launches have a row; 0 when the compiling process was refused or broke off.
    """
    rows = out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    writer = RowWriter(rows, OUTCOMES)
    shared = {"kind": "compile", "schema": SCHEMA, "run": writer.run, "started": now(), "fingerprint": fingerprint()}
    command = [sys.executable, "-m", "kda_optimized.compiled", *targets]
    # The interpreter, which other commands choose where there is no GPU, compiles nothing.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done: Counter[str] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603 - our own command
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        for line in process.stdout:
            row = json.loads(line)
            writer.counts[row["outcome"]] += 1
            writer.write(shared | row)
            done[row["target"]] += 1
            if done[row["target"]] == 1:
                console.print(f"compiling for {row['target']}")
    if process.returncode != 0 or not done:
        writer.finish("usage")
        return 0
    writer.finish("pass" if not writer.counts["error"] else "fail")
    return done.total()


def compare(out: Path, *, accept: bool) -> int:
    """Compare the rows of a run with the baseline, or accept them; return the exit status of that."""
    command = [
        sys.executable,
        "-m",
        "kda_optimized.compile_baseline",
        str(out / "rows.jsonl"),
        *(["--accept"] if accept else []),
    ]
    return subprocess.run(command, check=False).returncode  # noqa: S603 - our own command

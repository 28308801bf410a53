"""What the compiler made of the kernels, compared with what was accepted before: ``python -m kda_optimized.compile_baseline ROWS``.

A baseline is a file of rows for one version of Triton under ``optimized/baselines/``. A kernel that spills more than it did, lost a kind of
matrix instruction, no longer compiles, or has no accepted row is a regression; every other difference is told and is none. ``--accept``
makes the rows the new baseline of their targets. Exit status: 0 no regression, 1 some, 2 bad usage, 5 nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FAIL, USAGE, NOTHING = 1, 2, 5
BASELINES = Path(__file__).parents[1] / "baselines"
KEY = ("target", "dtype", "shape", "pass", "kernel", "launch")
NUMBERS = ("registers", "spilled_bytes", "spill_instructions", "shared_bytes", "code_bytes", "num_warps", "num_stages")
ACCEPT = "kda compile --accept"
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Read compile rows; others are passed over, such as the closing row of a run."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if row.get("kind", "compile") == "compile"]


def key_of(row: Row) -> str:
    """Return what two rows share that describe one launch."""
    return json.dumps([row[name] for name in KEY])


def named(row: Row) -> str:
    """Return a launch as a person reads it."""
    sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    return f"{row['kernel']} launch {row['launch']} ({row['pass']}, {row['dtype']} {sizes}, {row['target']})"


def regressions(old: list[Row], new: list[Row]) -> list[str]:
    """Return a sentence for each regression.

    Parameters
    ----------
    old
        The accepted rows.
    new
        Those of this run. Targets that it did not compile for are not missed.
    """
    accepted, found = {key_of(row): row for row in old}, {key_of(row): row for row in new}
    targets = {row["target"] for row in new}
    sentences = [
        f"{named(row)} must still be launched, got no row of it"
        for key, row in accepted.items()
        if row["target"] in targets and key not in found
    ]
    for key, row in found.items():
        before = accepted.get(key)
        if before is None:
            sentences.append(f"{named(row)} must have an accepted row, got none")
        elif row["outcome"] == "error":
            if before["outcome"] == "compiled":
                sentences.append(f"{named(row)} must still compile, got {row['message'][:300]}")
        elif before["outcome"] == "compiled":
            sentences += _worse(before, row)
    return sentences


def _worse(before: Row, row: Row) -> list[str]:
    sentences = []
    if row["spilled_bytes"] > before["spilled_bytes"]:
        sentences.append(
            f"{named(row)} must spill at most {before['spilled_bytes']} bytes, got {row['spilled_bytes']} "
            f"(registers {before['registers']} to {row['registers']})"
        )
    lost = [kind for kind in before["matrix_instructions"] if not row["matrix_instructions"].get(kind)]
    if lost:
        got = _kinds(row["matrix_instructions"])
        sentences.append(f"{named(row)} must keep its matrix instructions {', '.join(lost)}, got {got}")
    return sentences


def differences(old: list[Row], new: list[Row]) -> list[str]:
    """Return a sentence for each launch of which a number changed, regression or not."""
    accepted = {key_of(row): row for row in old}
    sentences = []
    for row in new:
        before = accepted.get(key_of(row), {})
        if before.get("outcome") != "compiled" or row["outcome"] != "compiled":
            continue
        told = [
            f"{name} {before.get(name)} to {row.get(name)}" for name in NUMBERS if before.get(name) != row.get(name)
        ]
        if before["matrix_instructions"] != row["matrix_instructions"]:
            told.append(f"{_kinds(before['matrix_instructions'])} to {_kinds(row['matrix_instructions'])}")
        if told:
            sentences.append(f"{named(row)}: {'; '.join(told)}")
    return sentences


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.items()) or "none"


def accept(rows: list[Row], path: Path) -> None:
    """Make rows the baseline of the targets that they are of; those of other targets stay."""
    targets = {row["target"] for row in rows}
    kept = [row for row in read(path) if row["target"] not in targets] if path.is_file() else []
    plain = [
        {name: row[name] for name in (*KEY, "outcome", "message", *NUMBERS, "matrix_instructions") if name in row}
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in sorted([*kept, *plain], key=key_of)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Compare rows with their baseline, or accept them."""
    parser = argparse.ArgumentParser(prog="python -m kda_optimized.compile_baseline", description=__doc__)
    parser.add_argument("rows", type=Path, help="rows of kda compile")
    parser.add_argument("--accept", action="store_true", help="make them the new baseline")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="folder of the baselines")
    options = parser.parse_args(arguments)
    rows = read(options.rows)
    versions = sorted({row["triton"] for row in rows})
    if len(versions) != 1:
        print(
            f"{options.rows} must hold rows of one version of Triton, got {versions or 'no rows'}; run kda compile",
            file=sys.stderr,
        )
        return USAGE
    path = options.baselines / f"triton-{versions[0]}.jsonl"
    if options.accept:
        accept(rows, path)
        print(f"{len(rows)} launches accepted in {path}")
        return 0
    if not path.is_file():
        print(
            f"there is no baseline of Triton {versions[0]} in {options.baselines}; to make one: {ACCEPT}",
            file=sys.stderr,
        )
        return NOTHING
    old = read(path)
    for sentence in differences(old, rows):
        print(sentence)
    bad = regressions(old, rows)
    for sentence in bad:
        print(f"REGRESSION {sentence}", file=sys.stderr)
    print(f"{len(rows)} launches compared with {path.name}: {len(bad)} regressions")
    if bad:
        print(f"If this is meant, accept it as the new baseline: {ACCEPT}", file=sys.stderr)
    return FAIL if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

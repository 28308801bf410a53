"""Run the suite over every planted bug and every correct variant: which law catches what.

One pytest process each, as for any implementation. What a process leaves is condensed to one verdict a law, so that the rows of
all of them make one small file, which ``python -m kda_reports mutants`` renders.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kda_conformance.claims import UsageError
from kda_conformance.planted.planting import PACKAGE, Entry, catalogue, variants
from kda_conformance.rows import unloaded_rows
from kda_conformance.verify import suite_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

RANK = {"fail": 0, "error": 1, "xfail": 2, "pass": 3, "may": 4, "unclaimed": 5}


def run(entries: Sequence[Entry], effort: str, seed: int, out: Path, console: Console) -> list[list[dict[str, Any]]]:
    """Judge every entry on one draw of the calls, show progress, and write ``out/rows.jsonl``.

    Returns
    -------
    list[list[dict[str, Any]]]
        The condensed rows of each entry: its run, one verdict a law, its finish.
    """
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console) as progress,
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        tempfile.TemporaryDirectory() as folder,
    ):
        task = progress.add_task("planted bugs", total=len(entries))
        waiting = {pool.submit(judge, entry, effort, seed, Path(folder)): i for i, entry in enumerate(entries)}
        found: dict[int, list[dict[str, Any]]] = {}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            progress.advance(task)
    runs = [found[i] for i in range(len(entries))]
    rows = "".join(json.dumps(row) + "\n" for rows in runs for row in rows)
    (out / "rows.jsonl").write_text(rows, encoding="utf-8")
    return runs


def judge(entry: Entry, effort: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Run the suite on one entry and condense its rows."""
    path = folder / f"{entry.id}.jsonl"
    # A correct variant is shown with all it measures; of a bug it is enough that a law is broken.
    speed = () if entry.id in variants() else ("--kda-first-failure",)
    command = suite_command(
        f"{PACKAGE}.bugs:{entry.id}", "--effort", effort, "--kda-seed", str(seed), "--kda-rows", str(path), *speed
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if not path.is_file():
        unloaded_rows(path, entry.id, effort, done.stdout[-500:] + done.stderr[-500:])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.unlink()
    return condense(rows, entry)


def condense(rows: list[dict[str, Any]], entry: Entry) -> list[dict[str, Any]]:
    """Return the run row with the entry's description, one verdict a law, and the finish row with counts to match."""
    first: dict[str, dict[str, Any]] = {}
    largest: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "verdict":
            law = row["law"]
            if law not in first or RANK[row["outcome"]] < RANK[first[law]["outcome"]]:
                first[law] = row
            largest[law] = max(largest.get(law, 0.0), float(row["score"] or 0.0))
    about = {
        "id": entry.id,
        "what": entry.what,
        "trigger": entry.trigger,
        "source": entry.source,
        "part": entry.part,
        "kind": "correct" if entry.id in variants() else "equivalent" if entry.equivalent else "bug",
        "argument": entry.equivalent or "",
    }
    opening = {**rows[0], "implementation": entry.id, "planted": about}
    verdicts = [
        {**row, "implementation": entry.id, "score": _number(largest[law])} for law, row in sorted(first.items())
    ]
    counts = {name: sum(row["outcome"] == name for row in verdicts) for name in RANK}
    closing = (
        rows[-1]
        if rows[-1]["kind"] == "finish"
        else {"kind": "finish", "run": opening["run"], "exit": "fail", "seconds": 0.0}
    )
    return [opening, *verdicts, {**closing, "implementation": entry.id, "counts": counts}]


def _number(score: float) -> float | str:
    return score if abs(score) < float("inf") else str(score)


def survivors(runs: list[list[dict[str, Any]]]) -> list[str]:
    """Return the ids of bugs that no law caught and that are not argued to be equivalent."""
    return [rows[0]["planted"]["id"] for rows in runs if rows[0]["planted"]["kind"] == "bug" and not broken(rows)]


def false_alarms(runs: list[list[dict[str, Any]]]) -> list[str]:
    """Return the ids of correct variants and equivalent edits that some law failed."""
    return [rows[0]["planted"]["id"] for rows in runs if rows[0]["planted"]["kind"] != "bug" and broken(rows)]


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """Return the laws that a run broke."""
    return [row["law"] for row in rows if row["kind"] == "verdict" and row["outcome"] in ("fail", "error")]


def chosen(ids: Sequence[str]) -> list[Entry]:
    """Return the named entries, or all of them."""
    known = {**variants(), **catalogue()}
    if unknown := sorted(set(ids) - set(known)):
        message = f"a planted bug must be in the catalogue, got {unknown}; known are {sorted(known)}"
        raise UsageError(message)
    return [known[name] for name in ids] if ids else list(known.values())

"""Run the suite over every planted bug and every correct variant: which law catches what.

One pytest process each, as for any implementation. What a process leaves is condensed to one verdict a law, so that the rows of
all of them make one small file, which ``python -m kda_reports mutants`` renders. Of each arithmetic class one entry goes first, shared
by several processes, and computes the budgets that the others of its class find on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kda_conformance.claims import UsageError
from kda_conformance.planted.planting import PACKAGE, Entry, catalogue, variants
from kda_conformance.rows import unloaded_rows
from kda_conformance.verify import shared_by, suite_command

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

Rows = list[dict[str, Any]]
RANK = {"fail": 0, "error": 1, "xfail": 2, "pass": 3, "may": 4, "unclaimed": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How entries are judged.

    Attributes
    ----------
    effort, seed
        How much is run, and on which draw of the calls.
    first_law
        Whether a bug is let go at the first law that it breaks. Otherwise every law is asked, each up to its first failure.
    processes
        How many judge at a time.
    """

    effort: str
    seed: int = 0
    first_law: bool = False
    processes: int = 1

    def options(self, entry: Entry) -> tuple[str, ...]:
        """Return the options of the suite for an entry."""
        # A correct variant is shown with all it measures; of a bug it is enough that a law is broken.
        speed = () if entry.id in variants() else ("--kda-first-failure", *(("--exitfirst",) if self.first_law else ()))
        return ("--effort", self.effort, "--kda-seed", str(self.seed), *speed)


def run(entries: Sequence[Entry], plan: Plan, out: Path, console: Console, *, resume: bool = False) -> list[Rows]:
    """Judge every entry, show progress, and write ``out/rows.jsonl``; the rows of each entry are kept in ``out/entries`` as they come.

    Parameters
    ----------
    resume
        Whether an entry that is in ``out/entries`` already is taken from there. The folder may hold what several machines judged.

    Returns
    -------
    list[Rows]
        The condensed rows of each entry: its run, one verdict a law, its finish.

    Raises
    ------
    UsageError
        If what is kept was judged in another way.
    """
    folder = out / "entries"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Rows] = {}
    if resume:
        found = {
            entry.id: rows for entry in entries if (rows := _kept(folder / f"{entry.id}.jsonl", plan.options(entry)))
        }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(plan.processes) as pool:
        task = progress.add_task("planted bugs", total=len(entries), completed=len(found))
        leaders, followers = _by_class([entry for entry in entries if entry.id not in found])
        share = max(1, plan.processes // max(1, len(leaders)))
        waiting = {pool.submit(judge, entry, plan, folder, share): entry for entry in leaders}
        while waiting:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                entry = waiting.pop(done)
                found[entry.id] = done.result()
                progress.advance(task)
                for follower in followers.pop(entry.precision, ()):
                    waiting[pool.submit(judge, follower, plan, folder)] = follower
    runs = [found[entry.id] for entry in entries]
    (out / "rows.jsonl").write_text(_lines(row for rows in runs for row in rows), encoding="utf-8")
    return runs


def _by_class(entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, list[Entry]]]:
    """Return the first entry of each arithmetic class, and those that wait for it: they need the budgets that it computes."""
    leaders: dict[str, Entry] = {}
    followers: dict[str, list[Entry]] = {}
    for entry in entries:
        if leaders.setdefault(entry.precision, entry) is not entry:
            followers.setdefault(entry.precision, []).append(entry)
    return list(leaders.values()), followers


def _kept(path: Path, options: tuple[str, ...]) -> Rows:
    if not path.is_file():
        return []
    rows: Rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if rows[0]["options"] != list(options):
        judged, asked = " ".join(rows[0]["options"]), " ".join(options)
        message = f"--resume must go on as the run began, got {asked}, and {path} was judged with {judged}; choose another --out"
        raise UsageError(message)
    return rows


def judge(entry: Entry, plan: Plan, folder: Path, processes: int = 1) -> Rows:
    """Run the suite on one entry and condense its rows into a file of ``folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        command = suite_command(
            f"{PACKAGE}.bugs:{entry.id}", "--kda-rows", str(path), *plan.options(entry), *shared_by(processes)
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
        if not path.is_file():
            unloaded_rows(path, entry.id, plan.effort, done.stdout[-500:] + done.stderr[-500:])
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = condense([{**found[0], "options": list(plan.options(entry))}, *found[1:]], entry)
    if found[-1]["kind"] == "finish":
        # Written beside and moved, so that a run that is stopped leaves no half of an entry.
        half = folder / f"{entry.id}.half"
        half.write_text(_lines(rows), encoding="utf-8")
        half.replace(folder / f"{entry.id}.jsonl")
    return rows


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def condense(rows: Rows, entry: Entry) -> Rows:
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


def survivors(runs: Sequence[Rows]) -> list[str]:
    """Return the ids of bugs that no law caught and that are not argued to be equivalent."""
    return [rows[0]["planted"]["id"] for rows in runs if rows[0]["planted"]["kind"] == "bug" and not broken(rows)]


def false_alarms(runs: Sequence[Rows]) -> list[str]:
    """Return the ids of correct variants and equivalent edits that some law failed."""
    return [rows[0]["planted"]["id"] for rows in runs if rows[0]["planted"]["kind"] != "bug" and broken(rows)]


def broken(rows: Rows) -> list[str]:
    """Return the laws that a run broke."""
    return [row["law"] for row in rows if row["kind"] == "verdict" and row["outcome"] in ("fail", "error")]


def chosen(ids: Sequence[str]) -> list[Entry]:
    """Return the named entries, or all of them."""
    known = {**variants(), **catalogue()}
    if unknown := sorted(set(ids) - set(known)):
        message = f"a planted bug must be in the catalogue, got {unknown}; known are {sorted(known)}"
        raise UsageError(message)
    return [known[name] for name in ids] if ids else list(known.values())

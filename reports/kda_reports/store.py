"""The store of the history: a folder with one append-only file of rows, which several processes may write at once.

Every batch is written by one call under a lock, and ends a line that a killed writer left torn. What cannot be read as a row is returned
beside the rows with its place and the reason, for the caller to name, and ``prune`` sets it aside in a file of its own; nothing is skipped
silently and nothing in the store is ever edited.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import duckdb

from kda_reports.fields import RowError
from kda_reports.measurement import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kda_reports.measurement import Measurement

ROWS, LOCK, SET_ASIDE = "rows.jsonl", "lock", "set-aside.jsonl"
# How duckdb reads a row. Nested objects stay JSON; times stay text, which in UTC is ordered as they are.
COLUMNS = {
    "id": "VARCHAR", "schema": "INTEGER", "time": "VARCHAR", "commit_time": "VARCHAR", "commit": "VARCHAR", "dirty": "BOOLEAN",
    "source": "VARCHAR", "run": "VARCHAR", "suite_version": "VARCHAR", "seed": "BIGINT", "device": "VARCHAR",
    "implementation": "VARCHAR", "version": "VARCHAR", "op": "VARCHAR", "pass": "VARCHAR", "call": "VARCHAR", "shape": "JSON",
    "dtype": "VARCHAR", "metric": "VARCHAR", "unit": "VARCHAR", "value": "DOUBLE", "spread": "DOUBLE", "n": "BIGINT",
    "samples": "DOUBLE[]", "machine": "JSON", "libraries": "JSON", "series": "VARCHAR",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt:
    """A line that is no row: where it stands, why it is none, and its text."""

    where: str
    reason: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a store holds.

    Attributes
    ----------
    rows
        In the order in which they were added; a row that was added twice is here once.
    corrupt
        What could not be read.
    """

    rows: Sequence[Measurement]
    corrupt: Sequence[Corrupt]


@dataclass(frozen=True, slots=True)
class Store:
    """A history in a folder, which is made when something is added."""

    folder: Path

    @property
    def path(self) -> Path:
        """Return the file of rows."""
        return self.folder / ROWS

    def add(self, rows: Sequence[Measurement]) -> int:
        """Append rows that the store does not hold yet, all of them or, if the process is killed, a part that is no loss.

        Returns
        -------
        int
            How many were new.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            known = self._lines()[0] if self.path.exists() else {}
            new = [line for line in dict.fromkeys(row.line() for row in rows) if line not in known]
            if new:
                self._append("".join(f"{line}\n" for line in new))
        return len(new)

    def read(self) -> Contents:
        """Read the store.

        Raises
        ------
        RowError
            If there is no store.
        """
        rows, corrupt = self._lines()
        return Contents(rows=list(rows.values()), corrupt=corrupt)

    def _lines(self) -> tuple[dict[str, Measurement], list[Corrupt]]:
        """Return the rows by their line, and what is no row."""
        try:
            text = self.path.read_bytes().decode(errors="surrogateescape")
        except OSError as error:
            message = f"history must be a folder with {ROWS}, got {error}; run `kda history add` to make one"
            raise RowError(message) from error
        rows: dict[str, Measurement] = {}
        corrupt = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line:
                continue
            where = f"{ROWS} line {number}"
            try:
                rows[line] = parse(line, where)
            except (RowError, UnicodeError) as error:
                corrupt.append(Corrupt(where=where, reason=str(error), text=line))
        return rows, corrupt

    def prune(self, keep: Callable[[Measurement], bool]) -> tuple[int, int]:
        """Keep only some rows, and move what is no row to ``set-aside.jsonl``.

        Returns
        -------
        tuple[int, int]
            How many rows were removed, and how many lines were set aside.

        Raises
        ------
        RowError
            If there is no store.
        """
        with self._locked():
            rows, corrupt = self._lines()
            kept = [line for line, row in rows.items() if keep(row)]
            with (self.folder / SET_ASIDE).open("a", encoding="utf-8") as aside:
                for entry in corrupt:
                    record = {"where": entry.where, "reason": entry.reason, "text": entry.text}
                    aside.write(json.dumps(record) + "\n")
            other = self.path.with_suffix(".new")
            other.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            other.replace(self.path)
        return len(rows) - len(kept), len(corrupt)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the store; a file of its own, since pruning replaces the file of rows."""
        if not self.folder.is_dir():
            message = f"history must be a folder, got {self.folder}; run `kda history add` to make one"
            raise RowError(message)
        with (self.folder / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _append(self, text: str) -> None:
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def queried(rows: Sequence[Measurement]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database with a table ``history`` of rows, each with the ``series`` that it belongs to."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**json.loads(row.line()), "series": row.series}) + "\n")
        file.flush()
        with duckdb.connect() as database:
            database.read_json(file.name, columns=COLUMNS, format="newline_delimited").create("history")
            yield database

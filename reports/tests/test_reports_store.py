"""The store: appended to by several, torn by some, and nothing lost or passed over."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from kda_reports.fields import RowError
from kda_reports.measurement import Measurement, parse
from kda_reports.store import COLUMNS, SET_ASIDE, Store, queried
from synthetic_history import measured

WRITER = """
import sys
from pathlib import Path
from kda_reports.store import Store
from synthetic_history import measured
for i in range(20):
    Store(Path(sys.argv[1])).add([measured(i, 1.0, run=sys.argv[2], call=call) for call in "abc"])
    Store(Path(sys.argv[1])).add([measured(i, 1.0, run="common")])
"""


def store_of(folder: Path, *values: float) -> Store:
    store = Store(folder / "history")
    store.add([measured(i, value) for i, value in enumerate(values)])
    return store


def changed(line: str, **changes: Any) -> str:
    return json.dumps(json.loads(line) | changes)


def test_rows_come_back_as_they_were_added(tmp_path: Path) -> None:
    rows = [measured(0, 1e-3), measured(1, float("inf"), samples=None, spread=None), measured(2, 0.1, seed=None)]
    store = Store(tmp_path / "new" / "history")
    assert store.add(rows) == 3
    assert store.read().rows == rows
    assert store.read().corrupt == []


def test_adding_again_adds_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1.0, 2.0)
    before = store.path.read_bytes()
    assert store.add([measured(0, 1.0), measured(0, 1.0)]) == 0
    assert store.path.read_bytes() == before
    assert store.add([measured(0, 1.0), measured(2, 3.0), measured(2, 3.0)]) == 1


def test_adding_never_changes_what_is_there(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1.0)
    before = store.path.read_bytes()
    store.add([measured(1, 2.0)])
    assert store.path.read_bytes().startswith(before)


def test_writers_at_once_lose_nothing_and_write_nothing_twice_while_another_prunes(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1.0)
    command = [sys.executable, "-c", WRITER, str(store.folder)]
    writers = [subprocess.Popen([*command, f"run-{i}"], cwd=Path(__file__).parent) for i in range(3)]
    while any(writer.poll() is None for writer in writers):
        store.prune(lambda _: True)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert store.read().corrupt == []
    assert not (store.folder / SET_ASIDE).read_text()
    lines = store.path.read_text().splitlines()
    assert len(set(lines)) == len(lines) == 1 + 3 * 20 * 3 + 20


@pytest.mark.parametrize("lost", [1, 7, 200])
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, lost: int) -> None:
    store = store_of(tmp_path, 1.0, 2.0)
    store.path.write_bytes(store.path.read_bytes()[: -lost - 1])
    torn = [measured(0, 1.0)]
    assert store.read().rows == torn
    (entry,) = store.read().corrupt
    assert entry.where == "rows.jsonl line 2"
    # The next writer ends the torn line, and what was lost can be added again.
    assert store.add([measured(1, 2.0), measured(2, 3.0)]) == 2
    assert [row.value for row in store.read().rows] == [1.0, 2.0, 3.0]
    assert [entry.where for entry in store.read().corrupt] == ["rows.jsonl line 2"]


def test_a_last_line_without_its_end_is_a_row(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1.0)
    store.path.write_bytes(store.path.read_bytes()[:-1])
    assert store.add([measured(0, 1.0), measured(1, 2.0)]) == 1
    assert [row.value for row in store.read().rows] == [1.0, 2.0]
    assert store.read().corrupt == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"value": 2.0}, "id must be made from the row's own content"),
        ({"id": "0"}, "id must be made from the row's own content"),
    ],
)
def test_a_row_of_another_schema_or_changed_in_place_is_named(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    store = store_of(tmp_path, 1.0, 5.0)
    first, second = store.path.read_text().splitlines()
    store.path.write_text(f"{changed(first, **changes)}\n{second}\n")
    contents = store.read()
    assert [row.value for row in contents.rows] == [5.0]
    (entry,) = contents.corrupt
    assert reason in entry.reason
    assert "rows.jsonl line 1" in entry.reason


@pytest.mark.parametrize("junk", [b"\xff\xfe\x00", b"[1]", b"{}", b'{"id": NaN}', b"null"])
def test_what_is_no_row_is_named_and_stops_nothing(tmp_path: Path, junk: bytes) -> None:
    store = store_of(tmp_path, 1.0)
    store.path.write_bytes(junk + b"\n" + store.path.read_bytes())
    assert [row.value for row in store.read().rows] == [1.0]
    assert [entry.where for entry in store.read().corrupt] == ["rows.jsonl line 1"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"commit": "main"}, "commit must be a hexadecimal commit"),
        ({"n": 0}, "n must be at least 1"),
        ({"time": "2026-01-01T00:00:00"}, "time must be an ISO time with a time zone"),
        ({"time": "yesterday"}, "time must be an ISO time with a time zone"),
        ({"source": "guess"}, "source must be one of verify, bench, compile"),
        ({"dirty": 0}, "dirty must be of type bool"),
    ],
)
def test_a_field_must_follow_its_rule(changes: dict[str, Any], reason: str) -> None:
    line = measured(0, 1.0, **changes).line()
    with pytest.raises(RowError, match=f"a line: {reason}"):
        parse(line, "a line")


def test_pruning_keeps_what_it_should_and_sets_the_rest_aside(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1.0, 2.0, 3.0)
    with store.path.open("ab") as file:
        file.write(b"torn \xff")
    assert store.prune(lambda row: row.value > 1.5) == (1, 1)
    assert [row.value for row in store.read().rows] == [2.0, 3.0]
    assert store.read().corrupt == []
    (aside,) = (store.folder / SET_ASIDE).read_text().splitlines()
    assert json.loads(aside)["where"] == "rows.jsonl line 4"
    assert json.loads(aside)["text"].startswith("torn ")
    assert store.prune(lambda _: True) == (0, 0)


def test_a_history_that_is_not_there_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    for use in (Store(tmp_path / "none").read, lambda: Store(tmp_path / "none").prune(lambda _: True)):
        with pytest.raises(RowError, match="run `kda history add` to make one"):
            use()


def test_duckdb_sees_every_field_with_its_type() -> None:
    names = {"pass" if field.name == "pass_name" else field.name for field in fields(Measurement)}
    assert set(COLUMNS) == names | {"id", "schema", "series"}
    rows = [measured(0, float("nan"), samples=(1.0, 2.0)), measured(1, 2.5, seed=None, samples=None)]
    query = "select isnan(value), value, samples[2], seed, machine ->> 'gpu', shape -> 'T', dirty from history order by time"
    with queried(rows) as database:
        first, second = database.execute(query).fetchall()
    assert (first[0], *first[2:]) == (True, 2.0, 0, "A GPU", "2048", False)
    assert second == (False, 2.5, None, None, "A GPU", "2048", False)


def test_series_are_told_apart_by_the_machine_and_not_by_the_commit() -> None:
    assert measured(0, 1.0).series == measured(5, 2.0, run="other", dirty=True).series
    assert measured(0, 1.0).series != measured(0, 1.0, machine={"gpu": "Another"}).series

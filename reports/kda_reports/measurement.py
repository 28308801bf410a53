"""One row of the history: a number, what was measured, where, and at which commit, complete in itself.

``docs/history.md`` documents the fields. A row carries an ``id`` made from its own content, so that adding the same measurement twice
adds it once, and a row that was changed in place is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kda_reports.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = 1
SOURCES = ("verify", "bench", "compile")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
# What two numbers must share to be compared. The machine is among them: nothing is ever compared across machines.
SERIES = (
    "source", "implementation", "op", "pass", "call", "shape", "dtype", "metric", "unit", "device", "machine", "seed",
)  # fmt: skip
ID_LENGTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured number.

    Attributes
    ----------
    time
        When it was measured, ISO, UTC.
    commit_time
        When the commit was made, ISO, UTC, which orders the history; ``None`` where the rows do not say.
    commit, dirty
        Source state; ``dirty`` when the checkout had changes that no commit names.
    source
        One of ``SOURCES``.
    run, suite_version, seed
        Identifier of the run, version of the suite, seed of the calls; ``None`` where there is none.
    device
        ``cpu``, ``cuda``, or the target that was compiled for.
    implementation, version
        What was measured.
    op, pass_name, call, shape, dtype
        The operator, ``forward`` or the like, the call's name, its sizes by letter (empty: many calls), the input dtype.
    metric, unit, value, spread, n
        The number, its median absolute deviation (``None``: it has no spread) and how many it was taken over.
    samples
        What the value is the median of, where that was kept.
    machine
        What identifies the machine; numbers with different ones are never compared.
    libraries
        Versions by name.
    """

    time: str
    commit_time: str | None
    commit: str
    dirty: bool
    source: str
    run: str
    suite_version: str | None
    seed: int | None
    device: str
    implementation: str
    version: str
    op: str
    pass_name: str
    call: str
    shape: Mapping[str, int]
    dtype: str
    metric: str
    unit: str
    value: float
    spread: float | None
    n: int
    samples: tuple[float, ...] | None
    machine: Mapping[str, object]
    libraries: Mapping[str, object]

    def fields(self) -> dict[str, Any]:
        """Return the fields as the row names them."""
        names = {field.name: "pass" if field.name == "pass_name" else field.name for field in fields(self)}
        return {"schema": SCHEMA, **{name: plain(getattr(self, own)) for own, name in names.items()}}

    @property
    def series(self) -> str:
        """Return the identifier that all numbers comparable with this one share."""
        row = self.fields()
        return _digest({name: row[name] for name in SERIES})

    def line(self) -> str:
        """Return the row as the store holds it, a line without its end."""
        row = self.fields()
        return json.dumps({"id": _digest(row), **row}, allow_nan=False)


def parse(line: str, where: str) -> Measurement:
    """Read one line of a store.

    Parameters
    ----------
    line
        Its text.
    where
        How errors name it.

    Raises
    ------
    RowError
        If the line is no row of this schema version, or its content is not what its ``id`` was made from.
    """
    row = Fields.parse(line, where)
    schema = row.get("schema", int)
    if schema != SCHEMA:
        raise row.error("schema", f"be {SCHEMA}", str(schema))
    content = {name: value for name, value in row.fields.items() if name != "id"}
    if row.get("id", str) != _digest(content):
        raise row.error(
            "id", "be made from the row's own content", f"{row.fields['id']!r} instead of {_digest(content)!r}"
        )
    return _checked(row)


def _checked(row: Fields) -> Measurement:
    commit, n = row.get("commit", str), row.get("n", int)
    if COMMIT.fullmatch(commit) is None:
        raise row.error("commit", "be a hexadecimal commit", repr(commit))
    if n < 1:
        raise row.error("n", "be at least 1", str(n))
    return Measurement(
        time=moment(row, "time"),
        commit_time=None if row.get("commit_time", object) is None else moment(row, "commit_time"),
        commit=commit,
        dirty=row.get("dirty", bool),
        source=row.one_of("source", SOURCES),
        run=row.get("run", str),
        suite_version=_optional(row, "suite_version", str),
        seed=_optional(row, "seed", int),
        device=row.get("device", str),
        implementation=row.get("implementation", str),
        version=row.get("version", str),
        op=row.get("op", str),
        pass_name=row.get("pass", str),
        call=row.get("call", str),
        shape=row.counts("shape"),
        dtype=row.get("dtype", str),
        metric=row.get("metric", str),
        unit=row.get("unit", str),
        value=row.number("value"),
        spread=None if row.get("spread", object) is None else row.number("spread"),
        n=n,
        samples=None if row.get("samples", object) is None else row.numbers("samples"),
        machine=row.get("machine", dict),
        libraries=row.get("libraries", dict),
    )


def moment(row: Fields, name: str) -> str:
    """Return a field's time in UTC, to the second, so that times are ordered as their texts are.

    Raises
    ------
    RowError
        If the field is no ISO time with a time zone.
    """
    text = row.get(name, str)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise row.error(name, "be an ISO time with a time zone", repr(text))
    return time.astimezone(UTC).isoformat(timespec="seconds")


def _optional(row: Fields, name: str, wanted: type[Any]) -> Any:  # noqa: ANN401 - what is wanted, or None
    return None if row.get(name, object) is None else row.get(name, wanted)


def plain(value: Any) -> Any:  # noqa: ANN401 - any value
    """Return a value as JSON takes it: non-finite numbers are the strings that rows have for them, tuples are lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _digest(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]

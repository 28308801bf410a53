"""Rows: what a conformance run left behind, read strictly.

A rows file holds one JSON object a line, and ``kind`` says which: ``run`` opens the run of one implementation,
``verdict`` is the outcome of one test, ``measure`` is one tensor against its bound, ``finish`` closes the run.
Non-finite numbers are the strings ``"nan"``, ``"inf"`` and ``"-inf"``. A field this reader does not know is ignored,
so that rows may grow within a schema version; a missing or misshapen one is an error that names the line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kda_reports.fields import Fields, RowError, each_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SCHEMA = 1
OUTCOMES = ("pass", "fail", "error", "xfail", "unclaimed", "may")
EXITS = ("pass", "fail", "nothing", "usage")
PLANTED = ("bug", "equivalent", "correct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of one test.

    Attributes
    ----------
    law, test, case, dtype, precision
        What was judged: law, pytest node id, case text, input dtype, claimed arithmetic class.
    outcome
        One of ``OUTCOMES``. ``may`` is recorded and never fails; ``unclaimed`` is never a pass.
    score
        Largest error as a fraction of its bound (dimensionless); ``None`` when the law has no bound.
    message
        Why it failed or was not run; empty for a pass.
    reproduction
        The command that runs it again; may be empty.
    reason
        Why a failure is declared, and its issue; empty otherwise.
    seconds
        What the test took; 0 where the rows do not say.
    """

    law: str
    test: str
    case: str
    dtype: str
    precision: str
    outcome: str
    score: float | None
    message: str
    reproduction: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One tensor of one test against its bound.

    Attributes
    ----------
    score
        Largest of three statistics, each as a fraction of its limit; at most 1 passes.
    relative_error
        Frobenius norm of the error over that of the value; for information.
    index, got, expected, bound
        The worst element, by axis name, and the largest error it may have.
    by_token
        ``(first token of a bin, largest error over bound in it)``.
    by_decay
        ``(decay accumulated since the sequence began in nats, largest error over bound there)``.
    by_channel
        Largest error over bound by value head (rows) and channel (columns); empty for a tensor without the two.
    head_step, channel_step
        How many heads and channels an entry of it stands for.
    shape
        Sizes of the call by letter.
    regime
        Name of the gate regime.
    """

    law: str
    case: str
    dtype: str
    precision: str
    tensor: str
    score: float
    relative_error: float
    index: Mapping[str, int]
    got: float
    expected: float
    bound: float
    by_token: tuple[tuple[float, float], ...]
    by_decay: tuple[tuple[float, float], ...]
    by_channel: tuple[tuple[float, ...], ...]
    head_step: int
    channel_step: int
    shape: Mapping[str, int]
    regime: str
    reproduction: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The closing row of a run: ``exit`` is one of ``EXITS``, ``counts`` are verdicts by outcome."""

    exit: str
    counts: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """An entry of the catalogue of planted bugs.

    Attributes
    ----------
    kind
        ``bug`` must be caught; ``equivalent`` and ``correct`` must not be.
    what, trigger, source, part, argument
        What is wrong, what shows it, where it was seen, its place in the catalogue, and why an equivalent one is.
    """

    kind: str
    what: str
    trigger: str
    source: str
    part: str
    argument: str


@dataclass(slots=True, kw_only=True)
class Run:
    """One implementation judged once, with everything its rows say.

    Attributes
    ----------
    identifier
        What the rows of the run have in common.
    started
        ISO time.
    seed
        Which draw of every call was judged.
    fingerprint
        Machine, library versions, commit and dirty flag.
    finish
        ``None`` when the run did not end properly.
    planted
        What is planted in the implementation, when the suite itself is judged; ``None`` otherwise.
    """

    identifier: str
    implementation: str
    version: str
    effort: str
    started: str
    seed: int
    device: str
    claims: Mapping[str, object]
    fingerprint: Mapping[str, object]
    verdicts: list[Verdict] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    finish: Finish | None = None
    planted: Planted | None = None


def read_rows(paths: Iterable[Path]) -> list[Run]:
    """Read rows files, one after the other.

    Returns
    -------
    list[Run]
        The runs, in the order in which they were opened.

    Raises
    ------
    RowError
        If a file cannot be read, a line is no row, a row belongs to no open run, or there is no run at all.
    """
    runs: dict[str, Run] = {}
    files = list(paths)
    for row in each_row(files, "kda verify"):
        _take(row, runs)
    if not runs:
        names = ", ".join(path.name for path in files) or "no file"
        message = f"rows must hold at least one run, got none in {names}; nothing run is no pass"
        raise RowError(message)
    return list(runs.values())


def _take(row: Fields, runs: dict[str, Run]) -> None:
    kind, identifier = row.get("kind", str), row.get("run", str)
    if kind == "run":
        if identifier in runs:
            raise row.error("run", "be opened once", f"{identifier!r} again")
        runs[identifier] = _run(row, identifier)
        return
    if kind not in ("verdict", "measure", "finish"):
        raise row.error("kind", "be run, verdict, measure or finish", repr(kind))
    if identifier not in runs:
        raise row.error("run", "be opened by a run row before it is used", repr(identifier))
    run = runs[identifier]
    if run.finish is not None:
        raise row.error("run", "have no rows after its finish row", f"a {kind} row of {identifier!r}")
    if kind == "verdict":
        run.verdicts.append(_verdict(row))
    elif kind == "measure":
        run.measures.append(_measure(row))
    else:
        run.finish = Finish(exit=row.one_of("exit", EXITS), counts=row.counts("counts"), seconds=row.number("seconds"))


def _run(row: Fields, identifier: str) -> Run:
    schema = row.get("schema", int)
    if schema != SCHEMA:
        raise row.error("schema", f"be {SCHEMA}", str(schema))
    return Run(
        identifier=identifier,
        implementation=row.get("implementation", str),
        version=row.get("version", str),
        effort=row.get("effort", str),
        started=row.get("started", str),
        seed=row.get("seed", int),
        device=row.get("device", str),
        claims=row.get("claims", dict),
        fingerprint=row.get("fingerprint", dict),
        planted=_planted(row.inner("planted")) if "planted" in row.fields else None,
    )


def _planted(row: Fields) -> Planted:
    return Planted(
        kind=row.one_of("kind", PLANTED),
        what=row.get("what", str),
        trigger=row.get("trigger", str),
        source=row.get("source", str),
        part=row.get("part", str),
        argument=row.get("argument", str),
    )


def _verdict(row: Fields) -> Verdict:
    return Verdict(
        law=row.get("law", str),
        test=row.get("test", str),
        case=row.get("case", str),
        dtype=row.get("dtype", str),
        precision=row.get("precision", str),
        outcome=row.one_of("outcome", OUTCOMES),
        score=None if row.get("score", object) is None else row.number("score"),
        message=row.get("message", str),
        reproduction=row.get("reproduction", str),
        # Rows of before the reason was told have none.
        reason=row.get("reason", str) if "reason" in row.fields else "",
        seconds=row.number("seconds") if "seconds" in row.fields else 0.0,
    )


def _measure(row: Fields) -> Measure:
    worst = row.inner("worst")
    channels = row.inner("by_channel") if row.fields.get("by_channel") is not None else None
    return Measure(
        law=row.get("law", str),
        case=row.get("case", str),
        dtype=row.get("dtype", str),
        precision=row.get("precision", str),
        tensor=row.get("tensor", str),
        score=row.number("score"),
        relative_error=row.number("relative_error"),
        index=worst.counts("index"),
        got=worst.number("got"),
        expected=worst.number("expected"),
        bound=worst.number("bound"),
        by_token=row.pairs("by_token"),
        by_decay=row.pairs("by_decay"),
        by_channel=channels.table("ratios") if channels else (),
        head_step=channels.get("head_step", int) if channels else 1,
        channel_step=channels.get("channel_step", int) if channels else 1,
        shape=row.counts("shape"),
        regime=row.get("regime", str),
        reproduction=row.get("reproduction", str),
    )

"""Results: what is known of one version of one implementation, kept as one file of JSON beside the suite.

The computed verdicts come from the rows of a run and are replaced by the next one. What a person says of them is kept apart and outlives
runs: it names the computed verdict it was given to, so that it is seen when the two part.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kda_reports.errors import summarise
from kda_reports.fields import Fields, RowError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kda_reports.rows import Run

SCHEMA = 1
STATUSES = ("pass", "fail", "incomplete", "nothing")
OUTCOMES = ("pass", "fail", "error", "xfail", "unclaimed", "may", "absent")
SAID = ("pass", "fail", "unclaimed")
MACHINE = ("gpu", "cpu", "platform", "driver", "cuda", "python", "torch", "triton", "numpy")
LONGEST_MESSAGE = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a person says of a computed verdict.

    Attributes
    ----------
    verdict
        ``pass``: it is right, and the law or the suite is at fault; ``fail``: it is wrong; ``unclaimed``: it never promised this.
    of
        The computed verdict that was looked at.
    reason
        Why, in a sentence; never empty.
    finding
        The report on it, a path in the repository or an address; may be empty unless the verdict is ``fail``.
    """

    verdict: str
    of: str
    reason: str
    finding: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LawResult:
    """One law for one implementation.

    Attributes
    ----------
    chapter
        The test module of the law.
    computed
        The gravest outcome of its tests, one of ``OUTCOMES``; ``absent`` when the run has none of them.
    worst
        Largest error as a fraction of its budget among the tests of that outcome; ``None`` for a law without one.
    num_failed, num_judged, num_unclaimed
        Tests that failed, were judged or recorded, and were not claimed.
    seconds
        What its tests took together.
    message, reproduction
        Of the failure with the largest error: what it says, and the command that shows it again; empty for a pass.
    human
        What a person says of it, or ``None``.
    """

    law: str
    chapter: str
    computed: str
    worst: float | None
    num_failed: int
    num_judged: int
    num_unclaimed: int
    seconds: float
    message: str
    reproduction: str
    human: Said | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One version of one implementation, judged.

    Attributes
    ----------
    suite, commit, dirty
        Version of the suite, and state of its source; ``None`` for an installed copy.
    effort, seed, device, started, seconds
        What was run, where on the machine, when, and for how long; ``seconds`` is ``None`` for a run that did not end.
    machine
        Hardware and libraries.
    precision
        Claimed arithmetic class by input dtype.
    not_claimed
        The claims that are not made.
    computed, summary
        One of ``STATUSES``, and a sentence that says why.
    human
        What a person says of the implementation as a whole, or ``None``.
    laws
        In the order in which they ran first.
    """

    implementation: str
    version: str
    suite: str | None
    commit: str | None
    dirty: bool | None
    effort: str
    seed: int
    device: str
    started: str
    seconds: float | None
    machine: Mapping[str, str | None]
    precision: Mapping[str, str]
    not_claimed: Sequence[str]
    computed: str
    summary: str
    human: Said | None
    laws: Sequence[LawResult]

    @property
    def filename(self) -> str:
        """Return the name of its file."""
        return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in self._identity) + ".json"

    @property
    def _identity(self) -> tuple[str, str]:
        return self.implementation, self.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A place where person and machine do not say the same.

    Attributes
    ----------
    result, law
        Where; ``law`` is ``None`` for the verdict on the whole.
    kind
        ``contradicts``: the person says otherwise; ``stale``: what was computed has changed since the person looked;
        ``unexplained``: a failure that nobody has looked at.
    computed
        What is computed now.
    human
        What the person says, ``None`` where nobody has.
    """

    result: Result
    law: str | None
    kind: str
    computed: str
    human: Said | None


def result_of(run: Run) -> Result:
    """Return the result of a run, without anything a person said."""
    summary = summarise([run])
    standing = summary.standings[0]
    worst = {breach.verdict.law: breach.verdict for breach in summary.breaches}
    seconds: defaultdict[str, float] = defaultdict(float)
    for verdict in run.verdicts:
        seconds[verdict.law] += verdict.seconds
    laws = []
    for chapter in summary.chapters:
        for row in chapter.laws:
            cell, failure = row.cells[0], worst.get(row.law)
            laws.append(
                LawResult(
                    law=row.law,
                    chapter=chapter.name,
                    computed=cell.outcome,
                    worst=cell.score,
                    num_failed=cell.num_failed,
                    num_judged=cell.num_judged,
                    num_unclaimed=cell.num_unclaimed,
                    seconds=round(seconds[row.law], 2),
                    message=failure.message[:LONGEST_MESSAGE] if failure else "",
                    reproduction=failure.reproduction if failure else "",
                    human=None,
                )
            )
    precision = run.claims.get("precision", {})
    return Result(
        implementation=run.implementation,
        version=run.version,
        suite=_text(run.fingerprint, "suite"),
        commit=_text(run.fingerprint, "commit"),
        dirty=bool(run.fingerprint["dirty"]) if isinstance(run.fingerprint.get("dirty"), bool) else None,
        effort=run.effort,
        seed=run.seed,
        device=run.device,
        started=run.started,
        seconds=run.finish.seconds if run.finish else None,
        machine={name: _text(run.fingerprint, name) for name in MACHINE},
        precision={str(dtype): str(name) for dtype, name in precision.items()} if isinstance(precision, dict) else {},
        not_claimed=_not_claimed(run.claims),
        computed=standing.status,
        summary=standing.summary,
        human=None,
        laws=laws,
    )


def collect(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the file of every run, keeping what a person said in the file that it replaces.

    Returns
    -------
    list[Path]
        The files, in the order of the runs.

    Raises
    ------
    RowError
        If two runs are of one version of one implementation, or a file that would be replaced is no result, or another one's.
    """
    results = [result_of(run) for run in runs]
    seen: dict[str, Result] = {}
    for result in results:
        if result.filename in seen:
            message = f"rows must hold one run of {result.implementation} {result.version}, got two for {result.filename}; collect one"
            raise RowError(message)
        seen[result.filename] = result
    written = {}
    for result in results:
        path = folder / result.filename
        written[path] = with_said(result, read_result(path)) if path.exists() else result
    folder.mkdir(parents=True, exist_ok=True)
    for path, result in written.items():
        path.write_text(as_text(result), encoding="utf-8")
    return list(written)


def with_said(result: Result, before: Result) -> Result:
    """Return a result with what a person said of the same version before.

    Raises
    ------
    RowError
        If the two are of different implementations or versions.
    """
    now, then = (f"{each.implementation} {each.version}" for each in (result, before))
    if now != then:
        message = f"{result.filename} must be of {now}, got a file of {then}; rename one of the implementations"
        raise RowError(message)
    said = {law.law: law for law in before.laws if law.human is not None}
    laws = [replace(law, human=said.pop(law.law).human) if law.law in said else law for law in result.laws]
    # What was said of a law that no longer ran stays, and shows as stale.
    gone = [
        replace(law, computed="absent", worst=None, num_failed=0, num_judged=0, num_unclaimed=0, seconds=0.0)
        for law in said.values()
    ]
    return replace(result, human=before.human, laws=[*laws, *gone])


def say(result: Result, law: str | None, verdict: str, reason: str, finding: str) -> Result:
    """Return a result with what a person says of a law, or of the whole where ``law`` is ``None``.

    Raises
    ------
    RowError
        If there is no such law or verdict, no reason, or no finding for a failure.
    """
    if law is not None and law not in {each.law for each in result.laws}:
        message = (
            f"law must be one of {result.filename}, got {law!r}; it has {', '.join(each.law for each in result.laws)}"
        )
        raise RowError(message)
    computed = result.computed if law is None else next(each.computed for each in result.laws if each.law == law)
    plain = {"verdict": verdict, "of": computed, "reason": reason, "finding": finding}
    said = _said(Fields(plain, "what is said"), OUTCOMES if law else STATUSES)
    if law is None:
        return replace(result, human=said)
    return replace(result, laws=[replace(each, human=said) if each.law == law else each for each in result.laws])


def differences(results: Sequence[Result]) -> list[Difference]:
    """Return where a person and the machine do not say the same, or where nobody has looked at a failure."""
    found = []
    for result in results:
        places: list[tuple[str | None, str, Said | None]] = [(None, result.computed, result.human)]
        places += [(law.law, law.computed, law.human) for law in result.laws]
        for law, computed, human in places:
            if kind := _difference(computed, human, whole=law is None):
                found.append(Difference(result=result, law=law, kind=kind, computed=computed, human=human))
    return found


def _difference(computed: str, human: Said | None, *, whole: bool) -> str | None:
    broken = computed in ("fail", "error")
    if human is None:
        # Who breaks a law is explained law by law.
        return "unexplained" if broken and not whole else None
    if human.of != computed:
        return "stale"
    agreed = human.verdict == ("fail" if broken else computed)
    return None if agreed else "contradicts"


def read_results(folder: Path) -> list[Result]:
    """Read all results of a folder, by name.

    Raises
    ------
    RowError
        If there is none, or a file is no result.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        message = f"results must be files of {folder}, got none; make them with `kda table collect`"
        raise RowError(message)
    return [read_result(path) for path in paths]


def read_result(path: Path) -> Result:
    """Read one result, strictly.

    Raises
    ------
    RowError
        If the file cannot be read, a field lacks or is misshapen, or the file has not the name of what it holds.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"result {path.name} must be readable text, got {error}; make it with `kda table collect`"
        raise RowError(message) from error
    row = Fields.parse(text, path.name)
    if (schema := row.get("schema", int)) != SCHEMA:
        raise row.error("schema", f"be {SCHEMA}", str(schema))
    result = Result(
        **{
            name: row.get(name, str) for name in ("implementation", "version", "effort", "device", "started", "summary")
        },
        **{name: _optional(row, name, str) for name in ("suite", "commit")},
        dirty=_optional(row, "dirty", bool),
        seed=row.get("seed", int),
        seconds=None if row.get("seconds", object) is None else row.number("seconds"),
        machine={name: _optional(row.inner("machine"), name, str) for name in row.inner("machine").fields},
        precision={name: row.inner("precision").get(name, str) for name in row.inner("precision").fields},
        not_claimed=_words(row, "not_claimed"),
        computed=row.one_of("computed", STATUSES),
        human=_said(row.inner("human"), STATUSES) if row.get("human", object) is not None else None,
        laws=[_law(row.inner("laws").inner(name), name) for name in row.inner("laws").fields],
    )
    if result.filename != path.name:
        raise row.error("implementation and version", f"be those of {path.name}", repr(result.filename))
    return result


def as_text(result: Result) -> str:
    """Return the file of a result: the same text for the same result."""
    plain = asdict(result)
    laws = {law.pop("law"): law for law in plain.pop("laws")}
    return json.dumps(_finite({"schema": SCHEMA, **plain, "laws": laws}), indent=1, allow_nan=False) + "\n"


def _law(row: Fields, name: str) -> LawResult:
    return LawResult(
        law=name,
        chapter=row.get("chapter", str),
        computed=row.one_of("computed", OUTCOMES),
        worst=None if row.get("worst", object) is None else row.number("worst"),
        **{count: row.get(count, int) for count in ("num_failed", "num_judged", "num_unclaimed")},
        seconds=row.number("seconds"),
        message=row.get("message", str),
        reproduction=row.get("reproduction", str),
        human=_said(row.inner("human"), OUTCOMES) if row.get("human", object) is not None else None,
    )


def _said(row: Fields, computed: tuple[str, ...]) -> Said:
    said = Said(
        verdict=row.one_of("verdict", SAID),
        of=row.one_of("of", computed),
        reason=row.get("reason", str),
        finding=row.get("finding", str),
    )
    if not said.reason.strip():
        raise row.error("reason", "say why", repr(said.reason))
    if said.verdict == "fail" and not said.finding.strip():
        raise row.error("finding", "name the report on a failure", repr(said.finding))
    return said


def _optional(row: Fields, name: str, wanted: type[Any]) -> Any:  # noqa: ANN401 - of the type that is wanted
    return None if row.get(name, object) is None else row.get(name, wanted)


def _words(row: Fields, name: str) -> list[str]:
    words = row.get(name, list)
    if not all(isinstance(word, str) for word in words):
        raise row.error(name, "hold words", repr(words))
    return [str(word) for word in words]


def _not_claimed(claims: Mapping[str, object]) -> list[str]:
    missing = [name for name, value in claims.items() if value is False]
    always = claims.get("only_in_kernel")
    missing += [f"{name} applied by the caller" for name in always] if isinstance(always, list) else []
    widths = {name: claims.get(name) for name in ("head_widths", "max_k_width")}
    return missing + [f"other than {name} {value}" for name, value in widths.items() if value is not None]


def _text(fingerprint: Mapping[str, object], name: str) -> str | None:
    value = fingerprint.get(name)
    return None if value is None else str(value)


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

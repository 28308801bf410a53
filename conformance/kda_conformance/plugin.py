"""The pytest plugin: options, the parameters of laws, outcomes as rows.

``pytest --pyargs kda_conformance.suite --impl NAME`` judges one implementation. Without ``--impl`` the plugin does nothing, so that
having it installed changes no other test run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kda_reference import CertificateError

from kda_conformance import battery, deviations
from kda_conformance.cases import Case
from kda_conformance.claims import DTYPES, UsageError, narrow, read_claims
from kda_conformance.devices import choose_device
from kda_conformance.discovery import find_implementation
from kda_conformance.rows import RowWriter, run_row
from kda_conformance.subject import RECORDED, Call, LawViolation, Subject

if TYPE_CHECKING:
    from collections.abc import Generator

SUBJECT = pytest.StashKey[Subject]()
WRITER = pytest.StashKey[RowWriter]()
BROKEN = pytest.StashKey[set[str]]()
REPORTED = "kda"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a conformance run."""
    group = parser.getgroup("kda", "Kimi Delta Attention conformance")
    group.addoption(
        "--impl", dest="kda_impl", metavar="SPEC", help="entry point, package.module:callable or path/file.py:callable"
    )
    group.addoption(
        "--claims", dest="kda_claims", metavar="FILE", help="TOML that narrows what the implementation claims"
    )
    group.addoption(
        "--deviations", dest="kda_deviations", metavar="FILE", help="TOML of declared failures: test, reason, issue"
    )
    group.addoption("--effort", dest="kda_effort", choices=battery.EFFORTS, default="standard", help="how much is run")
    group.addoption(
        "--kda-device", dest="kda_device", default=None, help="cpu or cuda; default: cuda where available and claimed"
    )
    group.addoption(
        "--kda-rows", dest="kda_rows", metavar="FILE", help="append one JSON row per verdict and measurement"
    )
    group.addoption(
        "--kda-first-failure",
        dest="kda_first_failure",
        action="store_true",
        help="once a law is broken, skip its other calls",
    )
    group.addoption(
        "--kda-seed", dest="kda_seed", type=int, default=0, metavar="N", help="judge the N-th draw of every call"
    )
    group.addoption(
        "--kda-backwards",
        dest="kda_backwards",
        action="store_true",
        help="judge the last call first: two runs side by side that start at different ends share the budgets they compute",
    )
    group.addoption("--law", dest="kda_law", help="run only this law")
    group.addoption("--case", dest="kda_case", help="run laws on this case instead of the battery")
    group.addoption("--dtype", dest="kda_dtype", choices=sorted(DTYPES), help="run only this input dtype")


def pytest_configure(config: pytest.Config) -> None:
    """Load the implementation before anything is collected, so that a wrong name is a usage error."""
    config.addinivalue_line(
        "markers",
        "law(name, cases=None, generated=False, first=False): the law a test states, the cases it runs on, whether it comes first",
    )
    if config.getoption("kda_impl") is None:
        return
    pytest.register_assert_rewrite("kda_conformance.suite")
    try:
        config.stash[SUBJECT] = _subject(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    if config.getoption("kda_first_failure"):
        config.stash[BROKEN] = set()
    # Of several processes the one that collects the reports of all writes the rows.
    if (path := config.getoption("kda_rows")) and not hasattr(config, "workerinput"):
        subject = config.stash[SUBJECT]
        writer = RowWriter(Path(path))
        config.stash[WRITER] = writer
        writer.write(run_row(subject, config.getoption("kda_effort"), writer.run))


def _subject(config: pytest.Config) -> Subject:
    spec = config.getoption("kda_impl")
    implementation = find_implementation(spec)
    claims, options = implementation.claims, ""
    if path := config.getoption("kda_claims"):
        claims = narrow(claims, read_claims(Path(path)), path)
        options += f" --claims {path}"
    if seed := config.getoption("kda_seed"):
        options += f" --seed {seed}"
    device = choose_device(config.getoption("kda_device"), claims, spec)
    return Subject(implementation=implementation, claims=claims, device=device, spec=spec, options=options, seed=seed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a law its calls: every claimed dtype on every case of the effort."""
    subject = metafunc.config.stash.get(SUBJECT, None)
    marker = metafunc.definition.get_closest_marker("law")
    if subject is None or marker is None or not {"call", "dtype"} & set(metafunc.fixturenames):
        return
    chosen = metafunc.config.getoption("kda_dtype")
    if chosen is not None and chosen not in subject.claims.precision:
        message = (
            f"--dtype must be claimed by {subject.spec}, got {chosen}; claimed are {sorted(subject.claims.precision)}"
        )
        raise pytest.UsageError(message)
    dtypes = [chosen] if chosen else list(subject.claims.precision)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", dtypes)
        return
    if text := metafunc.config.getoption("kda_case"):
        try:
            calls = [Call(Case.parse(text), dtype) for dtype in dtypes]
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
    else:
        effort = metafunc.config.getoption("kda_effort")
        cases = tuple(case.redrawn(subject.seed) for case in marker.kwargs.get("cases", battery.cases_at)(effort))
        if "cases" in marker.kwargs and effort in ("quick", "standard"):
            # Where a law has calls of its own, dtypes take turns, and not every law begins with the same.
            calls = _taking_turns(cases, dtypes, start=len(marker.args[0]))
        elif effort == "quick":
            calls = _taking_turns(cases, dtypes, shared=2)
        else:
            calls = [Call(case, dtype) for case in cases for dtype in _fitting(case, dtypes)]
    metafunc.parametrize("call", calls, ids=str)


def _taking_turns(cases: tuple[Case, ...], dtypes: list[str], *, start: int = 0, shared: int = 0) -> list[Call]:
    """Give every case one dtype, each in its turn from ``start`` on, but the first ``shared`` cases all of them."""
    calls = []
    for i, case in enumerate(cases):
        fitting = _fitting(case, dtypes)
        turn = dtypes[(start + i) % len(dtypes)]
        chosen = fitting if i < shared else [turn] if turn in fitting else fitting[:1]
        calls += [Call(case, dtype) for dtype in chosen]
    return calls


def _fitting(case: Case, dtypes: list[str]) -> list[str]:
    return [dtype for dtype in dtypes if battery.fits(case, dtype)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the chosen law, and turn declared deviations into strict expected failures."""
    if SUBJECT not in config.stash:
        return
    if config.getoption("kda_backwards"):
        items.reverse()
    # What a law says of the first call of a process must be asked first.
    items.sort(key=lambda item: not _is_first(item))
    if law := config.getoption("kda_law"):
        kept = [item for item in items if _law(item) == law]
        if not kept:
            laws = sorted({_law(item) for item in items})
            message = f"--law must name a law, got {law!r}; laws are {laws}"
            raise pytest.UsageError(message)
        config.hook.pytest_deselected(items=[item for item in items if _law(item) != law])
        items[:] = kept
    if path := config.getoption("kda_deviations"):
        partial = bool(
            law or config.getoption("kda_case") or config.getoption("kda_dtype") or config.getoption("keyword")
        )
        try:
            deviations.apply(Path(path), items, partial=partial)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error


def _is_first(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("law")
    return marker is not None and bool(marker.kwargs.get("first"))


def _law(item: pytest.Item) -> str:
    marker = item.get_closest_marker("law")
    return marker.args[0] if marker else ""


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """Return the implementation on trial, told which law is running."""
    found = request.config.stash.get(SUBJECT, None)
    if found is None:
        pytest.fail("a conformance law needs an implementation: pass --impl NAME", pytrace=False)
    found.law, found.test, found.measures = _law(request.node), request.node.nodeid, []
    return found


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> str:
    """How much is run."""
    return str(request.config.getoption("kda_effort"))


@pytest.fixture(autouse=True)
def _skip_unclaimed_calls(request: pytest.FixtureRequest) -> None:
    if _law(request.node) in request.config.stash.get(BROKEN, ()):
        pytest.skip("not needed: the law is broken already")
    if "call" in request.fixturenames and "subject" in request.fixturenames:
        request.getfixturevalue("subject").require(request.getfixturevalue("call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach to the report what the row needs; attached data travel from worker processes too."""
    report = yield
    subject = item.config.stash.get(SUBJECT, None)
    if subject is None or not _law(item):
        return report
    if report.failed and BROKEN in item.config.stash:
        item.config.stash[BROKEN].add(_law(item))
    decisive = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
    if decisive:
        params = getattr(getattr(item, "callspec", None), "params", {})
        violation = call.excinfo.value if call.excinfo is not None else None
        this: Call | None = violation.call if isinstance(violation, LawViolation) else params.get("call")
        if report.failed and isinstance(report.longrepr, str):
            # An expected failure that passes is reported by its reason alone.
            report.longrepr += "\nthe declared deviation is gone: delete its entry from the deviations file"
        report.user_properties.append((REPORTED, _verdict(item, report, call, subject, this, params.get("dtype", ""))))
    return report


def _verdict(
    item: pytest.Item,
    report: pytest.TestReport,
    call: pytest.CallInfo[None],
    subject: Subject,
    this: Call | None,
    dtype: str,
) -> dict[str, Any]:
    measures = subject.measures if report.when == "call" else []
    dtype = this.dtype if this else dtype
    scores = [row["score"] for row in measures]
    message = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        message = report.longrepr[2].removeprefix("Skipped: ").removeprefix(RECORDED)
    elif call.excinfo is not None:
        message = str(call.excinfo.value) or call.excinfo.typename
    elif report.failed:
        message = str(report.longrepr)
    return {
        "measures": measures,
        "verdict": {
            "law": _law(item),
            "test": item.nodeid,
            "case": str(this.case) if this else "",
            "dtype": dtype,
            "precision": subject.claims.precision.get(dtype, ""),
            "outcome": "error" if _is_uncertified(call) else _outcome(report),
            "score": max(scores, default=None),
            "message": message,
            "reason": getattr(report, "wasxfail", ""),
            "reproduction": subject.reproduction(this) if this else subject.rerun(dtype) if dtype else "",
            "seconds": round(report.duration, 4),
        },
    }


def _is_uncertified(call: pytest.CallInfo[None]) -> bool:
    """Tell whether the reference refused to judge, which is no failure of the implementation."""
    return call.excinfo is not None and isinstance(call.excinfo.value, CertificateError)


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfail" if report.skipped else "fail"
    if report.skipped:
        return "may" if _only_recorded(report) else "unclaimed"
    if report.failed:
        return "fail" if report.when == "call" else "error"
    return "pass"


def _only_recorded(report: pytest.TestReport) -> bool:
    return isinstance(report.longrepr, tuple) and RECORDED in report.longrepr[2]


@pytest.hookimpl(trylast=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show laws that are not claimed as such, apart from ordinary skips."""
    if (
        report.skipped
        and any(name == REPORTED for name, _ in report.user_properties)
        and not hasattr(report, "wasxfail")
    ):
        return ("recorded", "r", "RECORDED") if _only_recorded(report) else ("unclaimed", "u", "UNCLAIMED")
    return None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the rows of a finished test."""
    writer = _Active.writer
    if writer is None:
        return
    for name, value in report.user_properties:
        if name == REPORTED and isinstance(value, dict):
            writer.verdict(value["verdict"], value["measures"])


class _Active:
    """The writer of the running session; reports do not carry their configuration."""

    writer: RowWriter | None = None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the writer of this session the one that receives rows."""
    _Active.writer = session.config.stash.get(WRITER, None)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Close the run: an empty run never counts as a pass."""
    writer = session.config.stash.get(WRITER, None)
    _Active.writer = None
    if writer is None:
        return
    counts = writer.counts
    judged = counts["pass"] + counts["fail"] + counts["error"] + counts["xfail"]
    if judged == 0:
        outcome = "nothing"
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    else:
        outcome = "pass" if exitstatus == pytest.ExitCode.OK else "fail"
    writer.finish(outcome)

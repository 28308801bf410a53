"""Calls nobody wrote down: Hypothesis draws shapes, regimes and flags within the claims, and the judge decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings, target
from hypothesis import strategies as st

from kda_conformance import strategies
from kda_conformance.subject import Call

if TYPE_CHECKING:
    from kda_conformance.subject import Subject

EXAMPLES = {"quick": 4, "wide": 4, "standard": 24, "exhaustive": 400}


@pytest.mark.law("generated-calls-match-reference", generated=True)
def test_generated_calls_are_those_of_the_recurrence(subject: Subject, dtype: str, effort: str) -> None:
    """Outputs and gradients of a drawn call stay within their budgets."""
    nightly = effort == "exhaustive"
    share = max(2, EXAMPLES[effort] // len(subject.claims.precision))

    @settings(
        max_examples=share,
        deadline=None,
        derandomize=not nightly and subject.seed == 0,
        database=settings.default.database if nightly and settings.default else None,
        suppress_health_check=list(HealthCheck),
        # Shrinking pays at night; by day the case's text is reproduction enough.
        phases=tuple(Phase) if nightly else (Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
    )
    @given(data=st.data())
    def law(data: st.DataObject) -> None:
        call = Call(data.draw(strategies.cases(subject.claims, dtype), label="case"), dtype)
        event(f"gate {call.case.gate} {call.case.gate_form}")
        subject.require(call)
        backward = subject.claims.backward
        found = subject.results(call, backward=backward)
        subject.judge(call, found, subject.budget(call))
        if nightly:
            target(float(subject.measures[-1]["score"]), label="score")

    if subject.seed:
        law = hypothesis.seed(subject.seed)(law)
    law()

"""Outputs, final state and every gradient are those of the float64 recurrence, within the budget of the claimed arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject

OUTPUTS = ("o", "final_state")


@pytest.mark.law("forward-matches-reference")
def test_output_is_that_of_the_recurrence(subject: Subject, call: Call) -> None:
    """``o`` of a forward call [KL eq. 1]."""
    found = subject.results(call, backward=False)
    subject.judge(call, {"o": found["o"]}, subject.budget(call))


@pytest.mark.law("final-state-matches-reference")
def test_final_state_is_that_of_the_recurrence(subject: Subject, call: Call) -> None:
    """The state after the last token of every sequence [KL eq. 1]."""
    found = subject.results(call, backward=False)
    subject.judge(call, {"final_state": found["final_state"]}, subject.budget(call))


@pytest.mark.law("gradients-match-reference")
def test_gradients_are_those_of_the_reverse_recurrence(subject: Subject, call: Call) -> None:
    """The gradient of every input, with cotangents on ``o`` and on the final state, as the case says."""
    if not subject.claims.backward:
        pytest.skip("unclaimed: backward")
    found = subject.results(call, backward=True)
    subject.judge(call, {name: tensor for name, tensor in found.items() if name not in OUTPUTS}, subject.budget(call))


@pytest.mark.law("training-forward-matches-reference")
def test_forward_of_a_training_call_is_that_of_the_recurrence(subject: Subject, call: Call) -> None:
    """Outputs of the call that also saves what the backward needs; it may take another path than inference."""
    if not subject.claims.backward:
        pytest.skip("unclaimed: backward")
    found = subject.results(call, backward=True)
    subject.judge(call, {name: found[name] for name in OUTPUTS if name in found}, subject.budget(call))

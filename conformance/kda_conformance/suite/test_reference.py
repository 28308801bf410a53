"""Outputs, final state and every gradient are those of the float64 recurrence, within the budget of the claimed arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kda_conformance import battery
from kda_conformance.implementation import FunctionImplementation
from kda_conformance.members import GRADIENT_OF

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


FROZEN = (("initial_state",), ("q", "k", "g", "A_log", "dt_bias"))


@pytest.mark.law("gradients-do-not-need-each-other", cases=battery.relation_cases_at)
@pytest.mark.parametrize("frozen", FROZEN, ids=",".join)
def test_gradients_are_the_same_where_others_are_not_wanted(
    subject: Subject, call: Call, frozen: tuple[str, ...]
) -> None:
    """An input that needs no gradient, as an initial state or what an adapter does not train, changes no other gradient."""
    if not subject.claims.backward:
        pytest.skip("unclaimed: backward")
    if not isinstance(subject.implementation, FunctionImplementation):
        pytest.skip("not about this implementation: its gradients come all together")
    inputs = subject.inputs(call)
    _, gradients = subject.implementation.vjp(inputs, *call.case.cotangents(inputs), frozenset(frozen))
    wanted = [name for name in inputs.tensors() if name not in frozen]
    found = {GRADIENT_OF[name]: getattr(gradients, name) for name in wanted}
    subject.check_form(call, inputs, found)
    subject.judge(call, found, subject.budget(call))

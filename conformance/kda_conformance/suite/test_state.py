"""The state is all that links the tokens of a sequence: it can be handed over at any token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance import battery, relations
from kda_conformance.members import GRADIENT_OF

if TYPE_CHECKING:
    from kda_conformance.cases import Case
    from kda_conformance.subject import Call, Subject

SPLITS_PER_CASE = {"quick": 2, "wide": 2, "standard": 6, "exhaustive": 24}


@pytest.mark.law("state-splits-at-any-token", cases=battery.relation_cases_at)
def test_state_splits_at_any_token(subject: Subject, call: Call, effort: str) -> None:
    """Part one, then part two from the returned state, is a correct evaluation of the whole."""
    if not subject.claims.initial_state:
        pytest.skip("unclaimed: initial_state")
    whole = subject.inputs(call)
    budget = subject.budget(call)
    for at in relations.split_points(call.case, SPLITS_PER_CASE[effort]):
        first = relations.tokens(whole, slice(0, at))
        head = subject.forward(call, first)
        second = relations.tokens(whole, slice(at, None)).replace(initial_state=head.final_state)
        tail = subject.forward(call, second)
        assert tail.final_state is not None
        joined = {"o": torch.cat([head.o, tail.o], 1), "final_state": tail.final_state}
        subject.judge(call, joined, budget)


@pytest.mark.law("final-state-on-request", cases=battery.relation_cases_at)
def test_asking_for_the_final_state_changes_nothing_else(subject: Subject, call: Call) -> None:
    """Without ``output_final_state`` the state is ``None`` and ``o`` is the same."""
    with_state = subject.results(call, backward=False)
    inputs = subject.inputs(call).replace(output_final_state=False)
    result = subject.implementation.forward(inputs)
    if result.final_state is not None:
        subject.fail(
            call, f"final_state must be None without output_final_state, got a tensor {tuple(result.final_state.shape)}"
        )
    subject.compare(call, "o", result.o, with_state["o"], subject.budget(call)["o"].variance.sqrt())


@pytest.mark.law("zero-state-is-no-state", cases=battery.relation_cases_at)
def test_an_initial_state_of_zeros_is_no_initial_state(subject: Subject, call: Call) -> None:
    """``initial_state=None`` means zeros."""
    if not subject.claims.initial_state:
        pytest.skip("unclaimed: initial_state")
    inputs = subject.inputs(call)
    assert inputs.initial_state is not None
    absent = subject.forward(call, inputs.replace(initial_state=None))
    zeros = subject.forward(call, inputs.replace(initial_state=torch.zeros_like(inputs.initial_state)))
    budget = subject.budget(call, inputs.replace(initial_state=None), backward=False)
    subject.compare(call, "o", absent.o, zeros.o, budget["o"].variance.sqrt())


def losses_on_outputs(effort: str) -> tuple[Case, ...]:
    """Return the calls of the battery whose cotangents leave the final state out."""
    cases = battery.cases_at("standard" if effort == "wide" else effort)
    return tuple(case for case in cases if case.cotangent == "o")


@pytest.mark.law("gradients-without-a-final-state", cases=losses_on_outputs)
def test_gradients_do_not_need_a_final_state(subject: Subject, call: Call) -> None:
    """Gradients of a loss on the outputs are the same where no final state is asked for, as in most training."""
    if not subject.claims.backward:
        pytest.skip("unclaimed: backward")
    inputs = subject.inputs(call)
    do, _ = call.case.cotangents(inputs)
    result, gradients = subject.implementation.vjp(inputs.replace(output_final_state=False), do, None)
    found = {"o": result.o} | {GRADIENT_OF[name]: getattr(gradients, name) for name in inputs.tensors()}
    subject.check_form(call, inputs, found)
    subject.judge(call, found, subject.budget(call))

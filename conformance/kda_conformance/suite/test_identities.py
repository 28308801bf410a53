"""What zero strength and zero decay mean, stated without the recurrence."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kda_conformance import battery, exact, relations

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject


@pytest.mark.law("zero-beta-only-decays", cases=battery.relation_cases_at)
def test_zero_beta_keeps_the_decayed_state(subject: Subject, call: Call) -> None:
    """With beta = 0 the state is ``exp(sum g) S_0`` and the output reads it, whatever k and v are."""
    if not subject.claims.initial_state:
        pytest.skip("unclaimed: initial_state")
    case = call.case.replace(sigmoid=False, gate_form="log_decay", strengths="zero")
    inputs = case.inputs(relations.dtype_of(call), subject.device)
    found = subject.forward(call, inputs)
    budget = subject.budget(call, inputs, backward=False)
    o, final = relations.pure_decay(inputs)
    assert found.final_state is not None
    budget = {"o": replace(budget["o"], value=o), "final_state": replace(budget["final_state"], value=final)}
    subject.judge(call, {"o": found.o, "final_state": found.final_state}, budget, inputs)


@pytest.mark.law("identity-tokens-change-nothing", cases=battery.relation_cases_at)
def test_inserting_tokens_of_zero_beta_and_zero_gate_changes_nothing(subject: Subject, call: Call) -> None:
    """Tokens with beta = 0 and g = 0 leave the other outputs and the final state as they were."""
    case = call.case.replace(sigmoid=False, gate_form="log_decay")
    inputs = case.inputs(relations.dtype_of(call), subject.device)
    stretched, kept = relations.insert_identity_tokens(inputs, call.case.seed)
    found = subject.forward(call, stretched)
    budget = subject.budget(call, inputs, backward=False)
    assert found.final_state is not None
    subject.judge(call, {"o": found.o[:, kept], "final_state": found.final_state}, budget, inputs)


@pytest.mark.law("zero-gate-is-delta-rule", cases=battery.relation_cases_at)
def test_zero_gate_is_the_delta_rule(subject: Subject, call: Call) -> None:
    """With g = 0 the state is the product of ``I - beta k k^T``, written out as DeltaNet."""
    case = call.case.replace(sigmoid=False, gate_form="log_decay", gate="zero", l2norm=False)
    inputs = case.inputs(relations.dtype_of(call), subject.device)
    found = subject.forward(call, inputs)
    budget = subject.budget(call, inputs, backward=False)
    o, final = relations.delta_rule(inputs)
    assert found.final_state is not None
    budget = {"o": replace(budget["o"], value=o), "final_state": replace(budget["final_state"], value=final)}
    subject.judge(call, {"o": found.o, "final_state": found.final_state}, budget, inputs)


@pytest.mark.law("exact-arithmetic-oracle")
def test_integer_calls_are_exact(subject: Subject, dtype: str) -> None:
    """One-hot keys, zero decay, beta in {0, 1} and small integers leave nothing to round: results are exact."""
    for problem in exact.problems(dtype, subject.device, subject.claims):
        found = subject.implementation.forward(problem.inputs)
        for name, got, expected in (("o", found.o, problem.o), ("final_state", found.final_state, problem.final_state)):
            assert got is not None
            subject.same_bits(problem.call, name, got.double(), expected, "all arithmetic is exact")

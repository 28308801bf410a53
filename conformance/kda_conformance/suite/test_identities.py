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


@pytest.mark.law("decays-add-up", cases=battery.relation_cases_at)
def test_decaying_in_two_steps_is_decaying_once(subject: Subject, call: Call) -> None:
    """A token of ``(0, g / 2)`` and then ``(beta, g / 2)`` is one of ``(beta, g)``."""
    inputs = call.case.replace(sigmoid=False, gate_form="log_decay").inputs(relations.dtype_of(call), subject.device)
    split, kept = relations.split_decays(inputs, call.case.seed)
    found = subject.forward(call, split)
    assert found.final_state is not None
    budget = subject.budget(call, inputs, backward=False)
    subject.judge(call, {"o": found.o[:, kept], "final_state": found.final_state}, budget, inputs)


@pytest.mark.law("writes-compose", cases=battery.relation_cases_at)
def test_writing_twice_by_half_is_writing_once_by_three_quarters(subject: Subject, call: Call) -> None:
    """``(b, k, v)`` twice, the second without decay, is ``(1 - (1 - b)^2, k, v)`` for a unit key."""
    case = call.case.replace(sigmoid=False, gate_form="log_decay", l2norm=False, keys="orthogonal")
    inputs = relations.with_unit_keys(case.inputs(relations.dtype_of(call), subject.device))
    split, whole, kept = relations.split_writes(inputs, call.case.seed)
    found = subject.forward(call, split)
    assert found.final_state is not None
    budget = subject.budget(call, whole, backward=False)
    subject.judge(call, {"o": found.o[:, kept], "final_state": found.final_state}, budget, whole)


@pytest.mark.law("chunk-length-is-free", cases=battery.relation_cases_at)
def test_the_length_of_a_chunk_changes_nothing(subject: Subject, call: Call) -> None:
    """The call in chunks of 32 tokens is the call, and its gradients are."""
    if not subject.claims.chunk_size:
        pytest.skip("unclaimed: chunk_size")
    inputs = subject.inputs(call).replace(chunk_size=32)
    cotangents = call.case.cotangents(inputs) if subject.claims.backward else None
    subject.judge(call, subject.run(call, inputs, cotangents), subject.budget(call))


@pytest.mark.law("outputs-add-up", cases=battery.relation_cases_at)
def test_outputs_are_additive_in_values_and_state(subject: Subject, call: Call) -> None:
    """The call is the sum of one with its even values and its state, and one with its odd values."""
    inputs = subject.inputs(call)
    whole = subject.results(call, backward=False)
    budget = subject.budget(call)
    parts = [relations.take_values(inputs, even=even) for even in (True, False)]
    found = [subject.forward(call, part) for part in parts]
    budgets = [subject.budget(call, part, backward=False) for part in parts]
    for name in ("o", "final_state"):
        both = [getattr(result, name) for result in found]
        variance = budget[name].variance + sum(each[name].variance for each in budgets)
        rounding = sum(relations.half_unit(each) for each in both)
        total = both[0].double() + both[1].double()
        subject.compare(call, name, whole[name], total, (variance / 2).sqrt() + rounding)


@pytest.mark.law("last-output-reads-the-final-state", cases=battery.relation_cases_at)
def test_the_last_output_is_read_from_the_final_state(subject: Subject, call: Call) -> None:
    """``o_T = scale S_T^T q_T``."""
    inputs = subject.inputs(call)
    found = subject.results(call, backward=False)
    budget = subject.budget(call)
    # What errors of the state do to what is read from it, for q of unit length or shorter.
    state = budget["final_state"].variance
    state = state.transpose(-1, -2) if inputs.state_v_first else state
    spread = inputs.effective_scale**2 * state.amax(-2)[:, None]
    deviation = (budget["o"].variance[:, -1:] + spread).sqrt()
    expected = relations.last_reads(inputs, found["final_state"])
    subject.compare(call, "o", found["o"][:, -1:], expected, deviation)


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
    """One-hot keys, zero decay, beta in {0, 1} and integers that the claimed operands hold leave nothing to round: results are exact."""
    problems = list(exact.problems(dtype, subject.device, subject.claims, subject.seed))
    if not problems:
        pytest.skip("unclaimed: every call whose arithmetic is exact")
    for problem in problems:
        found = subject.implementation.forward(problem.inputs)
        for name, got, expected in (("o", found.o, problem.o), ("final_state", found.final_state, problem.final_state)):
            assert got is not None
            subject.same_bits(problem.call, name, got.double(), expected, "all arithmetic is exact")

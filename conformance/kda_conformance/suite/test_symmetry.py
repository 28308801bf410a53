"""Changes of basis that the operator commutes with; all are exact in every dtype, so only rounding inside may differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance import battery, relations
from kda_conformance.service import budget_of

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject


@pytest.mark.law("value-rotation", cases=battery.relation_cases_at)
def test_rotating_values_rotates_outputs_and_state(subject: Subject, call: Call) -> None:
    """``v -> v Q`` and ``S_0 -> S_0 Q`` with orthogonal Q give ``o Q`` and ``S Q``."""
    plain = relations.on_grid(subject.inputs(call))
    rotation = relations.dyadic_rotation(call.case.V, call.case.seed).to(plain.v.device)
    turned = relations.rotate_values(plain, rotation)
    one, two = subject.forward(call, plain), subject.forward(call, turned)
    budgets = [subject.budget(call, inputs, backward=False) for inputs in (plain, turned)]
    assert one.final_state is not None
    assert two.final_state is not None
    for name, a, b, axis in (
        ("o", one.o, two.o, -1),
        ("final_state", one.final_state, two.final_state, -2 if call.case.v_first else -1),
    ):
        expected = relations.apply_last(a.double(), rotation, axis)
        spread = relations.apply_last(budgets[0][name].variance, rotation**2, axis)
        half = relations.apply_last(relations.half_unit(a) ** 2, rotation**2, axis)
        subject.compare(call, name, b, expected, ((spread + budgets[1][name].variance) / 2 + half).sqrt())


@pytest.mark.law("key-signed-permutation", cases=battery.relation_cases_at)
def test_permuting_and_flipping_channels_changes_nothing(subject: Subject, call: Call) -> None:
    """q, k, g and the rows of ``S_0`` under a signed permutation of the channels leave ``o`` and move ``S``."""
    inputs = subject.inputs(call)
    order, signs = relations.signed_permutation(call.case.K, call.case.seed)
    order, signs = order.to(inputs.q.device), signs.to(inputs.q.device)
    before = subject.results(call, backward=False)
    after = subject.forward(call, relations.permute_channels(inputs, order, signs))
    assert after.final_state is not None
    deviation = {name: entry.variance.sqrt() for name, entry in subject.budget(call).items()}
    subject.compare(call, "o", after.o, before["o"], deviation["o"])
    moved = relations.permute_state(before["final_state"], order, signs, v_first=call.case.v_first)
    spread = relations.permute_state(deviation["final_state"], order, signs.abs(), v_first=call.case.v_first)
    subject.compare(call, "final_state", after.final_state, moved, spread)


@pytest.mark.law("sign-of-a-token", cases=battery.relation_cases_at)
def test_negating_key_and_value_of_a_token_changes_nothing(subject: Subject, call: Call) -> None:
    """``(k_t, v_t) -> -(k_t, v_t)`` changes no bit of the outputs or the state."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)
    after = subject.forward(call, relations.negate_tokens(inputs, call.case.seed))
    assert after.final_state is not None
    deviation = {name: entry.variance.sqrt() for name, entry in subject.budget(call).items()}
    subject.compare(call, "o", after.o, before["o"], deviation["o"])
    subject.compare(call, "final_state", after.final_state, before["final_state"], deviation["final_state"])


@pytest.mark.law("sign-of-queries", cases=battery.relation_cases_at)
def test_negating_queries_negates_outputs(subject: Subject, call: Call) -> None:
    """``q -> -q`` gives ``-o`` and leaves the state alone."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)
    after = subject.forward(call, inputs.replace(q=-inputs.q))
    assert after.final_state is not None
    deviation = {name: entry.variance.sqrt() for name, entry in subject.budget(call).items()}
    subject.compare(call, "o", -after.o, before["o"], deviation["o"])
    subject.compare(call, "final_state", after.final_state, before["final_state"], deviation["final_state"])


@pytest.mark.law("scale-of-values", cases=battery.relation_cases_at)
def test_a_power_of_two_on_values_and_state_scales_the_result(subject: Subject, call: Call) -> None:
    """``(v, S_0) -> -(v, S_0) / 2`` gives ``-o / 2`` and ``-S / 2``."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)
    after = subject.forward(call, relations.scale_values(inputs, -0.5))
    assert after.final_state is not None
    deviation = {name: entry.variance.sqrt() for name, entry in subject.budget(call).items()}
    subject.compare(call, "o", after.o * -2, before["o"], deviation["o"])
    subject.compare(call, "final_state", after.final_state * -2, before["final_state"], deviation["final_state"])


SMALLEST_COTANGENT = 2.0**-40


@pytest.mark.law("scale-of-cotangents", cases=battery.relation_cases_at)
def test_a_power_of_two_on_the_cotangent_of_the_state_scales_the_gradients(subject: Subject, call: Call) -> None:
    """``dS_T -> 2^-40 dS_T`` gives gradients ``2^-40`` times as large; only a class of float16 operands may lose them."""
    if not subject.claims.backward:
        pytest.skip("unclaimed: backward")
    arithmetic = subject.arithmetic(call)
    if arithmetic.state == "fp16":
        pytest.skip("not about this class: its states, and so their cotangents, have float16's range")
    inputs = subject.inputs(call)
    _, dfinal_state = call.case.replace(cotangent="state").cotangents(inputs)
    assert dfinal_state is not None
    found, budgets = [], []
    for factor in (1.0, SMALLEST_COTANGENT):
        found.append(subject.evaluate(call, inputs, None, dfinal_state * factor))
        budgets.append(budget_of(inputs, None, dfinal_state * factor, arithmetic))
    for name, tensor in found[1].items():
        # A gradient in float16 cannot hold so small a number, whatever computes it.
        if name in budgets[0] and name not in ("o", "final_state") and tensor.dtype != torch.float16:
            scaled = budgets[1][name].variance / SMALLEST_COTANGENT**2
            deviation = ((budgets[0][name].variance + scaled) / 2).sqrt()
            subject.compare(call, name, tensor / SMALLEST_COTANGENT, found[0][name], deviation)

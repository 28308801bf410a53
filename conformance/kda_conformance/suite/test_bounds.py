"""What the state can never do: gain energy beyond what is written, or remember more than the decay leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kda_conformance import battery, relations
from kda_conformance.judge import Z_LIMIT

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject

ROUNDING = 1.01


@pytest.mark.law("state-energy-is-bounded", cases=battery.relation_cases_at)
def test_the_state_holds_no_more_than_was_written(subject: Subject, call: Call) -> None:
    """``|S_T|^2 <= |S_0|^2 + sum beta |v|^2`` for unit keys and ``beta <= 1``."""
    case = call.case.replace(sigmoid=False, gate_form="log_decay", l2norm=False, beta_max=1, keys="random")
    inputs = relations.with_unit_keys(case.inputs(relations.dtype_of(call), subject.device))
    found = subject.forward(call, inputs)
    assert found.final_state is not None
    energy = found.final_state.double().square().sum((-1, -2))
    written = (inputs.beta.double() * inputs.v.double().square().sum(-1)).sum(1)
    start = 0 if inputs.initial_state is None else inputs.initial_state.double().square().sum((-1, -2))
    excess = (energy / (ROUNDING * (start + written)).clamp(min=1e-300)).max()
    if not float(excess) <= 1:
        subject.fail(
            call, f"the energy of the state must not exceed what was written, got {float(excess):.4g} times as much"
        )


@pytest.mark.law("states-contract", cases=battery.relation_cases_at)
def test_two_initial_states_come_together_as_the_slowest_channel_decays(subject: Subject, call: Call) -> None:
    """``|S_T(S_0) - S_T(S_0')| <= prod max_d exp(g_d) |S_0 - S_0'|`` per value channel, for unit keys and ``beta <= 2``."""
    if not subject.claims.initial_state:
        pytest.skip("unclaimed: initial_state")
    case = call.case.replace(sigmoid=False, gate_form="log_decay", l2norm=False, keys="random", state=True)
    inputs = relations.with_unit_keys(case.inputs(relations.dtype_of(call), subject.device))
    other = inputs.replace(initial_state=relations.other_state(inputs))
    results = [subject.forward(call, each).final_state for each in (inputs, other)]
    budgets = [subject.budget(call, each, backward=False)["final_state"].variance for each in (inputs, other)]
    axis = -1 if inputs.state_v_first else -2
    assert results[0] is not None
    assert results[1] is not None
    assert inputs.initial_state is not None
    assert other.initial_state is not None
    apart = (results[0].double() - results[1].double()).norm(dim=axis)
    before = (inputs.initial_state.double() - other.initial_state.double()).norm(dim=axis)
    slowest = inputs.g.double().amax(-1).sum(1).exp()[..., None]
    noise = Z_LIMIT * (budgets[0] + budgets[1]).sum(axis).sqrt()
    if not bool((apart <= slowest * before + noise).all()):
        worst = float((apart / (slowest * before + noise)).max())
        subject.fail(
            call,
            f"two states must come together as fast as the slowest channel decays, got {worst:.4g} times the distance",
        )

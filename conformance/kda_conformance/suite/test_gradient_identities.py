"""Exact relations between results, cotangents and gradients, which hold without a reference.

The operator is linear in the queries of a token, and jointly linear in the values and the initial state; a gate's derivative at the
first token sees nothing but the initial state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance import battery, relations
from kda_conformance.judge import Z_LIMIT

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor

    from kda_conformance.budget import Budget
    from kda_conformance.subject import Call, Subject


class Evaluation:
    """A call with its cotangents, results, gradients and budget, in float64."""

    def __init__(self, subject: Subject, call: Call, inputs: KdaInputs) -> None:
        self.subject, self.call, self.inputs = subject, call, inputs
        self.do, self.dfinal_state = call.case.cotangents(inputs)
        self.found = subject.evaluate(call, inputs, self.do, self.dfinal_state)
        self.budget: Budget = subject.budget(call, inputs)

    def cotangent(self, name: str) -> Tensor:
        """Return the cotangent of ``o`` or ``final_state``, zeros where the case leaves it out."""
        given = self.do if name == "o" else self.dfinal_state
        return torch.zeros_like(self.budget[name].value) if given is None else given.double()

    def variance(self, name: str) -> Tensor:
        """Return how far an element may be off, its rounding to its own dtype included, squared."""
        return self.budget[name].variance + relations.half_unit(self.found[name]) ** 2

    def demand(self, one: Tensor, two: Tensor, variance: Tensor, what: str) -> None:
        """Demand that two float64 tensors agree within ten deviations everywhere."""
        error = (one - two).abs() / variance.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        if not bool((error <= Z_LIMIT).all()):
            at = tuple(torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
            self.subject.fail(
                self.call,
                f"{what} must hold, got {float(one[at]):.6g} against {float(two[at]):.6g} at {tuple(int(i) for i in at)}, "
                f"{float(error[at]):.3g} deviations of {Z_LIMIT:g}",
            )


def evaluate(subject: Subject, call: Call) -> Evaluation:
    """Evaluate the call without activations in the kernel, in whose gradients the relations are plain."""
    if not subject.claims.backward:
        pytest.skip("unclaimed: backward")
    case = call.case.replace(sigmoid=False, gate_form="log_decay", l2norm=False)
    return Evaluation(subject, call, case.inputs(relations.dtype_of(call), subject.device))


@pytest.mark.law("query-gradients-reproduce-outputs", cases=battery.relation_cases_at)
def test_queries_times_their_gradients_are_outputs_times_cotangents(subject: Subject, call: Call) -> None:
    """``<q_t, dq_t> = <o_t, do_t>`` for every token and query head, since ``o_t`` is linear in ``q_t``."""
    this = evaluate(subject, call)
    heads = (this.inputs.q.shape[2], -1)
    q, o, do = this.inputs.q.double(), this.found["o"].double(), this.cotangent("o")
    left = (q * this.found["dq"].double()).sum(-1)
    right = (o * do).sum(-1).unflatten(2, heads).sum(-1)
    variance = (q**2 * this.variance("dq")).sum(-1) + (do**2 * this.variance("o")).sum(-1).unflatten(2, heads).sum(-1)
    this.demand(left, right, variance, "<q, dq> = <o, do>")


@pytest.mark.law("value-gradients-reproduce-results", cases=battery.relation_cases_at)
def test_values_and_states_times_their_gradients_are_results_times_cotangents(subject: Subject, call: Call) -> None:
    """``<v, dv> + <S_0, dS_0> = <o, do> + <S_T, dS_T>`` for every value head, by Euler's theorem."""
    this = evaluate(subject, call)
    terms = {"v": ("dv", (0, 1, 3)), "initial_state": ("dinitial_state", (0, 2, 3))}
    left, right, variance = (
        torch.zeros(call.case.G, dtype=torch.float64, device=this.inputs.v.device) for _ in range(3)
    )
    for name, (gradient, axes) in terms.items():
        given = getattr(this.inputs, name)
        if given is not None:
            left = left + (given.double() * this.found[gradient].double()).sum(axes)
            variance = variance + (given.double() ** 2 * this.variance(gradient)).sum(axes)
    for name, axes in (("o", (0, 1, 3)), ("final_state", (0, 2, 3))):
        right = right + (this.found[name].double() * this.cotangent(name)).sum(axes)
        variance = variance + (this.cotangent(name) ** 2 * this.variance(name)).sum(axes)
    this.demand(left, right, variance, "<v, dv> + <S_0, dS_0> = <o, do> + <S_T, dS_T>")


@pytest.mark.law("first-gate-gradient-is-that-of-the-state", cases=battery.relation_cases_at)
def test_the_gate_of_the_first_token_decays_the_initial_state_alone(subject: Subject, call: Call) -> None:
    """``dg_1 = sum_v S_0 dS_0`` for every channel of every row."""
    this = evaluate(subject, call)
    if this.inputs.initial_state is None:
        pytest.skip("not about this case: no initial state")
    state, gradient, variance = (
        this.inputs.initial_state.double(),
        this.found["dinitial_state"].double(),
        this.variance("dinitial_state"),
    )
    axis = -2 if this.inputs.state_v_first else -1
    first = this.found["dg"].double()[:, 0]
    spread = (state**2 * variance).sum(axis) + this.variance("dg")[:, 0]
    this.demand(first, (state * gradient).sum(axis), spread, "dg_1 = <S_0, dS_0>")

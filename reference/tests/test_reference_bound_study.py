"""Bounds of drawn calls hold and are not idle; bounds by element, and intervals, are useless for this recurrence."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from bound_study import Tally, compare_with_double_double, study
from kda_reference import KdaInputs, certified_kda, certified_kda_vjp, oracle_kda
from kda_reference.oracle import exact
from reference_cases import cotangents, make_inputs

UNIT = 2.0**-53


def test_bounds_of_drawn_calls_hold_and_are_not_idle() -> None:
    for tally in study(range(30)):
        assert tally.exceeded == []
        assert tally.compared > 1500
        assert 1 < statistics.median(tally.slack) < 1e3


@pytest.mark.parametrize("gate", ["moderate", "one_channel"])
def test_bounds_hold_at_the_width_of_a_model(gate: str) -> None:
    inputs = make_inputs(T=96, K=128, V=16, gate=gate, l2norm=True, beta_form="doubled")
    tally, certified = Tally(), certified_kda_vjp(inputs, *cotangents(inputs))
    compare_with_double_double(inputs, certified, 0, tally)
    assert tally.exceeded == []
    for name, bound in certified.bound.items():
        assert bound.max() < 1e-9 * certified.value[name].abs().max(), name


@pytest.mark.parametrize("factor", [1e-150, 1e-165, 1e-180, 1e-240])
def test_bounds_hold_where_squares_underflow(factor: float) -> None:
    inputs = make_inputs(T=60, gate="zero", key="repeated", beta=(0.0, 0.01))
    assert inputs.initial_state is not None
    inputs = inputs.replace(v=inputs.v * factor, initial_state=inputs.initial_state * factor)
    certified, truth = certified_kda(inputs), oracle_kda(inputs)
    with mpmath.workdps(60):
        for name, expected in (("o", truth.o), ("final_state", truth.final_state)):
            assert (abs(exact(certified.value[name]) - expected) <= exact(certified.bound[name])).all()


def repeated_key(tokens: int, beta: float) -> KdaInputs:
    return make_inputs(T=tokens, K=3, V=1, gate="zero", key="repeated", beta=(beta, beta))


def interval_widths(inputs: KdaInputs) -> list[float]:
    """Return the widest interval of the state after each token, in interval arithmetic with the precision of a double."""
    intervals = mpmath.iv
    intervals.prec = 53
    lift = np.frompyfunc(intervals.mpf, 1, 1)
    k, v, beta = (lift(x[0, :, 0].double().numpy().astype(object)) for x in (inputs.k, inputs.v, inputs.beta))
    assert inputs.initial_state is not None
    state, widths = lift(inputs.initial_state[0, 0].numpy().astype(object)), []
    for t in range(len(v)):
        error = v[t] - state.T @ k[t]
        state = state + np.outer(k[t], error) * beta[t]
        widths.append(max(float(x.delta) for x in state.ravel()))
    return widths


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_intervals_grow_by_a_constant_factor_a_token(beta: float) -> None:
    tokens = 40
    inputs = repeated_key(tokens, beta)
    widths = interval_widths(inputs)
    # An interval forgets that the state and what is subtracted from it are the same number: widths multiply by about 1 + beta.
    growth = [after / before for before, after in pairwise(widths[10:])]
    assert statistics.median(growth) == pytest.approx(1 + beta, rel=0.05)
    assert widths[-1] > 1e8 * float(certified_kda(inputs).bound["final_state"].max())


def test_bounds_by_element_grow_without_limit_where_columns_do_not() -> None:
    inputs = make_inputs(T=300, K=16, V=1, gate="zero", beta=(1.0, 1.0))
    k, by_element = inputs.k[0, :, 0], torch.full((16,), UNIT, dtype=torch.float64)
    for key in k:
        by_element = (torch.eye(16, dtype=torch.float64) - torch.outer(key, key)).abs() @ by_element
    certified = certified_kda(inputs)
    assert by_element.max() > 1e10
    assert certified.bound["final_state"].max() < 1e-11


def test_the_bound_is_an_honest_judge_of_a_single_wrong_bit() -> None:
    inputs = make_inputs(T=20, K=8, V=4)
    wrong: dict[str, Any] = {"v": inputs.v.clone()}
    wrong["v"][0, 0, 0, 0] *= 1 + 2.0**-30
    certified, moved = certified_kda(inputs), certified_kda(inputs.replace(**wrong))
    assert ((certified.value["o"] - moved.value["o"]).abs() > certified.bound["o"])[0, 0, 0, 0]

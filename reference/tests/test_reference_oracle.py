"""The oracle agrees with itself at other precisions, with rational arithmetic and with closed forms."""

from __future__ import annotations

import random
from fractions import Fraction

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from kda_reference import KdaInputs, ShapeError, oracle_gradient, oracle_jvp, oracle_kda
from kda_reference.oracle import exact
from reference_cases import cotangents, make_inputs


def test_precision_does_not_change_the_result() -> None:
    inputs = make_inputs(lengths=(5, 0, 4), l2norm=True, gate_form="softplus", beta_form="doubled")
    low, high = oracle_kda(inputs, digits=30), oracle_kda(inputs, digits=70)
    with mpmath.workdps(70):
        assert abs(low.o - high.o).max() < 1e-27
        assert abs(low.final_state - high.final_state).max() < 1e-27
        assert abs(low.o - high.o).max() > 1e-40


def test_rational_arithmetic_gives_the_same_state() -> None:
    inputs = make_inputs(T=4, K=2, V=2, gate="zero")
    assert inputs.initial_state is not None
    state = [[Fraction(x) for x in row] for row in inputs.initial_state[0, 0].tolist()]
    for t in range(4):
        k, v = ([Fraction(x) for x in tensor[0, t, 0].tolist()] for tensor in (inputs.k, inputs.v))
        beta = Fraction(inputs.beta[0, t, 0].item())
        error = [v[j] - sum(state[i][j] * k[i] for i in range(2)) for j in range(2)]
        state = [[state[i][j] + beta * k[i] * error[j] for j in range(2)] for i in range(2)]
    found = oracle_kda(inputs, digits=400).final_state[0, 0]
    with mpmath.workdps(400):
        for i in range(2):
            for j in range(2):
                difference = found[i, j] - mpmath.mpf(state[i][j].numerator) / state[i][j].denominator
                assert abs(difference) < mpmath.mpf(10) ** -390


def test_one_token_has_the_closed_form() -> None:
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    inputs = KdaInputs(q=ones * 3, k=ones, v=ones * 5, g=ones * -2, beta=ones[0] * 0.25, initial_state=ones * 7)
    found = oracle_kda(inputs)
    with mpmath.workdps(60):
        decayed = 7 * mpmath.exp(-2)
        state = decayed + (5 - decayed) / 4
        assert abs(found.final_state[0, 0, 0, 0] - state) < mpmath.mpf(10) ** -57
        assert abs(found.o[0, 0, 0, 0] - 3 * state) < mpmath.mpf(10) ** -57


def test_a_gradient_has_the_closed_form() -> None:
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    inputs = KdaInputs(q=ones * 3, k=ones, v=ones * 5, g=ones * -2, beta=ones[0] * 0.25, initial_state=ones * 7)
    found = oracle_gradient(inputs, ones, ones * 2, "g", (0, 0, 0, 0))
    with mpmath.workdps(60):
        assert abs(found - (3 + 2) * mpmath.mpf("0.75") * 7 * mpmath.exp(-2)) < mpmath.mpf(10) ** -35


def test_the_derivative_is_linear_in_its_direction() -> None:
    inputs = make_inputs(T=3, l2norm=True)
    one, two = ({"k": exact(torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(i)))} for i in (1, 2))
    both = oracle_jvp(inputs, {"k": one["k"] + 3 * two["k"]}).o
    with mpmath.workdps(60):
        apart = oracle_jvp(inputs, one).o + 3 * oracle_jvp(inputs, two).o
        assert abs(both - apart).max() < mpmath.mpf(10) ** -33 * abs(both).max()


def test_values_of_tensors_are_taken_exactly() -> None:
    tensor = torch.tensor([0.1, 1e-308, -3.5])
    assert [Fraction(x) for x in tensor.tolist()] == [Fraction(float(x)) for x in exact(tensor)]
    assert exact(torch.empty(0, 3)).shape == (0, 3)


def test_mistakes_are_refused() -> None:
    inputs = make_inputs(T=3)
    with pytest.raises(ShapeError):
        oracle_kda(inputs.replace(k=inputs.k[:, :2]))
    do, dfinal_state = cotangents(inputs)
    with pytest.raises(ShapeError):
        oracle_gradient(inputs.replace(k=inputs.k[:, :2]), do, dfinal_state, "v", (0, 0, 0, 0))


def test_conversion_to_double_rounds_to_nearest() -> None:
    rng = random.Random(0)  # noqa: S311 - no secrets here
    for _ in range(5000):
        numerator, shift = rng.getrandbits(160) | 1, rng.randrange(-200, 200)
        with mpmath.workprec(200):
            x = mpmath.ldexp(mpmath.mpf(numerator), shift)
            assert float(x) == float(Fraction(numerator) * Fraction(2) ** shift)


def test_conversion_to_double_breaks_ties_to_even() -> None:
    with mpmath.workprec(200):
        assert float(mpmath.mpf(2**53 + 1)) == 2.0**53
        assert float(mpmath.mpf(2**53 + 3)) == 2.0**53 + 4
        assert float(mpmath.mpf(2**53 + 1) + mpmath.ldexp(1, -60)) == 2.0**53 + 2
    assert np.isfinite(float(mpmath.mpf(2) ** 1023))

"""The oracle at 106 bits agrees with 60 digits, forward and backward, and judges full size; the float64 code is not called."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from kda_reference import ShapeError, oracle_gradient, oracle_kda
from kda_reference.double_double import DoubleDouble, exp, expm1, inverse_root, log1p, reciprocal, sigmoid, softplus
from kda_reference.double_double_oracle import double_double_kda
from reference_cases import GATES, VARIANTS, cotangents, make_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

GRADIENT_OF = {"A_log": "dA_log", "dt_bias": "ddt_bias", "initial_state": "dinitial_state"}
DIGITS = 150
FUNCTIONS: dict[str, tuple[Callable[[DoubleDouble], DoubleDouble], Callable[[Any], Any], tuple[float, ...]]] = {
    "exp": (exp, mpmath.exp, (-300.0, -40.0, -1e-9, 0.0, 0.3, 40.0)),
    "expm1": (expm1, mpmath.expm1, (-1.0, -1e-9, 1e-40, 0.3, 1.0)),
    "log1p": (log1p, mpmath.log1p, (1e-60, 1e-9, 0.3, 1.0)),
    "sigmoid": (sigmoid, lambda x: 1 / (1 + mpmath.exp(-x)), (-200.0, -3.0, 0.0, 1e-9, 3.0, 200.0)),
    "softplus": (softplus, lambda x: mpmath.log1p(mpmath.exp(x)), (-200.0, -3.0, 0.0, 1e-9, 3.0, 200.0)),
    "reciprocal": (reciprocal, lambda x: 1 / x, (-7.0, 1e-9, 0.3, 1e80)),
    "inverse_root": (inverse_root, lambda x: 1 / mpmath.sqrt(x), (1e-9, 0.3, 7.0, 1e80)),
}


def exactly(x: DoubleDouble) -> NDArray[np.object_]:
    number = np.frompyfunc(mpmath.mpf, 1, 1)
    return number(x.hi.astype(object)) + number(x.lo.astype(object))  # type: ignore[no-any-return]


def relative(found: DoubleDouble, truth: NDArray[np.object_]) -> float:
    with mpmath.workdps(60):
        return float(abs(exactly(found) - truth).max() / abs(truth).max())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_right_to_thirty_digits(name: str) -> None:
    ours, theirs, points = FUNCTIONS[name]
    for point in points:
        x = DoubleDouble(np.array(point), np.array(point * 2.0**-60))
        with mpmath.workdps(60):
            truth = theirs(mpmath.mpf(point) + mpmath.mpf(point * 2.0**-60))
            assert abs(exactly(ours(x)) - truth) <= 2.0**-99 * abs(truth), point


@pytest.mark.parametrize("operation", ["__add__", "__sub__", "__mul__"])
def test_arithmetic_is_that_of_rational_numbers(operation: str) -> None:
    rng = np.random.default_rng(0)
    high = rng.normal(size=(2, 500)) * 2.0 ** rng.integers(-30, 30, (2, 500))
    pairs = DoubleDouble(high, high * rng.uniform(-1, 1, (2, 500)) * 2.0**-54)
    found = getattr(pairs[0], operation)(pairs[1])
    for i in range(500):
        a, b = (Fraction(float(pairs.hi[j, i])) + Fraction(float(pairs.lo[j, i])) for j in (0, 1))
        truth = getattr(a, operation)(b)
        assert (
            abs(Fraction(float(found.hi[i])) + Fraction(float(found.lo[i])) - truth) <= abs(truth) * Fraction(2) ** -102
        )


@pytest.mark.parametrize("number", [0, 1, 2, 7, 128])
def test_sums_keep_what_cancels(number: int) -> None:
    x = np.random.default_rng(1).normal(size=(3, number)) * 1e12
    found = DoubleDouble.of(np.concatenate([x, -x, np.full((3, 1), 1e-9)], 1)).sum(1)
    assert (found.hi == 1e-9).all()


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items()])
def test_outputs_are_those_of_sixty_digits(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options)
    found, truth = double_double_kda(inputs), oracle_kda(inputs)
    assert relative(found["o"], truth.o) < 1e-29
    assert relative(found["final_state"], truth.final_state) < 1e-29
    assert found.keys() == {"o", "final_state"}


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items()])
def test_gradients_are_those_of_central_differences(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options, seed=4)
    do, dfinal_state = cotangents(inputs)
    found = double_double_kda(inputs, do, dfinal_state)
    names = {name: GRADIENT_OF.get(name, f"d{name}") for name in inputs.tensors()}
    assert found.keys() == {"o", "final_state", *names.values()}
    for name, gradient in names.items():
        index = tuple(size // 2 for size in inputs.tensors()[name].shape)
        truth = oracle_gradient(inputs, do, dfinal_state, name, index, digits=DIGITS)
        with mpmath.workdps(60):
            difference = abs(exactly(found[gradient])[index] - truth)
        assert difference < 1e-28 * abs(found[gradient].hi).max(), name


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_that_of_sixty_digits(gate: str) -> None:
    inputs = make_inputs(gate=gate, key="near", beta=(1.9, 2.0), T=24)
    assert relative(double_double_kda(inputs)["o"], oracle_kda(inputs).o) < 1e-27


def test_mistakes_are_refused() -> None:
    inputs = make_inputs(T=3)
    with pytest.raises(ShapeError):
        double_double_kda(inputs.replace(k=torch.zeros(1, 2, 1, 4, dtype=torch.float64)))

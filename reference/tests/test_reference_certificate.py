"""The certified bounds hold against the oracle, for outputs and gradients under every flag, and are tight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from kda_reference import (
    CertificateError,
    Certified,
    certified_kda,
    certified_kda_vjp,
    oracle_gradient,
    oracle_kda,
    recurrent_kda,
    recurrent_kda_vjp,
)
from kda_reference.certificate import GRADIENT_NAMES
from kda_reference.oracle import exact
from reference_cases import GATES, VARIANTS, cotangents, make_inputs

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from numpy.typing import NDArray
    from torch import Tensor

COORDINATES_PER_INPUT = 3
# Central differences are right to two thirds of the digits; some gradients here are as small as 1e-50.
DIGITS = 150
ADVERSARIAL: dict[str, dict[str, Any]] = {
    "repeated_key": {"T": 40, "key": "repeated", "gate": "zero"},
    "repeated_key_reflected": {"T": 40, "key": "repeated", "gate": "zero", "beta": (2.0, 2.0)},
    "near_keys_reflected": {"T": 40, "key": "near", "gate": "stagnant", "beta": (1.92, 2.0)},
    "constant_gate": {"T": 40, "gate": "one_channel", "beta": (0.9, 1.0)},
    **{f"gate_{gate}": {"T": 20, "gate": gate} for gate in GATES},
}


def distance(value: Tensor, truth: NDArray[np.object_]) -> Tensor:
    with mpmath.workdps(40):
        return torch.from_numpy(abs(exact(value) - truth).astype(np.float64))


def gradient_coordinates(inputs: KdaInputs) -> list[tuple[str, tuple[int, ...]]]:
    rng = np.random.default_rng(0)
    found = []
    for name, tensor in inputs.tensors().items():
        chosen = rng.choice(tensor.numel(), min(COORDINATES_PER_INPUT, tensor.numel()), replace=False)
        found += [(name, tuple(int(i) for i in np.unravel_index(flat, tensor.shape))) for flat in chosen]
    return found


def worst_gradient_ratio(inputs: KdaInputs, certified: Certified, do: Tensor, dfinal_state: Tensor) -> float:
    worst = 0.0
    for name, index in gradient_coordinates(inputs):
        truth = oracle_gradient(inputs, do, dfinal_state, name, index, digits=DIGITS)
        value, bound = (kind[GRADIENT_NAMES[name]][index].item() for kind in (certified.value, certified.bound))
        with mpmath.workdps(40):
            worst = max(worst, float(abs(mpmath.mpf(value) - truth) / bound))
    return worst


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in (VARIANTS | ADVERSARIAL).items()])
def test_bounds_hold_for_outputs(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options)
    certified, truth = certified_kda(inputs), oracle_kda(inputs)
    for name, expected in (("o", truth.o), ("final_state", truth.final_state)):
        assert (distance(certified.value[name], expected) <= certified.bound[name]).all(), name


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in (VARIANTS | ADVERSARIAL).items()])
def test_bounds_hold_for_gradients(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options, seed=3)
    do, dfinal_state = cotangents(inputs)
    certified = certified_kda_vjp(inputs, do, dfinal_state)
    assert worst_gradient_ratio(inputs, certified, do, dfinal_state) <= 1


@pytest.mark.parametrize("gate_form", ["softplus", "bounded"])
def test_bounds_hold_for_steep_and_saturated_gates(gate_form: str) -> None:
    inputs = make_inputs(T=8, gate_form=gate_form, bias=False, seed=5)
    assert inputs.A_log is not None
    inputs = inputs.replace(A_log=inputs.A_log + 5, g=inputs.g.sign() * 10**inputs.g)
    do, dfinal_state = cotangents(inputs)
    certified, truth = certified_kda_vjp(inputs, do, dfinal_state), oracle_kda(inputs)
    assert (distance(certified.value["o"], truth.o) <= certified.bound["o"]).all()
    assert worst_gradient_ratio(inputs, certified, do, dfinal_state) <= 1


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in (VARIANTS | ADVERSARIAL).items()])
def test_values_are_those_of_the_recurrence_bit_for_bit(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options)
    do, dfinal_state = cotangents(inputs)
    certified, forward_only = certified_kda_vjp(inputs, do, dfinal_state, dot_norms=True), certified_kda(inputs)
    without = certified_kda_vjp(inputs, do, dfinal_state)
    assert without.dot_norm == forward_only.dot_norm == {}
    assert all(torch.equal(without.bound[name], bound) for name, bound in certified.bound.items())
    result, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    expected = {"o": result.o, "final_state": result.final_state}
    expected |= {GRADIENT_NAMES[name]: getattr(gradients, name) for name in inputs.tensors()}
    assert certified.value.keys() == certified.bound.keys() == certified.dot_norm.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor is not None
        assert torch.equal(certified.value[name], tensor), name
        assert certified.bound[name].shape == certified.dot_norm[name].shape == tensor.shape
    forward = recurrent_kda(inputs)
    assert forward.final_state is not None
    assert torch.equal(forward_only.value["o"], forward.o)
    assert torch.equal(forward_only.value["final_state"], forward.final_state)
    assert torch.equal(forward_only.bound["o"], certified.bound["o"])


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items()])
def test_bounds_are_small_against_the_results(options: dict[str, Any]) -> None:
    inputs = make_inputs(**(options | {"K": 16, "V": 8} | ({} if "lengths" in options else {"T": 64})))
    certified = certified_kda_vjp(inputs, *cotangents(inputs))
    for name, bound in certified.bound.items():
        assert bound.max() < 1e-10 * certified.value[name].abs().max(), name


def test_a_closed_channel_certifies_its_own_small_gradient() -> None:
    inputs = make_inputs(T=30, gate="one_channel")
    g = inputs.g.clone()
    g[..., 0] = -300
    certified = certified_kda_vjp(inputs.replace(g=g), *cotangents(inputs))
    assert certified.bound["dg"][..., 0].max() < 1e-120
    assert certified.bound["dg"][..., 1].min() > 1e-18


def test_an_infinitely_steep_gate_has_gradient_zero_within_nothing() -> None:
    inputs = make_inputs(T=6, gate_form="softplus", bias=False)
    inputs = inputs.replace(A_log=torch.tensor([100.0], dtype=torch.float64), g=inputs.g.abs() * 1e4)
    certified = certified_kda_vjp(inputs, *cotangents(inputs))
    assert (certified.value["dA_log"] == 0).all()
    assert certified.bound["dA_log"].max() < 1e-200


def test_calls_without_tokens_are_exact() -> None:
    inputs = make_inputs(T=0)
    do, dfinal_state = cotangents(inputs)
    certified = certified_kda_vjp(inputs, do, dfinal_state)
    assert torch.equal(certified.value["dinitial_state"], dfinal_state)
    assert certified.bound["dinitial_state"].max() < 1e-200
    assert certified_kda(inputs).bound["final_state"].max() < 1e-200


def test_dot_norms_are_roots_of_sums_of_squares() -> None:
    inputs = make_inputs(T=1, G=2, gate_form="softplus", scale=0.5)
    do, dfinal_state = cotangents(inputs)
    found = certified_kda_vjp(inputs, do, dfinal_state, dot_norms=True)
    state = found.value["final_state"]
    dq = 0.5 * state[0] * do[0, 0][:, None, :]
    assert torch.allclose(found.dot_norm["dq"][0, 0, 0], dq.square().sum((0, 2)).sqrt(), rtol=1e-14)
    lam = dfinal_state + 0.5 * inputs.q[0, 0, 0][:, None] * do[0, 0][:, None, :]
    dv = inputs.beta[0, 0][:, None, None] * inputs.k[0, 0, 0][:, None] * lam[0]
    assert torch.allclose(found.dot_norm["dv"][0, 0], dv.square().sum(1).sqrt(), rtol=1e-14)
    assert torch.allclose(found.dot_norm["ddt_bias"], found.value["dg"][0, 0].abs().flatten(), rtol=1e-14)
    assert found.dot_norm["o"].count_nonzero() == found.dot_norm["dinitial_state"].count_nonzero() == 0


def test_a_result_that_cannot_judge_is_refused() -> None:
    inputs = make_inputs(T=60, gate="zero")
    long_keys = certified_kda(inputs.replace(k=3 * inputs.k))
    certified_kda(inputs).demand("o", 1e-9)
    with pytest.raises(CertificateError, match=r"o of the reference must be certified within 1e-09 .* at index \(0, "):
        long_keys.demand("o", 1e-9)
    broken = Certified(value={}, bound={"o": torch.tensor([0.0, torch.nan])}, dot_norm={})
    with pytest.raises(CertificateError, match=r"got the bound nan at index \(1,\)"):
        broken.demand("o", 1.0)

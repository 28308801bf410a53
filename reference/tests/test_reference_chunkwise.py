"""The chunkwise form is the same function as the recurrence, for every gate, chunk length and flag."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kda_reference import KdaInputs, ShapeError, certified_kda, certified_kda_vjp, chunkwise_kda, recurrent_kda
from kda_reference.certificate import GRADIENT_NAMES
from reference_cases import GATES, VARIANTS, cotangents, make_inputs
from torch import Tensor


def run(inputs: KdaInputs, dtype: torch.dtype = torch.float64, **changes: int) -> tuple[Tensor, Tensor]:
    o, final_state = chunkwise_kda(**inputs.replace(**changes).keywords(), dtype=dtype)
    assert final_state is not None
    return o, final_state


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


def gradients_of(
    inputs: KdaInputs, do: Tensor, dfinal_state: Tensor, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.tensors().items()}
    o, final_state = run(inputs.replace(**leaves), dtype)
    loss = (o * do).sum() + (final_state * dfinal_state).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_every_gate_gives_the_recurrence(gate: str, chunk_size: int) -> None:
    inputs = make_inputs(T=150, K=8, V=4, H=1, G=2, gate=gate, key="near", beta=(0, 2))
    o, final_state = run(inputs, chunk_size=chunk_size)
    expected = certified_kda(inputs).value
    assert relative_error(o, expected["o"]) < 1e-13
    assert relative_error(final_state, expected["final_state"]) < 1e-13


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_every_gate_gives_the_gradients_of_the_recurrence(gate: str, chunk_size: int) -> None:
    inputs = make_inputs(T=100, K=8, V=4, gate=gate, beta=(0, 2))
    do, dfinal_state = cotangents(inputs)
    expected = certified_kda_vjp(inputs, do, dfinal_state).value
    for name, gradient in gradients_of(inputs.replace(chunk_size=chunk_size), do, dfinal_state).items():
        scale = expected[GRADIENT_NAMES[name]].abs().max()
        assert (gradient - expected[GRADIENT_NAMES[name]]).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items()])
def test_every_flag_gives_the_recurrence(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options)
    o, final_state = run(inputs)
    certified = certified_kda(inputs)
    half_ulp = 2.0**-8 if inputs.v.dtype == torch.bfloat16 else 0.0
    assert o.dtype == inputs.v.dtype
    assert ((o.double() - certified.value["o"]).abs() <= 1e-14 + half_ulp * certified.value["o"].abs()).all()
    assert ((final_state - certified.value["final_state"]).abs() <= 1e-13).all()


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 24, 63, 64])
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 63, 64, 65])
def test_tokens_need_not_fill_a_chunk(chunk_size: int, num_tokens: int) -> None:
    inputs = make_inputs(B=2, T=num_tokens)
    o, final_state = run(inputs, chunk_size=chunk_size)
    certified = certified_kda(inputs)
    assert o.shape == inputs.v.shape
    assert ((o - certified.value["o"]).abs() <= 1e-14).all()
    assert ((final_state - certified.value["final_state"]).abs() <= 1e-14).all()


def test_later_tokens_change_nothing_bit_for_bit() -> None:
    inputs = make_inputs(T=80)
    changed = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "g", "beta")}
    for tensor in changed.values():
        tensor[:, 37:] = -0.9
    assert torch.equal(run(inputs)[0][:, :37], run(inputs.replace(**changed))[0][:, :37])


@pytest.mark.parametrize("gate", GATES)
def test_single_precision_is_off_by_single_precision_only(gate: str) -> None:
    inputs = make_inputs(T=130, K=16, V=8, gate=gate, dtype=torch.float32)
    o, final_state = run(inputs, dtype=torch.float32)
    expected = certified_kda(inputs).value
    assert o.dtype == final_state.dtype == torch.float32
    assert relative_error(o, expected["o"]) < 3e-6
    assert relative_error(final_state, expected["final_state"]) < 3e-6


@pytest.mark.parametrize("gate", GATES)
def test_single_precision_gradients_are_finite_and_close(gate: str) -> None:
    inputs = make_inputs(T=130, K=16, V=8, gate=gate, dtype=torch.float32)
    do, dfinal_state = cotangents(inputs)
    expected = certified_kda_vjp(inputs, do, dfinal_state).value
    found = gradients_of(inputs, do.float(), dfinal_state.float(), dtype=torch.float32)
    for name, gradient in found.items():
        truth = expected[GRADIENT_NAMES[name]]
        assert gradient.isfinite().all(), name
        assert (gradient - truth).abs().max() <= 3e-5 * max(float(truth.abs().max()), 1.0), name


@pytest.mark.parametrize("gate_form", ["softplus", "bounded"])
@pytest.mark.parametrize("logit", [-1e4, -100.0, 100.0, 1e4])
def test_saturated_logits_have_finite_single_precision_gradients(gate_form: str, logit: float) -> None:
    inputs = make_inputs(T=20, gate_form=gate_form, beta_form="sigmoid", dtype=torch.float32)
    inputs = inputs.replace(g=torch.full_like(inputs.g, logit), beta=torch.full_like(inputs.beta, logit))
    do, dfinal_state = cotangents(inputs)
    for name, gradient in gradients_of(inputs, do.float(), dfinal_state.float(), dtype=torch.float32).items():
        assert gradient.isfinite().all(), name


def test_states_follow_the_dtype_of_the_arithmetic() -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    assert run(inputs)[1].dtype == torch.float64
    assert run(inputs, dtype=torch.float32)[1].dtype == torch.float32


def test_the_final_state_is_returned_only_when_asked_for() -> None:
    inputs = make_inputs()
    o, final_state = chunkwise_kda(inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, 0.5)
    expected = recurrent_kda(inputs.replace(scale=0.5, initial_state=None)).o
    assert final_state is None
    assert torch.allclose(o, expected, rtol=0, atol=1e-14)


def test_mistakes_are_refused() -> None:
    inputs = make_inputs()
    with pytest.raises(ShapeError, match="k must agree with q on axis T"):
        chunkwise_kda(inputs.q, inputs.k[:, 1:], inputs.v, inputs.g, inputs.beta)
    with pytest.raises(TypeError, match="use_softmax"):
        chunkwise_kda(inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, use_softmax=True)

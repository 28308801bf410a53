"""The reverse recurrence is the derivative: against autograd, complex steps, 60 digits and exact relations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kda_reference import (
    KdaGradients,
    KdaInputs,
    ShapeError,
    chunkwise_kda,
    oracle_gradient,
    recurrent_kda,
    recurrent_kda_vjp,
)
from kda_reference.activations import Operands
from kda_reference.recurrence import recurrence
from reference_cases import GATES, VARIANTS, cotangents, inner, make_inputs
from torch import Tensor

STEP = 1e-200
OPERANDS = ("q", "k", "v", "g", "beta")
PARTS = (*OPERANDS, "initial_state")


def autograd_of_chunkwise(inputs: KdaInputs, do: Tensor, dfinal_state: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.tensors().items()}
    o, final_state = chunkwise_kda(**inputs.replace(**leaves).keywords())
    assert final_state is not None
    loss = (o * do).sum() + (final_state * dfinal_state).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def complex_step(inputs: KdaInputs, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Differentiate the recurrence of one head along a direction, without subtraction."""
    moved = {name: torch.complex(getattr(inputs, name), STEP * direction[name]) for name in PARTS}
    x = Operands(*(moved[name].transpose(1, 2) for name in OPERANDS))
    state, outputs = moved["initial_state"], []
    for step in recurrence(x, state, inputs.effective_scale):
        state = step.state
        outputs.append(step.output.imag / STEP)
    return torch.stack(outputs, 1), state.imag / STEP


def random_direction(inputs: KdaInputs, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(getattr(inputs, name).shape, generator=generator, dtype=torch.float64) for name in PARTS}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("beta", [(0.0, 1.0), (0.0, 2.0)], ids=["to_one", "to_two"])
def test_adjoint_identity_holds_along_random_directions(gate: str, beta: tuple[float, float]) -> None:
    inputs = make_inputs(T=40, K=16, V=8, gate=gate, beta=beta)
    do, dfinal_state = cotangents(inputs)
    direction = random_direction(inputs, 5)
    outputs, states = complex_step(inputs, direction)
    _, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    forward = inner(do, outputs) + inner(dfinal_state, states)
    backward = sum(inner(getattr(gradients, name), direction[name]) for name in PARTS)
    size = sum(inner(getattr(gradients, name).abs(), direction[name].abs()) for name in PARTS)
    assert abs(forward - backward) < 1e-14 * size


def test_complex_steps_along_every_coordinate_give_the_gradient() -> None:
    inputs = make_inputs(T=5, K=3, V=2, beta=(0, 2))
    do, dfinal_state = cotangents(inputs)
    _, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    for name in PARTS:
        gradient = getattr(gradients, name)
        for flat in range(gradient.numel()):
            direction = {part: torch.zeros_like(getattr(inputs, part)) for part in PARTS}
            direction[name].view(-1)[flat] = 1
            outputs, states = complex_step(inputs, direction)
            found = inner(do, outputs) + inner(dfinal_state, states)
            assert abs(found - gradient.flatten()[flat].item()) < 1e-14 * gradient.abs().max(), (name, flat)


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items() if name != "bfloat16"])
def test_autograd_of_the_chunkwise_form_gives_the_same_gradients(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options, seed=2)
    do, dfinal_state = cotangents(inputs)
    expected = autograd_of_chunkwise(inputs, do, dfinal_state)
    _, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    for name, tensor in expected.items():
        found = getattr(gradients, name)
        assert found.shape == inputs.tensors()[name].shape
        assert found.dtype == torch.float64
        assert (found - tensor).abs().max() < 1e-13 * tensor.abs().max(), name


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items()])
def test_sixty_digits_give_the_same_gradients(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options)
    do, dfinal_state = cotangents(inputs)
    _, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    for name, tensor in inputs.tensors().items():
        index = tuple(size // 2 for size in tensor.shape)
        truth = float(oracle_gradient(inputs, do, dfinal_state, name, index))
        gradient = getattr(gradients, name)
        assert abs(gradient[index].item() - truth) < 1e-14 * gradient.abs().max(), name


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items()])
def test_the_forward_result_is_that_of_the_recurrence(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options)
    result, _ = recurrent_kda_vjp(inputs, *cotangents(inputs))
    expected = recurrent_kda(inputs)
    assert result.final_state is not None
    assert expected.final_state is not None
    assert torch.equal(result.o, expected.o)
    assert torch.equal(result.final_state, expected.final_state)


def test_a_missing_cotangent_is_zero() -> None:
    inputs = make_inputs(lengths=(3, 0, 4), state_v_first=True)
    do, dfinal_state = cotangents(inputs)
    for given, full in (
        ((do, None), (do, torch.zeros_like(dfinal_state))),
        ((None, dfinal_state), (torch.zeros_like(do), dfinal_state)),
        ((None, None), (torch.zeros_like(do), torch.zeros_like(dfinal_state))),
    ):
        _, one = recurrent_kda_vjp(inputs, *given)
        _, two = recurrent_kda_vjp(inputs, *full)
        for name in PARTS:
            assert torch.equal(getattr(one, name), getattr(two, name))


def test_a_state_that_is_not_returned_still_has_a_gradient() -> None:
    inputs = make_inputs()
    result, gradients = recurrent_kda_vjp(inputs.replace(output_final_state=False), *cotangents(inputs))
    _, expected = recurrent_kda_vjp(inputs, *cotangents(inputs))
    assert result.final_state is None
    assert torch.equal(gradients.q, expected.q)


def test_inputs_that_were_not_given_have_no_gradient() -> None:
    inputs = make_inputs(state=False)
    _, gradients = recurrent_kda_vjp(inputs, *cotangents(inputs))
    assert gradients.A_log is gradients.dt_bias is gradients.initial_state is None


def test_a_call_without_tokens_passes_the_cotangent_through() -> None:
    inputs = make_inputs(T=0, gate_form="softplus")
    do, dfinal_state = cotangents(inputs)
    _, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    assert gradients.initial_state is not None
    assert gradients.A_log is not None
    assert torch.equal(gradients.initial_state, dfinal_state)
    assert gradients.A_log.count_nonzero() == 0
    assert gradients.q.shape == inputs.q.shape


def test_gradients_of_packed_sequences_are_computed_apart() -> None:
    lengths = (5, 0, 8)
    inputs = make_inputs(lengths=lengths)
    do, dfinal_state = cotangents(inputs)
    _, packed = recurrent_kda_vjp(inputs, do, dfinal_state)
    assert inputs.initial_state is not None
    start = 0
    for n, length in enumerate(lengths):
        part = slice(start, start + length)
        cut = {name: getattr(inputs, name)[:, part] for name in OPERANDS}
        alone = inputs.replace(**cut, cu_seqlens=None, initial_state=inputs.initial_state[n : n + 1])
        _, found = recurrent_kda_vjp(alone, do[:, part], dfinal_state[n : n + 1])
        for name in OPERANDS:
            assert torch.equal(getattr(found, name), getattr(packed, name)[:, part])
        start += length


def test_gradients_of_grouped_heads_are_summed() -> None:
    inputs = make_inputs(H=2, G=6)
    repeated = inputs.replace(q=inputs.q.repeat_interleave(3, 2), k=inputs.k.repeat_interleave(3, 2))
    _, grouped = recurrent_kda_vjp(inputs, *cotangents(inputs))
    _, apart = recurrent_kda_vjp(repeated, *cotangents(inputs))
    assert torch.allclose(grouped.k, apart.k.reshape(1, 13, 2, 3, 4).sum(3), rtol=0, atol=1e-14)
    assert torch.equal(grouped.v, apart.v)


def both(options: dict[str, Any]) -> tuple[KdaInputs, Tensor, Tensor, Tensor, Tensor, KdaGradients]:
    inputs = make_inputs(**options)
    do, dfinal_state = cotangents(inputs)
    result, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    assert result.final_state is not None
    return inputs, do, dfinal_state, result.o, result.final_state, gradients


def test_queries_times_their_gradients_are_outputs_times_theirs() -> None:
    inputs, do, _, o, _, gradients = both({"gate": "spikes"})
    assert torch.allclose((inputs.q * gradients.q).sum(-1), (o * do).sum(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("gate", GATES)
def test_outputs_are_homogeneous_in_values_and_state(gate: str) -> None:
    inputs, do, dfinal_state, o, final_state, gradients = both({"gate": gate, "T": 30})
    inside = inner(inputs.v, gradients.v) + inner(inputs.initial_state, gradients.initial_state)
    outside = inner(o, do) + inner(final_state, dfinal_state)
    assert abs(inside - outside) < 1e-13 * (abs(inner(o.abs(), do.abs())) + 1)


def test_the_first_decay_acts_on_the_initial_state() -> None:
    inputs, _, _, _, _, gradients = both({})
    assert inputs.initial_state is not None
    assert gradients.initial_state is not None
    expected = (gradients.initial_state * inputs.initial_state).sum(-1)
    assert torch.allclose(gradients.g[:, 0], expected, rtol=0, atol=1e-14)


def test_beta_times_its_gradient_is_the_error_times_that_of_the_value() -> None:
    inputs, _, _, _, _, gradients = both({"T": 1})
    assert inputs.initial_state is not None
    decayed = inputs.g[0, 0, 0].exp()[:, None] * inputs.initial_state[0, 0]
    error = inputs.v[0, 0, 0] - inputs.k[0, 0, 0] @ decayed
    assert torch.allclose(inputs.beta[0, 0, 0] * gradients.beta[0, 0, 0], gradients.v[0, 0, 0] @ error, atol=1e-14)


def test_decay_gradients_differ_by_what_a_token_reads_where_it_writes_nothing() -> None:
    token = 3
    inputs = make_inputs(T=8)
    inputs = inputs.replace(beta=inputs.beta.index_fill(1, torch.tensor([token]), 0))
    _, gradients = recurrent_kda_vjp(inputs, *cotangents(inputs))
    read = inputs.q[0, token, 0] * gradients.q[0, token, 0]
    difference = gradients.g[0, token, 0] - gradients.g[0, token + 1, 0]
    assert torch.allclose(difference, read, rtol=0, atol=1e-14)


def test_normalised_vectors_have_gradients_across_them() -> None:
    inputs = make_inputs(l2norm=True)
    inverse = {name: (getattr(inputs, name).square().sum(-1, keepdim=True) + 1e-6).rsqrt() for name in ("q", "k")}
    normalised = {name: getattr(inputs, name) * inverse[name] for name in inverse}
    _, raw = recurrent_kda_vjp(inputs, *cotangents(inputs))
    _, outside = recurrent_kda_vjp(inputs.replace(**normalised, use_qk_l2norm_in_kernel=False), *cotangents(inputs))
    for name, r in inverse.items():
        along = (getattr(inputs, name) * getattr(raw, name)).sum(-1)
        expected = 1e-6 * r[..., 0] ** 2 * (normalised[name] * getattr(outside, name)).sum(-1)
        assert torch.allclose(along, expected, rtol=0, atol=1e-14)
        assert expected.abs().max() > 1e-6


@pytest.mark.parametrize("gate_form", ["softplus", "bounded"])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_saturated_logits_have_finite_gradients(gate_form: str, logit: float) -> None:
    inputs = make_inputs(gate_form=gate_form, beta_form="doubled")
    for steepness in (0.0, 5.0, 100.0):
        steep = torch.full((1,), steepness, dtype=torch.float64)
        saturated = inputs.replace(
            g=torch.full_like(inputs.g, logit), beta=torch.full_like(inputs.beta, logit), A_log=steep
        )
        _, gradients = recurrent_kda_vjp(saturated, *cotangents(inputs))
        for name in inputs.tensors():
            assert getattr(gradients, name).isfinite().all(), name
        assert gradients.g.count_nonzero() == 0
        assert gradients.beta.count_nonzero() == 0


def test_cotangents_of_another_shape_are_refused() -> None:
    inputs = make_inputs(V=3)
    do, dfinal_state = cotangents(inputs)
    with pytest.raises(ShapeError, match="do must have the shape"):
        recurrent_kda_vjp(inputs, do[:, 1:], dfinal_state)
    with pytest.raises(ShapeError, match="dfinal_state must have the shape"):
        recurrent_kda_vjp(inputs, do, dfinal_state.transpose(2, 3))
    with pytest.raises(ShapeError, match="k must agree"):
        recurrent_kda_vjp(inputs.replace(k=inputs.k[:, 1:]), do, dfinal_state)

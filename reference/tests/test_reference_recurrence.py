"""The recurrence keeps the contract: layouts, packing, heads, splitting, and the operators it contains.

Two ways to the same exact result may differ by the sum of their certified errors, and by no more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kda_reference import KdaInputs, ShapeError, certified_kda, check_inputs, recurrent_kda
from reference_cases import GATES, VARIANTS, make_inputs
from torch import Tensor
from torch.linalg import qr


def final_state(inputs: KdaInputs) -> Tensor:
    found = recurrent_kda(inputs).final_state
    assert found is not None
    return found


def tokens(inputs: KdaInputs, start: int, stop: int, **changes: Tensor | None) -> KdaInputs:
    cut = {name: getattr(inputs, name)[:, start:stop] for name in ("q", "k", "v", "g", "beta")}
    return inputs.replace(**cut, **changes)


def assert_same(one: KdaInputs, two: KdaInputs, slack: float = 1.0) -> None:
    a, b = certified_kda(one), certified_kda(two)
    for name in ("o", "final_state"):
        allowed = slack * (a.bound[name] + b.bound[name])
        assert ((a.value[name] - b.value[name]).abs() <= allowed).all(), name


@pytest.mark.parametrize("options", [pytest.param(x, id=name) for name, x in VARIANTS.items()])
def test_results_are_float64_in_the_shapes_of_the_call(options: dict[str, Any]) -> None:
    inputs = make_inputs(**options)
    found = recurrent_kda(inputs)
    assert found.o.dtype == torch.float64
    assert found.o.shape == inputs.v.shape
    assert final_state(inputs).dtype == torch.float64
    assert final_state(inputs).shape == inputs.state_shape
    assert not found.o.requires_grad


def test_the_final_state_is_returned_only_when_asked_for() -> None:
    inputs = make_inputs()
    assert recurrent_kda(inputs.replace(output_final_state=False)).final_state is None
    assert torch.equal(recurrent_kda(inputs.replace(output_final_state=False)).o, recurrent_kda(inputs).o)


def test_inputs_that_require_gradients_are_only_read() -> None:
    inputs = make_inputs()
    leaf = inputs.q.clone().requires_grad_()
    assert torch.equal(recurrent_kda(inputs.replace(q=leaf)).o, recurrent_kda(inputs).o)
    assert leaf.grad is None


def test_a_missing_state_is_zero() -> None:
    inputs = make_inputs(lengths=(3, 4))
    zero = inputs.replace(initial_state=torch.zeros(inputs.state_shape, dtype=torch.float64))
    assert torch.equal(recurrent_kda(zero).o, recurrent_kda(inputs.replace(initial_state=None)).o)


def test_the_default_scale_is_the_inverse_root_of_the_key_width() -> None:
    inputs = make_inputs(K=16)
    assert torch.equal(recurrent_kda(inputs).o, recurrent_kda(inputs.replace(scale=0.25)).o)


def test_packed_sequences_are_computed_apart() -> None:
    lengths = (5, 0, 1, 8, 0)
    inputs = make_inputs(lengths=lengths, H=2, G=4)
    packed = recurrent_kda(inputs)
    assert inputs.initial_state is not None
    start = 0
    for n, length in enumerate(lengths):
        state = inputs.initial_state[n : n + 1]
        alone = tokens(inputs, start, start + length, cu_seqlens=None, initial_state=state)
        assert torch.equal(recurrent_kda(alone).o, packed.o[:, start : start + length])
        assert torch.equal(final_state(alone), final_state(inputs)[n : n + 1])
        start += length


def test_an_empty_sequence_passes_its_state_through() -> None:
    inputs = make_inputs(lengths=(0, 3, 0))
    assert inputs.initial_state is not None
    assert torch.equal(final_state(inputs)[::2], inputs.initial_state[::2])


def test_a_call_without_tokens_passes_its_state_through() -> None:
    inputs = make_inputs(B=2, T=0)
    assert inputs.initial_state is not None
    assert recurrent_kda(inputs).o.shape == (2, 0, 1, 3)
    assert torch.equal(final_state(inputs), inputs.initial_state)


def test_a_packing_of_no_sequences_is_empty() -> None:
    inputs = make_inputs(T=0, state=False).replace(cu_seqlens=torch.tensor([0]))
    assert recurrent_kda(inputs).o.shape == (1, 0, 1, 3)
    assert final_state(inputs).shape == (0, 1, 4, 3)


def test_state_layouts_are_transposes() -> None:
    inputs = make_inputs(lengths=(4, 3))
    assert inputs.initial_state is not None
    turned = inputs.replace(initial_state=inputs.initial_state.transpose(2, 3), state_v_first=True)
    assert torch.equal(recurrent_kda(turned).o, recurrent_kda(inputs).o)
    assert torch.equal(final_state(turned), final_state(inputs).transpose(2, 3))


def test_grouped_value_heads_read_their_own_query_head() -> None:
    inputs = make_inputs(H=2, G=6)
    repeated = inputs.replace(q=inputs.q.repeat_interleave(3, 2), k=inputs.k.repeat_interleave(3, 2))
    assert torch.equal(recurrent_kda(inputs).o, recurrent_kda(repeated).o)


def test_batch_rows_and_heads_are_independent() -> None:
    inputs = make_inputs(B=2, H=2, G=2)
    changed = inputs.replace(v=inputs.v.clone(), g=inputs.g.clone())
    changed.v[1, :, 1], changed.g[1, :, 1] = 3, -2
    same = recurrent_kda(changed).o == recurrent_kda(inputs).o
    assert same[0].all()
    assert same[1, :, 0].all()
    assert not same[1, :, 1].any()


def test_outputs_do_not_depend_on_later_tokens() -> None:
    inputs = make_inputs(T=12)
    assert torch.equal(recurrent_kda(inputs).o[:, :5], recurrent_kda(tokens(inputs, 0, 5)).o)


@pytest.mark.parametrize("token", [0, 1, 6, 12, 13])
def test_the_state_splits_at_any_token(token: int) -> None:
    inputs = make_inputs(T=13)
    middle = final_state(tokens(inputs, 0, token))
    rest = tokens(inputs, token, 13, initial_state=middle)
    assert torch.equal(recurrent_kda(inputs).o[:, token:], recurrent_kda(rest).o)
    assert torch.equal(final_state(inputs), final_state(rest))


@pytest.mark.parametrize("gate", GATES)
def test_zero_beta_leaves_pure_decay(gate: str) -> None:
    inputs = make_inputs(gate=gate, beta=(0, 0))
    assert inputs.initial_state is not None
    expected = inputs.g.sum(1).exp()[..., None] * inputs.initial_state
    assert torch.allclose(final_state(inputs), expected, rtol=1e-13, atol=0)


def test_closed_gates_leave_the_last_write() -> None:
    inputs = make_inputs(gate="closed")
    written = inputs.k[0, -1, 0, :, None] * (inputs.beta[0, -1, 0] * inputs.v[0, -1, 0])
    assert torch.equal(final_state(inputs)[0, 0], written)


def test_unit_beta_stores_the_value_under_its_key() -> None:
    inputs = make_inputs(beta=(1, 1), scale=1)
    inputs = inputs.replace(q=inputs.k)
    certified = certified_kda(inputs)
    assert ((certified.value["o"] - inputs.v).abs() < 1e-14).all()


def test_uniform_gates_give_the_gated_delta_network() -> None:
    inputs = make_inputs(T=20, beta=(0, 2))
    inputs = inputs.replace(g=inputs.g[..., :1].expand_as(inputs.g))
    assert inputs.initial_state is not None
    state, identity = inputs.initial_state[0, 0], torch.eye(4, dtype=torch.float64)
    for t in range(20):
        k, beta, decay = inputs.k[0, t, 0], inputs.beta[0, t, 0], inputs.g[0, t, 0, 0].exp()
        state = decay * (identity - beta * torch.outer(k, k)) @ state + beta * torch.outer(k, inputs.v[0, t, 0])
    assert torch.allclose(final_state(inputs)[0, 0], state, rtol=0, atol=1e-13)


def test_open_gates_give_the_delta_network() -> None:
    inputs = make_inputs(T=20, gate="zero")
    state = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(20):
        k, beta = inputs.k[0, t, 0], inputs.beta[0, t, 0]
        state = state + beta * torch.outer(k, inputs.v[0, t, 0] - k @ state)
    assert torch.allclose(final_state(inputs.replace(initial_state=None))[0, 0], state, rtol=0, atol=1e-13)


def test_the_step_is_diagonal_plus_low_rank() -> None:
    inputs = make_inputs(T=20)
    assert inputs.initial_state is not None
    state = inputs.initial_state[0, 0]
    for t in range(20):
        k, decay, beta = inputs.k[0, t, 0], inputs.g[0, t, 0].exp(), inputs.beta[0, t, 0]
        transition = torch.diag(decay) - torch.outer(beta * k, k * decay)
        state = transition @ state + torch.outer(beta * k, inputs.v[0, t, 0])
    assert torch.allclose(final_state(inputs)[0, 0], state, rtol=0, atol=1e-13)


def test_one_chunk_has_the_parallel_form() -> None:
    inputs = make_inputs(T=10)
    assert inputs.initial_state is not None
    q, k, v, beta = (x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.beta[..., None]))
    state, decay = inputs.initial_state[0, 0], inputs.g[0, :, 0].cumsum(0).exp()
    erased = torch.linalg.inv(torch.eye(10, dtype=torch.float64) + (beta * (decay * k) @ (k / decay).T).tril(-1))
    pseudo = erased @ (beta * (v - (decay * k) @ state))
    expected = inputs.effective_scale * ((decay * q) @ state + ((decay * q) @ (k / decay).T).tril() @ pseudo)
    assert torch.allclose(recurrent_kda(inputs).o[0, :, 0], expected, rtol=0, atol=1e-13)


def test_scaling_values_and_state_scales_the_outputs() -> None:
    inputs = make_inputs()
    assert inputs.initial_state is not None
    scaled = inputs.replace(v=-4 * inputs.v, initial_state=-4 * inputs.initial_state)
    assert torch.equal(recurrent_kda(scaled).o, -4 * recurrent_kda(inputs).o)


def test_outputs_are_additive_in_values_and_state() -> None:
    inputs = make_inputs(T=10)
    assert inputs.initial_state is not None
    first, rest = inputs.v.clone(), inputs.v.clone()
    first[:, 5:], rest[:, :5] = 0, 0
    total = recurrent_kda(inputs.replace(v=first)).o + recurrent_kda(inputs.replace(v=rest, initial_state=None)).o
    assert torch.allclose(recurrent_kda(inputs).o, total, rtol=0, atol=1e-14)


def test_keys_and_values_may_change_sign_together() -> None:
    inputs = make_inputs()
    sign = torch.where(torch.arange(13) % 3 == 0, -1.0, 1.0)[:, None, None]
    flipped = inputs.replace(k=sign * inputs.k, v=sign * inputs.v)
    assert torch.equal(recurrent_kda(flipped).o, recurrent_kda(inputs).o)


def test_channels_may_be_permuted_together() -> None:
    inputs = make_inputs()
    assert inputs.initial_state is not None
    order = torch.tensor([2, 0, 3, 1])
    permuted = {name: getattr(inputs, name)[..., order] for name in ("q", "k", "g")}
    state = inputs.initial_state[:, :, order]
    a, b = certified_kda(inputs), certified_kda(inputs.replace(**permuted, initial_state=state))
    assert ((a.value["o"] - b.value["o"]).abs() <= a.bound["o"] + b.bound["o"]).all()


def test_rotated_channels_change_nothing_only_under_uniform_gates() -> None:
    inputs = make_inputs()
    assert inputs.initial_state is not None
    rotation = qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q

    def rotated(x: KdaInputs) -> KdaInputs:
        assert x.initial_state is not None
        return x.replace(q=x.q @ rotation.T, k=x.k @ rotation.T, initial_state=rotation @ x.initial_state)

    uniform = inputs.replace(g=inputs.g[..., :1].expand_as(inputs.g))
    assert torch.allclose(recurrent_kda(rotated(uniform)).o, recurrent_kda(uniform).o, rtol=0, atol=1e-13)
    assert not torch.allclose(recurrent_kda(rotated(inputs)).o, recurrent_kda(inputs).o, rtol=0, atol=1e-4)


def test_rotated_values_rotate_the_outputs() -> None:
    inputs = make_inputs()
    assert inputs.initial_state is not None
    rotation = qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    turned = inputs.replace(v=inputs.v @ rotation, initial_state=inputs.initial_state @ rotation)
    assert torch.allclose(recurrent_kda(turned).o, recurrent_kda(inputs).o @ rotation, rtol=0, atol=1e-13)


def test_identity_tokens_change_nothing() -> None:
    inputs = make_inputs(T=6)
    spaced = {name: getattr(inputs, name).repeat_interleave(2, 1) for name in ("q", "k", "v", "g", "beta")}
    spaced["g"][:, ::2], spaced["beta"][:, ::2] = 0, 0
    assert torch.equal(recurrent_kda(inputs.replace(**spaced)).o[:, 1::2], recurrent_kda(inputs).o)


def test_decay_may_be_split_over_a_token_that_writes_nothing() -> None:
    inputs = make_inputs(T=6)
    halves = {name: getattr(inputs, name).repeat_interleave(2, 1) for name in ("q", "k", "v", "g", "beta")}
    halves["g"], halves["beta"][:, ::2] = halves["g"] / 2, 0
    assert torch.allclose(
        recurrent_kda(inputs.replace(**halves)).o[:, 1::2], recurrent_kda(inputs).o, rtol=0, atol=1e-14
    )


def test_two_writes_under_one_key_merge_into_one() -> None:
    inputs = make_inputs(T=6)
    twice = {name: getattr(inputs, name).repeat_interleave(2, 1) for name in ("q", "k", "v", "g", "beta")}
    twice["g"][:, 1::2] = 0
    merged = inputs.replace(beta=1 - (1 - inputs.beta) ** 2)
    assert torch.allclose(
        recurrent_kda(inputs.replace(**twice)).o[:, 1::2], recurrent_kda(merged).o, rtol=0, atol=1e-14
    )


def test_neighbours_with_orthogonal_keys_may_be_swapped_when_gates_are_open() -> None:
    inputs = make_inputs(T=4, gate="zero")
    inputs = inputs.replace(k=torch.eye(4, dtype=torch.float64)[None, :, None])
    order = torch.tensor([0, 2, 1, 3])
    swapped = inputs.replace(**{name: getattr(inputs, name)[:, order] for name in ("q", "k", "v", "beta")})
    assert torch.equal(final_state(swapped), final_state(inputs))


def test_decay_moves_into_the_queries_where_nothing_is_written() -> None:
    inputs = make_inputs(beta=(0, 0))
    moved = inputs.replace(q=inputs.q * inputs.g.cumsum(1).exp(), g=torch.zeros_like(inputs.g))
    assert torch.allclose(recurrent_kda(moved).o, recurrent_kda(inputs).o, rtol=0, atol=1e-14)


def test_integers_stay_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(4, dtype=torch.float64)
    q, k = (eye[torch.randint(4, (1, 30, 1), generator=generator)] for _ in range(2))
    v = torch.randint(-9, 9, (1, 30, 1, 3), generator=generator).double()
    beta = torch.randint(2, (1, 30, 1), generator=generator).double()
    found = recurrent_kda(KdaInputs(q=q, k=k, v=v, g=torch.zeros_like(k), beta=beta, scale=1))
    memory = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(30):
        if beta[0, t, 0]:
            memory[int(k[0, t, 0].argmax())] = v[0, t, 0]
        assert torch.equal(found.o[0, t, 0], memory[int(q[0, t, 0].argmax())])


def test_writes_with_beta_below_one_bound_the_energy() -> None:
    inputs = make_inputs(T=50, key="near")
    assert inputs.initial_state is not None
    columns = final_state(inputs).square().sum(2)
    allowed = inputs.initial_state.square().sum(2) + (inputs.beta[..., None] * inputs.v.square()).sum(1)
    assert (columns <= allowed * (1 + 1e-12)).all()


def test_states_contract_by_the_largest_decay() -> None:
    inputs = make_inputs(T=10, beta=(0, 2))
    assert inputs.initial_state is not None
    other = inputs.replace(initial_state=inputs.initial_state + 1)
    moved = (final_state(other) - final_state(inputs)).norm(dim=2)
    assert (moved <= inputs.g.amax(-1).sum(1).exp()[..., None] * 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("gate_form", ["softplus", "bounded"])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("steepness", [0.0, 100.0])
def test_saturated_gates_are_open_or_closed(gate_form: str, logit: float, steepness: float) -> None:
    inputs = make_inputs(T=1, gate_form=gate_form, bias=False, beta=(0, 0))
    state = inputs.initial_state
    assert state is not None
    steep = torch.full((1,), steepness, dtype=torch.float64)
    inputs = inputs.replace(g=torch.full_like(inputs.g, logit), A_log=steep)
    closed = 0.0 if gate_form == "softplus" else torch.tensor(-5.0, dtype=torch.float64).exp()
    expected = state * (1.0 if logit < 0 else closed)
    assert torch.allclose(final_state(inputs), expected, rtol=1e-15, atol=0)


def test_activations_may_be_applied_beforehand() -> None:
    inputs = make_inputs(G=2, l2norm=True, gate_form="bounded", beta_form="doubled")
    assert inputs.A_log is not None
    assert inputs.dt_bias is not None
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (inputs.q, inputs.k))
    g = -5 * torch.sigmoid(inputs.A_log.exp()[:, None] * (inputs.g + inputs.dt_bias.reshape(2, 4)))
    before = KdaInputs(
        q=q, k=k, v=inputs.v, g=g, beta=2 * torch.sigmoid(inputs.beta), initial_state=inputs.initial_state
    )
    assert_same(inputs, before, slack=4)


def test_mistakes_are_refused_before_any_work() -> None:
    inputs = make_inputs()
    with pytest.raises(ShapeError, match="k must agree with q on axis T"):
        recurrent_kda(inputs.replace(k=inputs.k[:, :2]))
    check_inputs(inputs)

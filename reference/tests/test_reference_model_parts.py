"""Each part of the model obeys the identities that define it, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kda_reference import KdaInputs, recurrent_kda, recurrent_kda_vjp
from kda_reference.differentiable import differentiable_kda
from kda_reference.experts import RoutingRule, mixture, route, swiglu
from kda_reference.kda_layer import kda_layer
from kda_reference.latent_attention import LatentShape, latent_attention
from kda_reference.normalisation import gated_rms_norm, rms_norm
from kda_reference.related import decay_only, delta_net, diagonal_plus_low_rank, dplr_of_kda, gated_delta_net
from kda_reference.short_convolution import short_convolution
from model_tensors import expert_weights, kda_weights, latent_weights, normal
from reference_cases import VARIANTS, cotangents, make_inputs
from torch import Tensor

ROUNDING = 1e-12  # float64 sums of some tens of terms, of values near one
SHAPE = LatentShape(num_heads=2, key_width=4, shared_key_width=3, value_width=5)


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= ROUNDING * (1 + expected.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_recurrence_under_autograd_is_the_recurrence_and_its_reverse(name: str) -> None:
    inputs = make_inputs(**VARIANTS[name])
    do, dfinal_state = cotangents(inputs)
    expected, gradients = recurrent_kda_vjp(inputs, do, dfinal_state)
    leaves = {key: x.double().requires_grad_() for key, x in inputs.tensors().items()}
    o, final_state = differentiable_kda(inputs.replace(**leaves))
    assert torch.equal(o, expected.o)
    loss = (o * do).sum() + (final_state * dfinal_state).sum()
    for key, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert close(gradient, getattr(gradients, key)), key


def test_recurrence_of_no_tokens_passes_the_state_through() -> None:
    inputs = make_inputs(T=0)
    o, final_state = differentiable_kda(inputs)
    assert o.shape == inputs.v.shape
    assert inputs.initial_state is not None
    assert torch.equal(final_state, inputs.initial_state.double())


def scalar_gate_inputs(*, gated: bool, tokens: int = 9) -> KdaInputs:
    """Return a call of one head whose gate is the same in every channel."""
    k = torch.nn.functional.normalize(normal(1, tokens, 1, 5, seed=1), dim=-1)
    log_decay = -normal(1, tokens, 1, 1, seed=2).abs() if gated else torch.zeros(1, tokens, 1, 1, dtype=torch.float64)
    return KdaInputs(
        q=normal(1, tokens, 1, 5, seed=3), k=k, v=normal(1, tokens, 1, 4, seed=4), g=log_decay.expand(-1, -1, -1, 5),
        beta=2 * torch.sigmoid(normal(1, tokens, 1, seed=5)), initial_state=normal(1, 1, 5, 4, seed=6),
    )  # fmt: skip


def one_head(inputs: KdaInputs) -> tuple[Tensor, ...]:
    return tuple(x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.g[..., 0], inputs.beta))


def test_gate_alike_in_every_channel_is_gated_delta_net() -> None:
    inputs = scalar_gate_inputs(gated=True)
    q, k, v, g, beta = one_head(inputs)
    assert inputs.initial_state is not None
    o, state = gated_delta_net(q, k, v, g, beta, inputs.effective_scale, inputs.initial_state[0, 0])
    found = recurrent_kda(inputs)
    assert found.final_state is not None
    assert close(found.o[0, :, 0], o)
    assert close(found.final_state[0, 0], state)


def test_no_gate_is_delta_net() -> None:
    inputs = scalar_gate_inputs(gated=False)
    q, k, v, _, beta = one_head(inputs)
    assert inputs.initial_state is not None
    o, state = delta_net(q, k, v, beta, inputs.effective_scale, inputs.initial_state[0, 0])
    found = recurrent_kda(inputs)
    assert found.final_state is not None
    assert close(found.o[0, :, 0], o)
    assert close(found.final_state[0, 0], state)


def test_kda_is_dplr_with_its_own_keys() -> None:
    inputs = make_inputs(T=9, beta=(0, 2))
    q, k, v, g, beta = (x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
    assert inputs.initial_state is not None
    written, a, b = dplr_of_kda(k, g, beta)
    o, state = diagonal_plus_low_rank(q, written, v, g, a, b, inputs.effective_scale, inputs.initial_state[0, 0])
    found = recurrent_kda(inputs)
    assert found.final_state is not None
    assert close(found.o[0, :, 0], o)
    assert close(found.final_state[0, 0], state)


def test_dplr_without_a_low_rank_part_is_decay() -> None:
    q, v, g, state = normal(4, 3, seed=1), normal(4, 2, seed=2), -normal(4, 3, seed=3).abs(), normal(3, 2, seed=4)
    none = torch.zeros_like(q)
    _, after = diagonal_plus_low_rank(q, none, v, g, none, q, 1.0, state)
    assert close(after, g.sum(0).exp()[:, None] * state)


def test_decay_only_is_the_delta_rule_for_orthogonal_keys() -> None:
    q, v, g = normal(4, 4, seed=1), normal(4, 3, seed=2), -normal(4, seed=3).abs()
    beta, state = torch.sigmoid(normal(4, seed=4)), torch.zeros(4, 3, dtype=torch.float64)
    keys = torch.eye(4, dtype=torch.float64)
    expected = gated_delta_net(q, keys, v, g, beta, 0.5, state)
    for found, other in zip(decay_only(q, keys, v, g, beta, 0.5, state), expected, strict=True):
        assert close(found, other)
    keys[1] = keys[0]
    assert not close(
        decay_only(q, keys, v, g, beta, 0.5, state)[0], gated_delta_net(q, keys, v, g, beta, 0.5, state)[0]
    )


def test_decay_only_of_no_tokens_passes_the_state_through() -> None:
    empty, state = normal(0, 4, seed=1), normal(4, 4, seed=2)
    o, after = decay_only(empty, empty, empty, empty[:, 0], empty[:, 0], 1.0, state)
    assert o.shape == (0, 4)
    assert torch.equal(after, state)


@pytest.mark.parametrize("split", range(8))
def test_convolution_goes_on_where_it_stopped(split: int) -> None:
    x, weight, tail = normal(2, 7, 3, seed=1), normal(3, 4, seed=2), normal(2, 3, 3, seed=3)
    whole, end = short_convolution(x, weight, tail)
    first, between = short_convolution(x[:, :split], weight, tail)
    second, last = short_convolution(x[:, split:], weight, between)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(last, end)


def test_convolution_answers_an_impulse_with_its_taps_newest_first() -> None:
    impulse = torch.zeros(1, 6, 1, dtype=torch.float64)
    impulse[0, 1] = 1
    y, _ = short_convolution(impulse, torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64))
    assert y[0, :, 0].tolist() == [0, 4, 3, 2, 1, 0]


def test_convolution_is_that_of_torch() -> None:
    x, weight = normal(2, 9, 3, seed=1), normal(3, 4, seed=2)
    expected = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=3)[..., :9]
    assert close(short_convolution(x, weight)[0], expected.transpose(1, 2))


def test_norm_does_not_depend_on_scale_and_adds_its_constant_to_the_mean() -> None:
    x, weight = normal(5, 8, seed=1), normal(8, seed=2)
    assert close(rms_norm(1e6 * x, weight, 1e-30), rms_norm(x, weight, 1e-30))
    assert close(rms_norm(torch.full((1, 4), 3.0, dtype=torch.float64), weight[:4], 16.0), weight[None, :4] * 0.6)


@pytest.mark.parametrize(("activation", "expected"), [("sigmoid", 0.5), ("swish", 0.0), ("none", 1.0)])
def test_gate_of_logit_zero(activation: str, expected: float) -> None:
    x, weight = normal(5, 8, seed=1), normal(8, seed=2)
    found = gated_rms_norm(x, torch.zeros_like(x), weight, 1e-5, activation)
    assert close(found, expected * rms_norm(x, weight, 1e-5))


def test_absorbed_attention_is_expanded_attention() -> None:
    x, weights = normal(2, 7, 16, seed=1), latent_weights()
    assert close(latent_attention(x, weights, SHAPE, absorbed=True)[0], latent_attention(x, weights, SHAPE)[0])


@pytest.mark.parametrize(("split", "absorbed"), list(product((1, 3, 6), (True, False))))
def test_attention_over_kept_latents_is_attention_over_all(split: int, *, absorbed: bool) -> None:
    x, weights = normal(2, 7, 16, seed=1), latent_weights()
    whole, known = latent_attention(x, weights, SHAPE)
    _, past = latent_attention(x[:, :split], weights, SHAPE)
    later, after = latent_attention(x[:, split:], weights, SHAPE, past_BLR=past, absorbed=absorbed)
    assert close(later, whole[:, split:])
    assert close(after, known)


def test_attention_has_no_positions_so_earlier_tokens_may_be_exchanged() -> None:
    x, weights = normal(1, 7, 16, seed=1), latent_weights()
    exchanged = x[:, [3, 1, 0, 2, 4, 5, 6]]
    assert close(latent_attention(exchanged, weights, SHAPE)[0][:, 4:], latent_attention(x, weights, SHAPE)[0][:, 4:])


def test_attention_scale_is_of_both_key_parts() -> None:
    # Two tokens, one key part: the weight of the first follows by hand.
    weights, x = latent_weights(), normal(1, 2, 16, seed=1)
    o, known = latent_attention(x, weights, SHAPE)
    q = (x @ weights["q_proj.weight"].T).unflatten(-1, (2, 7))[0, 1]
    keys = weights["kv_b_proj.weight"].unflatten(0, (2, 9))
    outputs = []
    for head in range(2):
        k = torch.cat([known[0, :, :6] @ keys[head, :4].T, known[0, :, 6:]], -1)
        attention = (k @ q[head] / 7**0.5).softmax(0)
        outputs.append(attention @ (known[0, :, :6] @ keys[head, 4:].T))
    assert close(o[0, 1], torch.cat(outputs) @ weights["o_proj.weight"].T)


def test_weights_are_unbiased_scores_and_a_constant_bias_changes_nothing() -> None:
    logits, bias, rule = normal(40, 6, seed=1), normal(6, seed=2), RoutingRule(2, 2.446)
    routing = route(logits, bias, rule)
    assert close(routing.weights.sum(-1), torch.full((40,), 2.446, dtype=torch.float64))
    chosen = torch.sigmoid(logits).gather(-1, routing.indices)
    assert close(routing.weights, 2.446 * chosen / chosen.sum(-1, keepdim=True))
    assert torch.equal(route(logits, bias + 3, rule).indices, routing.indices)
    assert not torch.equal(route(logits, 0 * bias, rule).indices, routing.indices)


def test_margin_is_what_it_takes_to_choose_another_expert() -> None:
    logits, bias, rule = normal(40, 6, seed=1), torch.zeros(6, dtype=torch.float64), RoutingRule(2, 1.0)
    routing = route(logits, bias, rule)
    for token in range(40):
        for nudge, kept in ((0.99, True), (1.01, False)):
            moved = torch.zeros(1, 6, dtype=torch.float64)
            moved[0, routing.indices[token]] -= nudge * routing.margin[token]
            again = route(logits[token : token + 1], moved[0], rule).indices
            assert (set(again[0].tolist()) == set(routing.indices[token].tolist())) == kept
    assert route(logits, bias, RoutingRule(6, 1.0)).margin.isinf().all()


def test_groups_limit_the_choice() -> None:
    logits, bias = normal(40, 6, seed=1), torch.zeros(6, dtype=torch.float64)
    routing = route(logits, bias, RoutingRule(2, 1.0, num_groups=3, num_chosen_groups=1))
    assert torch.equal(routing.indices[:, 0] // 2, routing.indices[:, 1] // 2)
    everyone = route(logits, bias, RoutingRule(2, 1.0, num_groups=3, num_chosen_groups=3))
    assert torch.equal(everyone.indices, route(logits, bias, RoutingRule(2, 1.0)).indices)


def test_forced_experts_are_weighed_by_their_own_scores() -> None:
    logits, bias, rule = normal(5, 6, seed=1), normal(6, seed=2), RoutingRule(2, 1.0, renormalise=False)
    forced = torch.tensor([[0, 5]]).expand(5, 2)
    assert torch.equal(route(logits, bias, rule, forced).weights, torch.sigmoid(logits)[:, [0, 5]])


def test_mixture_is_the_sum_of_its_experts() -> None:
    x, weights = normal(9, 16, seed=1), expert_weights()
    logits = x @ weights["gate.weight"].T
    routing = route(logits, weights["gate.e_score_correction_bias"], RoutingRule(2, 2.446))

    def expert(name: str, gate: str, up: str, down: str) -> Tensor:
        return swiglu(x, *(weights[f"{name}.{part}.weight"] for part in (gate, up, down)))

    every = torch.stack([expert(f"experts.{e}", "w1", "w3", "w2") for e in range(6)], 1)
    dense = torch.zeros(9, 6, dtype=torch.float64).scatter(1, routing.indices, routing.weights)
    expected = (dense[..., None] * every).sum(1)
    shared = expert("shared_experts", "gate_proj", "up_proj", "down_proj")
    assert close(mixture(x, weights, routing), expected + shared)
    alone = {name: x for name, x in weights.items() if not name.startswith("shared")}
    assert close(mixture(x, alone, routing), expected)


@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("split", [0, 1, 2, 5, 9])
def test_layer_goes_on_where_it_stopped(heads: tuple[int, int], split: int) -> None:
    x, weights = normal(2, 9, 16, seed=1), kda_weights(*heads)
    whole, end = kda_layer(x, weights, heads=heads, eps=1e-5)
    first, between = kda_layer(x[:, :split], weights, heads=heads, eps=1e-5)
    second, last = kda_layer(x[:, split:], weights, heads=heads, eps=1e-5, memory=between)
    assert close(torch.cat([first, second], 1), whole)
    for found, expected in zip(last, end, strict=True):
        assert close(found, expected)


def test_grouped_values_are_heads_that_share_queries_and_keys() -> None:
    x, weights = normal(1, 6, 16, seed=1), kda_weights(1, 2)
    grouped, _ = kda_layer(x, weights, heads=(1, 2), eps=1e-5)
    repeated = {**weights}
    for name in ("q_proj", "k_proj", "q_conv1d", "k_conv1d"):
        repeated[f"{name}.weight"] = torch.cat([weights[f"{name}.weight"]] * 2)
    apart, _ = kda_layer(x, repeated, heads=(2, 2), eps=1e-5)
    assert close(grouped, apart)

"""Laws of layers: the float64 reference and its budget, experts, baselines, switches, operators; each a function of the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kda_reference.activations import inverse_norm
from kda_reference.kda_layer import kda_layer
from kda_reference.related import decay_only, gated_delta_net
from model_budget import judge, score
from model_cases import F64, close, evaluate, made, random_tokens, truth
from torch.nn.functional import silu, softplus

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def in_budget(kda: Any, preset: str) -> None:
    """Logits, hidden states, loss and every gradient are as far from the float64 reference as float32 explains."""
    expected, tokens = truth(preset)
    verdict = judge(evaluate(kda, made(kda, kda.preset(preset)), tokens, expected.routing), expected)
    assert verdict.score <= 1, verdict


def matches_reference(kda: Any) -> None:
    in_budget(kda, "tiny")


def matches_reference_with_grouped_values(kda: Any) -> None:
    in_budget(kda, "tiny-grouped-values")


def chooses_the_experts_of_the_reference(kda: Any) -> None:
    """Unforced, the model takes the reference's experts wherever they are not tied within rounding."""
    expected, tokens = truth("tiny")
    assert expected.margin > 1e-6, "the case has a tie; its routing would be decided by rounding"
    model = made(kda, kda.preset("tiny"))
    with torch.no_grad():
        logits = model(tokens)
    for index, layer in enumerate(model.model.layers[1:], 1):
        found = layer.block_sparse_moe.gate.last.indices
        assert torch.equal(found.sort(-1).values, expected.routing[index].sort(-1).values)
    assert score(logits, expected.budgets["logits"]) <= 1


def routing_weighs_by_scores_and_chooses_by_bias(kda: Any) -> None:
    config = kda.preset("tiny").replace(num_expert_groups=2)
    model = made(kda, config, dtype=F64)
    router = next(model.routers())
    x = torch.randn(40, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    routing = router(x)
    close(routing.weights.sum(-1), torch.full((40,), 2.446, dtype=F64))
    scores = torch.sigmoid(x @ router.weight.T).gather(-1, routing.indices)
    close(routing.weights, 2.446 * scores / scores.sum(-1, keepdim=True))
    assert torch.equal(routing.indices // 4, routing.indices[:, :1].expand(-1, 2) // 4), "one of two groups is chosen"
    with torch.no_grad():
        router.e_score_correction_bias += 5
        assert torch.equal(router(x).indices, routing.indices)
        router.e_score_correction_bias[3] += 5
        assert bool((router(x).indices == 3).any(-1).all())
        close(router(x).weights.sum(-1), torch.full((40,), 2.446, dtype=F64))


def experts_compute_alike_one_by_one_gathered_and_grouped(kda: Any) -> None:
    """Values and gradients, with experts that nobody chose and widths that alignment divides."""
    config = kda.preset("tiny")
    experts = kda.experts.Experts(config)
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    chosen = torch.tensor([0] * 9 + [2] * 3 + [7] * 5)
    x = torch.randn(len(chosen), 32, generator=generator, requires_grad=True)
    upstream = torch.randn(len(chosen), 32, generator=generator)
    results = []
    for form in (experts._one_by_one, experts._gathered, experts._grouped):
        y = form(x, chosen)
        results.append([y, *torch.autograd.grad((y * upstream).sum(), [x, *experts.parameters()])])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def biases_move_towards_an_even_load(kda: Any) -> None:
    """Counted in training alone and once with recomputation; under them a skewed router becomes even."""
    model = made(kda, kda.preset("tiny")).train()
    tokens = random_tokens(4, 16)
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(tokens).sum().backward()
        for router in model.routers():
            assert int(router.load.sum()) == 4 * 16 * 2
            before, load = router.e_score_correction_bias.clone(), router.load.double()
            router.balance(0.25)
            expected = 0.25 * torch.sign(load.mean() - load).float()
            torch.testing.assert_close(router.e_score_correction_bias - before, expected)
            assert not router.load.any()
    model.eval()(tokens)
    assert not any(router.load.any() for router in model.routers())
    router, x = next(model.routers()), torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    router.train().e_score_correction_bias.zero_()[0] = 0.8
    spreads = []
    for _ in range(60):
        router(x)
        spreads.append(float(router.load.double().std()))
        router.balance(0.02)
    assert spreads[-1] < spreads[0] / 4


def one_decay_per_head_is_the_same_decay_in_every_channel(kda: Any) -> None:
    """The GDN layer is the KDA layer of the reference whose gate is alike in every channel, and Gated DeltaNet underneath."""
    config = kda.preset("tiny").replace(mixer="gdn")
    layer = made(kda, config, dtype=F64).model.layers[1].self_attn
    x = torch.randn(2, 9, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    weights["f_b_proj.weight"] = torch.eye(2, dtype=F64).repeat_interleave(8, 0)
    weights["f_a_proj.weight"], weights["dt_bias"] = (
        weights.pop("a_proj.weight"),
        weights["dt_bias"].repeat_interleave(8),
    )
    expected, _ = kda_layer(x, weights, heads=(2, 2), eps=1e-5)
    close(layer(x, kda.find_operator("torch", x.device))[0].detach(), expected)
    close(layer(x, kda.find_operator("torch", x.device))[0].detach(), _by_recurrence(kda, layer, x, gated_delta_net))


def decay_without_the_delta_rule_erases_nothing(kda: Any) -> None:
    """To 2^-30 of what is written."""
    config = kda.preset("tiny").replace(mixer="decay")
    layer = made(kda, config, dtype=F64).model.layers[1].self_attn
    x = torch.randn(2, 9, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = layer(x, kda.find_operator("torch", x.device))[0].detach()
    expected = _by_recurrence(kda, layer, x, decay_only)
    assert float((found - expected).abs().max()) < 9 * 2.0**-30 * float(expected.abs().max())
    assert not torch.allclose(found, _by_recurrence(kda, layer, x, gated_delta_net), rtol=1e-3)


def _by_recurrence(kda: Any, layer: Any, x: Tensor, recurrence: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """Compute a layer of two heads of width 8, one head and row at a time."""
    q, k, v, _ = layer._operands(x, kda.find_operator("torch", x.device), None, None)
    q, k = (y * inverse_norm(y) for y in (q, k))
    decay = -layer.A_log.flatten().exp() * softplus(layer.a_proj(x) + layer.dt_bias)
    beta = torch.sigmoid(layer.b_proj(x))
    o = torch.empty_like(v)
    for row in range(x.shape[0]):
        for head in range(2):
            operands = (y[row, :, head] for y in (q, k, v, decay, beta))
            o[row, :, head], _ = recurrence(*operands, 8**-0.5, torch.zeros(8, 8, dtype=F64))
    gate = layer.g_b_proj(layer.g_a_proj(x)).unflatten(-1, (2, 8))
    y: Tensor = layer.o_proj(layer.o_norm(o, gate).flatten(2)).detach()
    return y


def switches_change_what_they_name(kda: Any) -> None:
    """No convolution is a convolution of the current token alone; the output gate is sigmoid, swish or one."""
    config, tokens = kda.preset("tiny-dense"), random_tokens(2, 9)
    model = made(kda, config, dtype=F64)
    state = model.state_dict()
    with torch.no_grad():
        bare = made(kda, config.replace(short_convolution=False), dtype=F64)
        bare.load_state_dict({name: x for name, x in state.items() if "conv1d" not in name})
        for name in state:
            if "conv1d" in name:
                state[name].zero_()
                state[name][..., -1] = 1
        model.load_state_dict(state)
        close(bare(tokens), model(tokens))
        cache = bare.new_cache(2)
        close(torch.cat([bare(tokens[:, t : t + 1], cache=cache) for t in range(9)], 1), bare(tokens))
        x = torch.randn(2, 5, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
        operator = kda.find_operator("torch", x.device)
        layer = model.model.layers[0].self_attn
        ungated = made(kda, config.replace(output_gate="none"), dtype=F64).model.layers[0].self_attn
        ungated.load_state_dict({name: y for name, y in layer.state_dict().items() if not name.startswith("g_")})
        plain = ungated(x, operator)[0]
        layer.g_b_proj.weight.zero_()
        close(layer(x, operator)[0], 0.5 * plain)
        swish = made(kda, config.replace(output_gate="swish"), dtype=F64).model.layers[0].self_attn
        swish.load_state_dict(layer.state_dict())
        close(swish(x, operator)[0], 0 * plain)
        o, gate = torch.randn(2, 3, 4, 8, dtype=F64)
        close(swish.o_norm(o, gate), silu(gate) * ungated.o_norm(o))


def operators_are_exchangeable(kda: Any) -> None:
    """By name, as a function and by path; the reference behind the same seam gives the same model."""
    tokens, config = random_tokens(2, 9), kda.preset("tiny")
    model = made(kda, config, dtype=F64)
    calls = []

    def foreign(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return kda.find_operator("torch", torch.device("cpu")).many(*args, **options)

    with torch.no_grad():
        expected = model(tokens)
        for operator in ("reference", "kda_reference.chunkwise:chunkwise_kda", foreign):
            model.operator = operator
            close(model(tokens), expected)
            cache = model.new_cache(2)
            close(torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in range(9)], 1), expected)
    assert calls
    assert all(options["use_gate_in_kernel"] and options["use_beta_sigmoid_in_kernel"] for options in calls)

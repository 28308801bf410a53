"""The whole hybrid model in float64, from a configuration and tensors under their released names: slow, plain, exact.

    x = embedding(tokens)
    for each layer:   x += mixer(norm(x));   x += mlp(norm(x))
    logits = lm_head(norm(x))

The mixer is Kimi Delta Attention or, in the layers listed in ``full_attn_layers`` (counted from ONE), latent attention; the
first layers have a dense MLP, the others a mixture of experts. Everything is differentiable by autograd. Dimension letters: B
sequences, T tokens, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kda_reference.experts import Routing, RoutingRule, mixture, route, swiglu
from kda_reference.kda_layer import kda_layer
from kda_reference.latent_attention import LatentShape, latent_attention
from kda_reference.normalisation import rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class HybridResult(NamedTuple):
    """What the model computes on its way.

    ``logits [B, T, vocabulary]``; ``hidden``, the residual stream ``[B, T, D]`` after the embedding and after each layer; and
    the routing of each layer that has experts, by its index from zero.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    routing: dict[int, Routing]


def hybrid_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokens_BT: Tensor,
    *,
    forced: Mapping[int, Tensor] | None = None,
) -> HybridResult:
    """Evaluate the model on whole sequences.

    Parameters
    ----------
    config
        The released ``config.json`` as a mapping; ``linear_attn_config`` may add ``num_v_heads``.
    tensors
        float64 tensors under the released names. For a gradient, leaves that require one.
    tokens_BT
        Token ids, int64.
    forced
        Experts ``[B * T, k]`` by layer index that are taken instead of the chosen ones; ``None`` means to choose.

    Returns
    -------
    HybridResult
        float64.

    References
    ----------
    [KL] Kimi Linear technical report, section 4.
    """
    eps, linear = config["rms_norm_eps"], config["linear_attn_config"]
    x_BTD = tensors["model.embed_tokens.weight"][tokens_BT]
    hidden, routing = [x_BTD], {}
    for layer in range(config["num_hidden_layers"]):
        weights = _below(tensors, f"model.layers.{layer}.")
        normalised = rms_norm(x_BTD, weights["input_layernorm.weight"], eps)
        attention = _below(weights, "self_attn.")
        if layer + 1 in linear["full_attn_layers"]:
            mixed, _ = latent_attention(normalised, attention, _latent_shape(config))
        else:
            heads = (linear["num_heads"], linear.get("num_v_heads", linear["num_heads"]))
            mixed, _ = kda_layer(normalised, attention, heads=heads, eps=eps)
        x_BTD = x_BTD + mixed
        normalised = rms_norm(x_BTD, weights["post_attention_layernorm.weight"], eps)
        if "mlp.gate_proj.weight" in weights:
            updated = swiglu(normalised, *(weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        else:
            flat, experts = normalised.flatten(0, 1), _below(weights, "block_sparse_moe.")
            logits = flat @ experts["gate.weight"].T
            fixed = None if forced is None else forced[layer]
            routing[layer] = route(logits, experts["gate.e_score_correction_bias"], _routing_rule(config), fixed)
            updated = mixture(flat, experts, routing[layer]).view_as(normalised)
        x_BTD = x_BTD + updated
        hidden.append(x_BTD)
    head = tensors["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    logits = rms_norm(x_BTD, tensors["model.norm.weight"], eps) @ head.T
    return HybridResult(logits, tuple(hidden), routing)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _latent_shape(config: Mapping[str, Any]) -> LatentShape:
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return LatentShape(*(config[name] for name in names))


def _routing_rule(config: Mapping[str, Any]) -> RoutingRule:
    names = ("num_experts_per_token", "routed_scaling_factor", "moe_renormalize", "num_expert_group", "topk_group")
    return RoutingRule(*(config[name] for name in names))


def next_token_loss(logits_BTN: Tensor, tokens_BT: Tensor) -> Tensor:
    """Return the mean negative log likelihood of each token given those before it (nats)."""
    likelihood = logits_BTN[:, :-1].log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])
    return -likelihood.mean()


def float64_leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return float64 copies that require a gradient, exact for every narrower dtype."""
    return {name: tensor.detach().to(torch.float64).requires_grad_() for name, tensor in tensors.items()}

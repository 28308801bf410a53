"""Mixture of experts: sigmoid routing with a correction bias, SwiGLU experts.

    s = sigmoid(W_g x)                        scores                              ``scores``
    I = top-k of (s + b)                      the bias chooses ...                ``indices``
    w_i = factor s_i / (sum_{I} s + 1e-20)    ... and never weighs                ``weights``
    y = sum_{i in I} w_i E_i(x) + E_shared(x),   E(x) = W_down (SiLU(W_gate x) W_up x)

With groups of experts, only those of the groups with the largest sums of their two best choices may be chosen.
Dimension letters: T tokens, E experts, k chosen experts, D model width, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import silu

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Routing(NamedTuple):
    """Who computes a token.

    ``indices`` and ``weights`` are ``[T, k]``; ``margin [T]`` is by how much the last chosen expert beat the first that was
    not, in score: an implementation whose scores err by less than half of it chooses the same experts.
    """

    indices: Tensor
    weights: Tensor
    margin: Tensor


class RoutingRule(NamedTuple):
    """How many experts are chosen, and how they are weighed."""

    num_chosen: int
    factor: float
    renormalise: bool = True
    num_groups: int = 1
    num_chosen_groups: int = 1


def route(logits_TE: Tensor, bias_E: Tensor, rule: RoutingRule, forced_Tk: Tensor | None = None) -> Routing:
    """Choose and weigh experts.

    Parameters
    ----------
    logits_TE
        Router logits.
    bias_E
        Correction added to the scores when choosing.
    rule
        Numbers and factors.
    forced_Tk
        Experts to take instead of the chosen ones; ``None`` means to choose.
    """
    scores_TE = torch.sigmoid(logits_TE)
    choice_TE = scores_TE + bias_E
    if rule.num_groups > 1:
        grouped = choice_TE.unflatten(-1, (rule.num_groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(rule.num_chosen_groups, -1).indices
        allowed = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=best.device).scatter(-1, best, value=True)
        choice_TE = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    ranked = choice_TE.sort(dim=-1, descending=True, stable=True)
    indices = ranked.indices[:, : rule.num_chosen] if forced_Tk is None else forced_Tk
    weights = scores_TE.gather(-1, indices)
    if rule.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if rule.num_chosen == choice_TE.shape[-1]:
        margin = torch.full_like(logits_TE[:, 0], torch.inf)
    else:
        margin = ranked.values[:, rule.num_chosen - 1] - ranked.values[:, rule.num_chosen]
    return Routing(indices, rule.factor * weights, margin.detach())


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """Return ``W_down (SiLU(W_gate x) W_up x)``."""
    return (silu(x @ gate_FD.T) * (x @ up_FD.T)) @ down_DF.T


def mixture(x_TD: Tensor, weights: Mapping[str, Tensor], routing: Routing) -> Tensor:
    """Return the weighted sum of the chosen experts, and the shared one if there is one.

    Parameters
    ----------
    x_TD
        Tokens.
    weights
        Of one layer, under ``experts.E.{w1, w3, w2}.weight`` (gate, up, down) and ``shared_experts.{gate, up, down}_proj.weight``.
    routing
        Who computes which token.
    """
    y_TD = torch.zeros_like(x_TD)
    for expert in routing.indices.unique().tolist():
        tokens, places = (routing.indices == expert).nonzero(as_tuple=True)
        gate, up, down = (weights[f"experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2"))
        part = routing.weights[tokens, places, None] * swiglu(x_TD[tokens], gate, up, down)
        y_TD = y_TD.index_add(0, tokens, part)
    if "shared_experts.gate_proj.weight" not in weights:
        return y_TD
    return y_TD + swiglu(x_TD, *(weights[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))

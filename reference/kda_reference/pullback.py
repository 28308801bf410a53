"""Carry gradients of the operator's variables back through the activations to the inputs of the call.

    normalise      dx = r (dy - y (y . dy)),  r = 1 / sqrt(sum x^2 + 1e-6)       exact with the constant inside the root
    softplus gate  dx = -exp(A) sigmoid(x + b) dg,   dA = sum dg g,   db = sum_t dx
    bounded gate   dx = exp(A) g' dg,   dA = sum z g' dg,   db = sum_t dx
                   with z = exp(A) (x + b) and g' = lower_bound sigmoid(z) sigmoid(-z)
    strength       dx = c sigmoid(x) sigmoid(-x) dbeta
    grouped heads  gradients of q and k are summed over the value heads that read them

``1 - sigmoid(z)`` is formed as ``sigmoid(-z)``, so that saturated logits keep their relative accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.activations import gate, gate_logit, inverse_norm, strength_ceiling

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.activations import Operands
    from kda_reference.contract import KdaInputs


class GateSlopes(NamedTuple):
    """Derivatives of the log decay ``[B, T, G, K]`` by its logit (and bias), and by A."""

    by_logit: Tensor
    by_a_log: Tensor


def pull_back(inputs: KdaInputs, operator: Operands) -> dict[str, Tensor]:
    """Return the gradients of the inputs by argument name, all but that of ``initial_state``.

    Parameters
    ----------
    inputs
        A call that meets the contract.
    operator
        Gradients of the operator's variables, in the call's layout ``[B, T, G, *]``, float64.
    """
    found = {
        "q": sum_over_group(inputs, operator.q),
        "k": sum_over_group(inputs, operator.k),
        "v": operator.v,
        "g": operator.log_decay,
        "beta": operator.beta,
    }
    if inputs.use_qk_l2norm_in_kernel:
        for name, x in (("q", inputs.q.double()), ("k", inputs.k.double())):
            r = inverse_norm(x)
            y, dy = x * r, found[name]
            found[name] = r * (dy - y * (y * dy).sum(-1, keepdim=True))
    if inputs.use_gate_in_kernel:
        slopes = gate_slopes(inputs)
        found["g"] = slopes.by_logit * operator.log_decay
        if inputs.A_log is not None:
            found["A_log"] = (slopes.by_a_log * operator.log_decay).sum((0, 1, 3))
        if inputs.dt_bias is not None:
            found["dt_bias"] = found["g"].sum((0, 1)).flatten()
    if inputs.use_beta_sigmoid_in_kernel:
        found["beta"] = strength_slope(inputs) * operator.beta
    return found


def sum_over_group(inputs: KdaInputs, x: Tensor) -> Tensor:
    """Sum over the value heads that read one query/key head: ``[B, T, G, K]`` to ``[B, T, H, K]``."""
    return torch.unflatten(x, 2, (inputs.q.shape[2], inputs.v.shape[2] // inputs.q.shape[2])).sum(3)


def gate_slopes(inputs: KdaInputs) -> GateSlopes:
    """Return the derivatives of an in-kernel gate."""
    logit, bound = gate_logit(inputs), inputs.lower_bound
    if bound is None:
        return GateSlopes(-logit.slope * torch.sigmoid(logit.shifted), gate(logit, None))
    z = logit.slope * logit.shifted
    by_z = bound * torch.sigmoid(z) * torch.sigmoid(-z)
    return GateSlopes(logit.slope * by_z, by_z * z)


def strength_slope(inputs: KdaInputs) -> Tensor:
    """Return the derivative of beta by its logit ``[B, T, G]``."""
    x = inputs.beta.double()
    return strength_ceiling(inputs) * torch.sigmoid(x) * torch.sigmoid(-x)

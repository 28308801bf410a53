"""What may stand in front of the operator: normalisation, the two gates, the write strength [KL eq. 10].

    normalise      y = x / sqrt(sum x^2 + 1e-6)             over the key width
    softplus gate  g = -exp(A) softplus(x + b)              A per value head, b per value head and channel
    bounded gate   g = lower_bound sigmoid(exp(A) (x + b))  not a clamp of the softplus gate
    strength       beta = c sigmoid(x)                      c = 2 with negative eigenvalues, else 1

Everything is differentiable by autograd in any dtype; :mod:`kda_reference.pullback` has the chain rules written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.contract import KdaInputs

L2_EPSILON = 1e-6


class Operands(NamedTuple):
    """The operator's own variables, one q and k per value head.

    In the call's layout ``[B, T, G, *]``, or side by side ``[N, G, T, *]`` where a function says so.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor


class GateLogit(NamedTuple):
    """The argument of a gate: ``x + b`` ``[B, T, G, K]``, and ``exp(A)`` ``[G, 1]`` or a scalar one."""

    shifted: Tensor
    slope: Tensor


def apply_activations(inputs: KdaInputs, dtype: torch.dtype = torch.float64) -> Operands:
    """Return the operator's variables of a call, computed in ``dtype``, in the call's layout.

    Parameters
    ----------
    inputs
        A call that meets the contract.
    dtype
        Dtype of all arithmetic and of the result.

    Notes
    -----
    Saturated logits give finite results as long as ``exp(A_log)`` is finite in ``dtype``.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (10).
    """
    q, k, v, g, beta = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
    if inputs.use_qk_l2norm_in_kernel:
        q, k = q * inverse_norm(q), k * inverse_norm(k)
    if inputs.use_gate_in_kernel:
        g = gate(gate_logit(inputs, dtype), inputs.lower_bound)
    if inputs.use_beta_sigmoid_in_kernel:
        beta = strength_ceiling(inputs) * torch.sigmoid(beta)
    group = v.shape[2] // q.shape[2]
    return Operands(q.repeat_interleave(group, 2), k.repeat_interleave(group, 2), v, g, beta)


def inverse_norm(x: Tensor) -> Tensor:
    """Return ``1 / sqrt(sum x^2 + 1e-6)`` over the last axis, which is kept with size one."""
    return (x.square().sum(-1, keepdim=True) + L2_EPSILON).rsqrt()


def gate_logit(inputs: KdaInputs, dtype: torch.dtype = torch.float64) -> GateLogit:
    """Return ``x + b`` and ``exp(A)`` of an in-kernel gate."""
    x = inputs.g.to(dtype)
    if inputs.dt_bias is not None:
        x = x + inputs.dt_bias.to(dtype).reshape(x.shape[2:])
    if inputs.A_log is None:
        return GateLogit(x, torch.ones((), dtype=dtype, device=x.device))
    return GateLogit(x, inputs.A_log.to(dtype).exp()[:, None])


def gate(logit: GateLogit, lower_bound: float | None) -> Tensor:
    """Return the log decay in nats, of the softplus gate without a bound, else of the bounded one."""
    if lower_bound is None:
        # softplus(x) = -log sigmoid(-x); torch's softplus switches to x above a threshold, which float64 can see.
        return logit.slope * logsigmoid(-logit.shifted)
    return lower_bound * torch.sigmoid(logit.slope * logit.shifted)


def strength_ceiling(inputs: KdaInputs) -> float:
    """Return the least upper bound of beta under the in-kernel sigmoid."""
    return 2.0 if inputs.allow_neg_eigval else 1.0

"""The extra variance of a gate gradient that is formed by a cumulative sum.

Chunkwise kernels use ``dg_t - dg_{t+1} = q_t dq_t - k_t dk_t(write) + k_t dk_t(read)`` and sum from the end of the chunk, so that the
rounding of every later token of the chunk enters ``dg_t`` undamped, although the true ``dg_t`` may be a tiny fraction of it. That
is a property of the form, not a bug, and a budget without it would call every chunkwise kernel wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from kda_conformance.activations import gate
from kda_conformance.rounding import Exact

if TYPE_CHECKING:
    from torch import Tensor

    from kda_conformance.members import Members

# The longest chunk in use, a power of two.
CHUNK = 128


def cumulative_sum_variance(members: Members) -> dict[str, Tensor]:
    """Return the variance to add to ``dg``, and to the reductions of it that the call has."""
    inputs, operands = members.inputs, members.exact_operands
    assert operands is not None, "run the recurrences first"  # noqa: S101 - programmer error
    if operands.q.numel() == 0:
        return {}
    dq = torch.cat([pair[0] for pair in members.operator_gradients])
    dk = torch.cat([pair[1] for pair in members.operator_gradients])
    per_token = operands.q**2 * dq.var(0, keepdim=True) + operands.k**2 * dk.var(0, keepdim=True)
    spread = members.packing.spread(per_token)
    variance = members.packing.gather(_following(spread))[0]
    if not inputs.use_gate_in_kernel:
        return {"dg": variance}
    x, a_log = _gate_arguments(members)
    slope_x, slope_a = torch.autograd.grad(gate(x, a_log, inputs.lower_bound, Exact()).sum(), (x, a_log))
    deviation = variance.sqrt()
    found = {"dg": slope_x**2 * variance}
    # The tokens of one chunk share their errors, so they add as deviations there and as variances between chunks.
    if inputs.A_log is not None:
        found["dA_log"] = _by_chunk(members, slope_a.abs() * deviation).sum(-1)
    if inputs.dt_bias is not None:
        found["ddt_bias"] = _by_chunk(members, slope_x.abs() * deviation).flatten()
    return found


def _following(per_token: Tensor) -> Tensor:
    """Return, for each token of ``[R, N, G, T, K]``, the sum over it and the 127 after it: its chunk may end anywhere there."""
    total, width = per_token, 1
    while width < CHUNK:
        total = total + pad(total, (0, 0, 0, width))[..., width:, :]
        width *= 2
    return total


def _gate_arguments(members: Members) -> tuple[Tensor, Tensor]:
    inputs = members.inputs
    x = inputs.g.detach().double()
    if inputs.dt_bias is not None:
        x = x + inputs.dt_bias.detach().double().reshape(x.shape[2:])
    a_log = torch.zeros_like(x)
    if inputs.A_log is not None:
        a_log = a_log + inputs.A_log.detach().double()[:, None]
    return x.requires_grad_(), a_log.requires_grad_()


def _by_chunk(members: Members, deviation: Tensor) -> Tensor:
    """Return, per value head and channel, the variance of a sum over all tokens."""
    spread = members.packing.spread(deviation[None])
    chunks: Tensor = pad(spread, (0, 0, 0, -spread.shape[3] % CHUNK)).unflatten(3, (-1, CHUNK))
    return (chunks.sum(4) ** 2).sum((0, 1, 3))

"""The gated delta rule, one token at a time, in float64: the ground truth [KL eq. 1].

    S~_t = Diag(exp(g_t)) S_{t-1}         decayed memory                    ``decayed``
    e_t  = v_t - S~_t^T k_t               error of its prediction           ``error``
    S_t  = S~_t + k_t (beta_t e_t)^T      correction                        ``state``
    o_t  = scale S_t^T q_t                reading                           ``output``

Dimension letters: N sequences, G value heads, T tokens, K key width, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.activations import Operands, apply_activations
from kda_reference.contract import KdaInputs, KdaResult, check_inputs
from kda_reference.packing import SideBySide, call_layout, initial_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Step(NamedTuple):
    """The four left-hand sides of one token: states ``[N, G, K, V]``, vectors ``[N, G, V]``."""

    decayed: Tensor
    error: Tensor
    state: Tensor
    output: Tensor


def recurrence(x: Operands, state: Tensor, scale: float) -> Iterator[Step]:
    """Apply the recurrence to operands laid side by side ``[N, G, T, *]``, token by token.

    Parameters
    ----------
    x
        q, k, v, log decay and beta, of one dtype, which may be complex: the steps are analytic in every operand.
    state
        ``S_0`` ``[N, G, K, V]``.
    scale
        Factor on the queries (dimensionless).

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    decay = x.log_decay.exp()
    for t in range(x.v.shape[2]):
        q, k, v, beta = x.q[:, :, t], x.k[:, :, t], x.v[:, :, t], x.beta[:, :, t, None]
        decayed = decay[:, :, t, :, None] * state
        error = v - read(decayed, k)
        state = decayed + k[..., :, None] * (beta * error)[..., None, :]
        output = scale * read(state, q)
        yield Step(decayed, error, state, output)


def read(state: Tensor, key: Tensor) -> Tensor:
    """Return ``state^T key``: ``[..., K, V]`` and ``[..., K]`` to ``[..., V]``."""
    return (key[..., None, :] @ state)[..., 0, :]


@torch.no_grad()
def recurrent_kda(inputs: KdaInputs) -> KdaResult:
    """Evaluate a call by the recurrence.

    Parameters
    ----------
    inputs
        The arguments of the call.

    Returns
    -------
    KdaResult
        ``o`` and, when asked for, ``final_state``, both float64 on the inputs' device.

    Raises
    ------
    KdaError
        If the arguments contradict the contract; see :func:`kda_reference.check_inputs`.

    Notes
    -----
    Cost O(T K V) per head, memory O(K V). This is the yardstick; :mod:`kda_reference.certificate` bounds its own error.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    check_inputs(inputs)
    packing = SideBySide(inputs)
    x = Operands(*(packing.spread(operand) for operand in apply_activations(inputs)))
    state, outputs = initial_state(inputs), torch.empty_like(x.v)
    for t, step in enumerate(recurrence(x, state, inputs.effective_scale)):
        state, outputs[:, :, t] = step.state, step.output
    return KdaResult(
        o=packing.gather(outputs), final_state=call_layout(inputs, state) if inputs.output_final_state else None
    )

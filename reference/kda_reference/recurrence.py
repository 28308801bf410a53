"""The gated delta rule, one token at a time, in float64: the ground truth [KL eq. 1].

    S~_t = Diag(exp(g_t)) S_{t-1}         decayed memory                    ``decayed``
    e_t  = v_t - S~_t^T k_t               error of its prediction           ``error``
    S_t  = S~_t + k_t (beta_t e_t)^T      correction                        ``state``
    o_t  = scale S_t^T q_t                reading                           ``outputs[t]``

Dimension letters: N sequences, G value heads, T tokens, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kda_reference.activations import Operands, apply_activations
from kda_reference.contract import KdaInputs, KdaResult
from kda_reference.packing import SideBySide

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Everything one pass over the tokens produced, sequences side by side.

    Attributes
    ----------
    outputs
        ``o`` ``[N, G, T, V]``.
    states
        ``S_0 ... S_T``, each ``[N, G, K, V]``; only ``S_T`` when nothing was kept.
    errors
        ``e_1 ... e_T``, each ``[N, G, V]``; empty when nothing was kept.
    """

    outputs: Tensor
    states: list[Tensor]
    errors: list[Tensor]


def recurrent_kda(inputs: KdaInputs) -> KdaResult:
    """Evaluate a call by the recurrence.

    Parameters
    ----------
    inputs
        A call that meets the contract; see :func:`kda_reference.check_inputs`.

    Returns
    -------
    KdaResult
        ``o`` and, when asked for, ``final_state``, both float64 on the inputs' device.

    Notes
    -----
    Cost O(T K V) per head. This is the yardstick; :mod:`kda_reference.certificate` bounds its own error.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    packing = SideBySide(inputs)
    operands = Operands(*(packing.spread(x) for x in apply_activations(inputs)))
    path = walk(operands, initial_state(inputs), inputs.effective_scale, keep=False)
    final = path.states[-1] if inputs.output_final_state else None
    return KdaResult(o=packing.gather(path.outputs), final_state=None if final is None else laid_out(inputs, final))


def walk(x: Operands, state: Tensor, scale: float, *, keep: bool) -> Trajectory:
    """Apply the recurrence to operands laid side by side ``[N, G, T, *]`` from ``state [N, G, K, V]``.

    Parameters
    ----------
    keep
        Whether states and errors of all tokens are kept, as the reverse pass needs them.
    """
    decay = x.log_decay.exp()
    outputs = torch.empty_like(x.v)
    states, errors = [state], []
    for t in range(x.v.shape[2]):
        q, k, v, beta = x.q[:, :, t], x.k[:, :, t], x.v[:, :, t], x.beta[:, :, t, None]
        decayed = decay[:, :, t, :, None] * state
        error = v - read(decayed, k)
        state = decayed + k[..., :, None] * (beta * error)[..., None, :]
        outputs[:, :, t] = scale * read(state, q)
        if keep:
            errors.append(error)
            states.append(state)
        else:
            states[0] = state
    return Trajectory(outputs=outputs, states=states, errors=errors)


def read(state: Tensor, key: Tensor) -> Tensor:
    """Return ``state^T key``: ``[..., K, V]`` and ``[..., K]`` to ``[..., V]``."""
    return (key[..., None, :] @ state)[..., 0, :]


def initial_state(inputs: KdaInputs) -> Tensor:
    """Return ``S_0`` as float64 ``[N, G, K, V]``, zeros when the call gives none."""
    if inputs.initial_state is None:
        heads, k_width, v_width = inputs.v.shape[2], inputs.k.shape[3], inputs.v.shape[3]
        return torch.zeros(inputs.num_sequences, heads, k_width, v_width, dtype=torch.float64, device=inputs.q.device)
    return laid_out(inputs, inputs.initial_state.detach().double())


def laid_out(inputs: KdaInputs, state: Tensor) -> Tensor:
    """Turn ``[.., K, V]`` into the call's layout, or back: the two layouts are transposes of each other."""
    return state.transpose(-1, -2) if inputs.state_v_first else state

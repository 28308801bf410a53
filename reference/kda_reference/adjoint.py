"""The gradient of the recurrence, by the explicit reverse recurrence; no automatic differentiation.

With ``R_t = Diag(exp g_t) S_{t-1}`` and ``Lam`` the cotangent of the state, from ``Lam = dS_T`` and t = T down to 1:

    dq_t = scale S_t do_t         Lam += scale q_t do_t^T         w = Lam^T k_t
    dv_t = beta_t w               dbeta_t = w . e_t               dk_t = beta_t (Lam e_t - R_t w)
    dR   = Lam - k_t (beta_t w)^T dg_t = rowsum(dR * R_t)         Lam <- Diag(exp g_t) dR

and finally ``dS_0 = Lam``. States are kept from the forward pass: running ``S`` backwards would divide by decays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.activations import Operands, apply_activations
from kda_reference.contract import KdaGradients, KdaInputs, KdaResult
from kda_reference.packing import SideBySide
from kda_reference.pullback import Pullback
from kda_reference.recurrence import Trajectory, initial_state, laid_out, read, walk

if TYPE_CHECKING:
    from torch import Tensor


class ReverseStep(NamedTuple):
    """What one reverse step used, for whoever bounds its error; all ``[N, G, ...]``."""

    cotangent: Tensor
    projection: Tensor
    decayed: Tensor
    decayed_cotangent: Tensor
    next_cotangent: Tensor


def recurrent_kda_vjp(inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None = None) -> tuple[KdaResult, KdaGradients]:
    """Evaluate a call and the gradient of ``<do, o> + <dfinal_state, final_state>`` with respect to every input.

    Parameters
    ----------
    inputs
        A call that meets the contract.
    do
        Cotangent of ``o`` ``[B, T, G, V]``; ``None`` means zero.
    dfinal_state
        Cotangent of the final state, in its layout; ``None`` means zero.

    Returns
    -------
    tuple[KdaResult, KdaGradients]
        float64; an input that was not given has gradient ``None``.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    packing, path, gradients, dstate, _ = reverse(inputs, do, dfinal_state)
    final = laid_out(inputs, path.states[-1]) if inputs.output_final_state else None
    result = KdaResult(o=packing.gather(path.outputs), final_state=final)
    named = Pullback(inputs).gradients(Operands(*(packing.gather(x) for x in gradients)))
    if inputs.initial_state is not None:
        named["initial_state"] = laid_out(inputs, dstate)
    return result, KdaGradients(**named)


def reverse(
    inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None
) -> tuple[SideBySide, Trajectory, Operands, Tensor, list[ReverseStep]]:
    """Run forward and reverse; return gradients of the operands side by side, of ``S_0``, and the steps in reverse order."""
    packing = SideBySide(inputs)
    x = Operands(*(packing.spread(operand) for operand in apply_activations(inputs)))
    path = walk(x, initial_state(inputs), inputs.effective_scale, keep=True)
    do_NGTV = torch.zeros_like(path.outputs) if do is None else packing.spread(do.detach().double())
    cotangent = torch.zeros_like(path.states[-1])
    if dfinal_state is not None:
        cotangent = laid_out(inputs, dfinal_state.detach().double())
    gradients, dstate, steps = reverse_walk(x, path, do_NGTV, cotangent, inputs.effective_scale)
    return packing, path, gradients, dstate, steps


def reverse_walk(
    x: Operands, path: Trajectory, do_NGTV: Tensor, cotangent: Tensor, scale: float
) -> tuple[Operands, Tensor, list[ReverseStep]]:
    """Apply the reverse recurrence to operands laid side by side."""
    decay = x.log_decay.exp()
    gradients = Operands(*(torch.empty_like(operand) for operand in x))
    steps = []
    for t in reversed(range(x.v.shape[2])):
        q, k, beta, do = x.q[:, :, t], x.k[:, :, t], x.beta[:, :, t, None], do_NGTV[:, :, t]
        decayed, error = decay[:, :, t, :, None] * path.states[t], path.errors[t]
        cotangent = cotangent + scale * q[..., :, None] * do[..., None, :]
        w = read(cotangent, k)
        decayed_cotangent = cotangent - k[..., :, None] * (beta * w)[..., None, :]
        gradients.q[:, :, t] = scale * _along_values(path.states[t + 1], do)
        gradients.k[:, :, t] = beta * (_along_values(cotangent, error) - _along_values(decayed, w))
        gradients.v[:, :, t] = beta * w
        gradients.log_decay[:, :, t] = (decayed_cotangent * decayed).sum(-1)
        gradients.beta[:, :, t] = (w * error).sum(-1)
        following = decay[:, :, t, :, None] * decayed_cotangent
        steps.append(ReverseStep(cotangent, w, decayed, decayed_cotangent, following))
        cotangent = following
    return gradients, cotangent, steps


def _along_values(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix vector``: ``[..., K, V]`` and ``[..., V]`` to ``[..., K]``."""
    return (matrix @ vector[..., :, None])[..., 0]

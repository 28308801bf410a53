"""The gradient of the recurrence, by the explicit reverse recurrence; no automatic differentiation.

With ``R_t = Diag(exp g_t) S_{t-1}`` and ``Lam`` the cotangent of the state, from ``Lam = dS_T`` and t = T down to 1:

    dq_t = scale S_t do_t         Lam += scale q_t do_t^T         w = Lam^T k_t
    dv_t = beta_t w               dbeta_t = w . e_t               dk_t = beta_t (Lam e_t - R_t w)
    dR   = Lam - k_t (beta_t w)^T dg_t = rowsum(dR * R_t)         Lam <- Diag(exp g_t) dR

and finally ``dS_0 = Lam``. States are kept from the forward pass: running ``S`` backwards would divide by decays.
Dimension letters: N sequences, G value heads, T tokens, K key width, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.activations import Operands, apply_activations
from kda_reference.contract import KdaGradients, KdaInputs, KdaResult, check_inputs
from kda_reference.errors import ShapeError
from kda_reference.packing import SideBySide, call_layout, initial_state
from kda_reference.pullback import pull_back
from kda_reference.recurrence import read, recurrence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


class ReverseStep(NamedTuple):
    """One reverse step: what it used ``[N, G, ...]``, and the gradients it found."""

    cotangent: Tensor
    projection: Tensor
    decayed: Tensor
    decayed_cotangent: Tensor
    next_cotangent: Tensor
    gradients: Operands


def reverse_recurrence(
    x: Operands, states: Sequence[Tensor], errors: Sequence[Tensor], do: Tensor, cotangent: Tensor, scale: float
) -> Iterator[ReverseStep]:
    """Apply the reverse recurrence to operands laid side by side, from the last token to the first.

    Parameters
    ----------
    x
        The operands of the forward pass ``[N, G, T, *]``.
    states
        ``S_0 ... S_T``, each ``[N, G, K, V]``.
    errors
        ``e_1 ... e_T``, each ``[N, G, V]``.
    do
        Cotangent of the outputs ``[N, G, T, V]``.
    cotangent
        Cotangent of ``S_T`` ``[N, G, K, V]``.
    scale
        Factor on the queries (dimensionless).
    """
    decay = x.log_decay.exp()
    for t in reversed(range(x.v.shape[2])):
        q, k, beta, do_t = x.q[:, :, t], x.k[:, :, t], x.beta[:, :, t, None], do[:, :, t]
        decayed, error = decay[:, :, t, :, None] * states[t], errors[t]
        cotangent = cotangent + scale * q[..., :, None] * do_t[..., None, :]
        w = read(cotangent, k)
        decayed_cotangent = cotangent - k[..., :, None] * (beta * w)[..., None, :]
        gradients = Operands(
            q=scale * along_values(states[t + 1], do_t),
            k=beta * (along_values(cotangent, error) - along_values(decayed, w)),
            v=beta * w,
            log_decay=(decayed_cotangent * decayed).sum(-1),
            beta=(w * error).sum(-1),
        )
        following = decay[:, :, t, :, None] * decayed_cotangent
        yield ReverseStep(cotangent, w, decayed, decayed_cotangent, following, gradients)
        cotangent = following


def along_values(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix vector``: ``[..., K, V]`` and ``[..., V]`` to ``[..., K]``."""
    return (matrix @ vector[..., :, None])[..., 0]


@torch.no_grad()
def recurrent_kda_vjp(
    inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None = None
) -> tuple[KdaResult, KdaGradients]:
    """Evaluate a call and the gradient of ``<do, o> + <dfinal_state, final_state>`` with respect to every input.

    Parameters
    ----------
    inputs
        The arguments of the call.
    do
        Cotangent of ``o`` ``[B, T, G, V]``; ``None`` means zero.
    dfinal_state
        Cotangent of the final state, in its layout; ``None`` means zero.

    Returns
    -------
    tuple[KdaResult, KdaGradients]
        float64; an input that was not given has gradient ``None``.

    Raises
    ------
    KdaError
        If the arguments contradict the contract, or a cotangent has another shape than its result.

    Notes
    -----
    Cost O(T K V) per head in time and, for the kept states, in memory.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    check_inputs(inputs)
    packing = SideBySide(inputs)
    x = Operands(*(packing.spread(operand) for operand in apply_activations(inputs)))
    do_NGTV, cotangent = spread_cotangents(inputs, packing, do, dfinal_state)
    states, errors, outputs = [initial_state(inputs)], [], torch.empty_like(x.v)
    for t, step in enumerate(recurrence(x, states[0], inputs.effective_scale)):
        states.append(step.state)
        errors.append(step.error)
        outputs[:, :, t] = step.output
    found = Operands(*(torch.empty_like(operand) for operand in x))
    last = len(errors) - 1
    for back, reverse in enumerate(reverse_recurrence(x, states, errors, do_NGTV, cotangent, inputs.effective_scale)):
        store(found, last - back, reverse.gradients)
        cotangent = reverse.next_cotangent
    named = pull_back(inputs, Operands(*(packing.gather(gradient) for gradient in found)))
    if inputs.initial_state is not None:
        named["initial_state"] = call_layout(inputs, cotangent)
    final_state = call_layout(inputs, states[-1]) if inputs.output_final_state else None
    return KdaResult(o=packing.gather(outputs), final_state=final_state), KdaGradients(**named)


def store(tensors: Operands, t: int | slice, parts: Operands) -> None:
    """Write the part of one or more tokens of each operand into ``[N, G, T, *]``."""
    for tensor, part in zip(tensors, parts, strict=True):
        tensor[:, :, t] = part


def spread_cotangents(
    inputs: KdaInputs, packing: SideBySide, do: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the cotangents as float64 ``[N, G, T, V]`` and ``[N, G, K, V]``, zeros for ``None``."""
    expected = {"do": (do, tuple(inputs.v.shape)), "dfinal_state": (dfinal_state, inputs.state_shape)}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            message = f"{name} must have the shape of its result {shape}, got {tuple(tensor.shape)}; pass its cotangent"
            raise ShapeError(message)
    if do is None:
        do = torch.zeros_like(inputs.v, dtype=torch.float64)
    if dfinal_state is None:
        dfinal_state = torch.zeros(inputs.state_shape, dtype=torch.float64, device=inputs.q.device)
    return packing.spread(do.double()), call_layout(inputs, dfinal_state.double())

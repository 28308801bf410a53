"""The chunkwise form in plain torch: a second, independent formula for the operator [KL eqs. 2-9].

Within a chunk let ``G_r`` be the inclusive cumulative log decay, and ``M-`` the strictly lower mask. With
``A = M- (beta (exp(G) K) (exp(-G) K)^T)``:

    T  = (I + A)^-1 Diag(beta)                        ``solved``     UT transform
    W  = T (exp(G) K),  U = T V                       ``w, u``       WY representation
    V' = U - W S                                      ``pseudo``     pseudo-values
    O  = scale [(exp(G) Q) S + M ((exp(G) Q)(exp(-G) K)^T) V']
    S <- Diag(exp(G_C)) S + (exp(G_C - G) K)^T V'

``exp(-G)`` overflows for strong decay, and differences of G lose digits behind a gate that closed hard. So every
exponent here is a direct sum of the log decays in between: never positive, and right for every gate.
Differentiable by autograd.

Dimension letters: N sequences, G value heads, T tokens, C chunk length, K key width, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from kda_reference.activations import Operands, apply_activations
from kda_reference.contract import KdaInputs, check_inputs
from kda_reference.packing import SideBySide, call_layout, initial_state

if TYPE_CHECKING:
    from torch import Tensor

STRIP = 16


def chunkwise_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,  # noqa: ANN401 - the remaining fields of KdaInputs
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a call by the chunkwise form, in the public signature.

    Parameters
    ----------
    q, k, v, g, beta, scale
        As in :class:`kda_reference.KdaInputs`.
    dtype
        Dtype of all arithmetic.
    **options
        Every other argument of :class:`kda_reference.KdaInputs`, by name; ``output_final_state`` is ``False``
        unless given.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        ``o`` in v's dtype, and the final state in float32 (float64 where ``dtype`` is), or ``None``.

    Raises
    ------
    KdaError
        If the arguments contradict the contract.
    TypeError
        If an option is not part of the contract.

    Notes
    -----
    Cost O(T (K V + C K + C^2)) per head. Prefix-causal: no token's output involves a later token.

    References
    ----------
    [KL] Kimi Linear technical report, Eqs. (2)-(9).
    """
    inputs = KdaInputs(q=q, k=k, v=v, g=g, beta=beta, scale=scale, **{"output_final_state": False, **options})
    check_inputs(inputs)
    packing = SideBySide(inputs)
    x = Operands(*(packing.spread(operand) for operand in apply_activations(inputs, dtype)))
    o, state = _chunks(x, initial_state(inputs, dtype), inputs.effective_scale, inputs.chunk_size)
    o = packing.gather(o).to(v.dtype)
    if not inputs.output_final_state:
        return o, None
    return o, call_layout(inputs, state).to(torch.float64 if dtype == torch.float64 else torch.float32)


def _chunks(x: Operands, state: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    num_tokens = x.v.shape[2]
    num_chunks = -(-num_tokens // chunk)
    if num_chunks == 0:
        return x.v, state

    def chunked(tensor: Tensor) -> Tensor:
        widths = (0, 0) * (tensor.dim() - 3)
        padded = pad(tensor, (*widths, 0, num_chunks * chunk - num_tokens))
        return torch.unflatten(padded, 2, (num_chunks, chunk))

    q, k, v, log_decay, beta = (chunked(tensor) for tensor in x)
    scores_qk, scores_kk = _scores(q, k, log_decay)
    lower = torch.eye(chunk, dtype=v.dtype, device=v.device) + (beta[..., None] * scores_kk).tril(-1)
    solved = torch.linalg.solve_triangular(lower, torch.diag_embed(beta), upper=False, unitriangular=True)
    from_start = log_decay.cumsum(-2).exp()
    w, u = solved @ (from_start * k), solved @ v
    q_decayed, k_to_end = from_start * q, _later_sums(log_decay).exp() * k
    chunk_decay = from_start[..., -1, :, None]
    outputs = []
    for n in range(num_chunks):
        pseudo = u[:, :, n] - w[:, :, n] @ state
        outputs.append(scale * (q_decayed[:, :, n] @ state + scores_qk[:, :, n] @ pseudo))
        state = chunk_decay[:, :, n] * state + k_to_end[:, :, n].transpose(-1, -2) @ pseudo
    return torch.cat(outputs, 2)[:, :, :num_tokens], state


def _scores(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``M ((exp(G) q)(exp(-G) k)^T)``, and the same with k for q, a strip of 16 rows at a time.

    Keys before the strip decay up to its first row, and the strip's rows from there on, so that no row depends on a
    later token. Within the strip every pair takes its own sum.
    """
    chunk = k.shape[-2]
    rows_qk, rows_kk = list[torch.Tensor](), list[torch.Tensor]()
    for start in range(0, chunk, STRIP):
        stop = min(start + STRIP, chunk)
        k_strip, decay_strip = k[..., start:stop, :], log_decay[..., start:stop, :]
        lower = torch.ones(stop - start, stop - start, dtype=torch.bool, device=k.device).tril()
        after_column = decay_strip[..., :, None, :].masked_fill(~lower.tril(-1)[..., None], 0)
        pairs = after_column.cumsum(-3).exp() * k_strip[..., None, :, :]
        from_first = pad(decay_strip[..., 1:, :], (0, 0, 1, 0)).cumsum(-2).exp()
        to_first = _later_sums(log_decay[..., : start + 1, :])[..., :-1, :].exp()
        past = (to_first * k[..., :start, :]).transpose(-1, -2)
        for rows, queries in ((rows_qk, q[..., start:stop, :]), (rows_kk, k_strip)):
            inside = (queries[..., :, None, :] * pairs).sum(-1) * lower
            rows.append(pad(torch.cat([(from_first * queries) @ past, inside], -1), (0, chunk - stop)))
    return torch.cat(rows_qk, -2), torch.cat(rows_kk, -2)


def _later_sums(x: Tensor) -> Tensor:
    """Return, for each row of ``[..., C, K]``, the sum of the rows after it."""
    return pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)

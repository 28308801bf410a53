"""The chunkwise form in plain torch: a second, independent formula for the operator [KL eqs. 2-9].

Within a chunk let ``G_r`` be the inclusive cumulative log decay, and ``M-`` the strictly lower mask. With
``A = M- (beta (exp(G) K) (exp(-G) K)^T)``:

    T  = (I + A)^-1 Diag(beta)                        ``solved``     UT transform
    W  = T (exp(G) K),  U = T V                       ``w, u``       WY representation
    V' = U - W S                                      ``pseudo``     pseudo-values
    O  = scale [(exp(G) Q) S + M ((exp(G) Q)(exp(-G) K)^T) V']
    S <- Diag(exp(G_C)) S + (exp(G_C - G) K)^T V'

``exp(-G)`` overflows for strong decay, so scores are formed from differences of G, masked before the exponential. Differentiable by autograd.
Dimension letters: N sequences, G value heads, T tokens, C chunk length, K key width, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad, softplus

from kda_reference.activations import L2_EPSILON, SOFTPLUS_THRESHOLD
from kda_reference.contract import KdaInputs, check_inputs
from kda_reference.packing import SideBySide

if TYPE_CHECKING:
    from torch import Tensor

STRIP = 16


def chunkwise_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, dtype: torch.dtype = torch.float64, **options: Any  # noqa: ANN401
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a call by the chunkwise form, in the public signature.

    Parameters
    ----------
    q, k, v, g, beta
        As in :class:`kda_reference.KdaInputs`.
    dtype
        Dtype of all arithmetic.
    **options
        Every other argument of :class:`kda_reference.KdaInputs`, by name; ``output_final_state`` is ``False`` unless given.

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
    Cost O(T (K V + C K + C^2)) per head; ``chunk_size`` must be a multiple of 16.

    References
    ----------
    [KL] Kimi Linear technical report, Eqs. (2)-(9).
    """
    inputs = KdaInputs(q=q, k=k, v=v, g=g, beta=beta, **{"output_final_state": False, **options})
    check_inputs(inputs)
    packing = SideBySide(inputs)
    x = [packing.spread(operand) for operand in _activated(inputs, dtype)]
    state = _initial_state(inputs, dtype)
    o, state = _chunks(x, state, inputs.effective_scale, inputs.chunk_size)
    o = packing.gather(o).to(v.dtype)
    if not inputs.output_final_state:
        return o, None
    state = state.transpose(-1, -2) if inputs.state_v_first else state
    return o, state.to(torch.float64 if dtype == torch.float64 else torch.float32)


def _activated(inputs: KdaInputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return q, k per value head, v, log decay and beta in ``dtype``, differentiably."""
    q, k, v, g, beta = (tensor.to(dtype) for tensor in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
    if inputs.use_qk_l2norm_in_kernel:
        q, k = (tensor * (tensor.square().sum(-1, keepdim=True) + L2_EPSILON).rsqrt() for tensor in (q, k))
    if inputs.use_gate_in_kernel:
        if inputs.dt_bias is not None:
            g = g + inputs.dt_bias.to(dtype).reshape(g.shape[2:])
        slope = torch.ones((), dtype=dtype, device=g.device) if inputs.A_log is None else inputs.A_log.to(dtype).exp()[:, None]
        if inputs.lower_bound is None:
            threshold = SOFTPLUS_THRESHOLD if dtype == torch.float64 else SOFTPLUS_THRESHOLD / 10
            g = -slope * softplus(g, threshold=threshold)
        else:
            g = inputs.lower_bound * torch.sigmoid(slope * g)
    if inputs.use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta) * (2.0 if inputs.allow_neg_eigval else 1.0)
    group = v.shape[2] // q.shape[2]
    return q.repeat_interleave(group, 2), k.repeat_interleave(group, 2), v, g, beta


def _initial_state(inputs: KdaInputs, dtype: torch.dtype) -> Tensor:
    if inputs.initial_state is None:
        heads, k_width, v_width = inputs.v.shape[2], inputs.k.shape[3], inputs.v.shape[3]
        return torch.zeros(inputs.num_sequences, heads, k_width, v_width, dtype=dtype, device=inputs.q.device)
    state = inputs.initial_state.to(dtype)
    return state.transpose(-1, -2) if inputs.state_v_first else state


def _chunks(x: list[Tensor], state: Tensor, scale: float, chunk: int) -> tuple[Tensor, Tensor]:
    num_tokens = x[2].shape[2]
    num_chunks = -(-num_tokens // chunk)
    if num_chunks == 0:
        return x[2], state

    def chunked(tensor: Tensor) -> Tensor:
        widths = (0, 0) * (tensor.dim() - 3)
        return pad(tensor, (*widths, 0, num_chunks * chunk - num_tokens)).unflatten(2, (num_chunks, chunk))

    q, k, v, log_decay, beta = (chunked(tensor) for tensor in x)
    cumulative = log_decay.cumsum(-2)
    last = cumulative[..., -1:, :]
    scores_qk, scores_kk = _scores(q, k, cumulative)
    identity = torch.eye(chunk, dtype=v.dtype, device=v.device)
    lower = identity + (beta[..., None] * scores_kk).tril(-1)
    solved = torch.linalg.solve_triangular(lower, torch.diag_embed(beta), upper=False, unitriangular=True)
    decayed = cumulative.exp()
    w, u = solved @ (decayed * k), solved @ v
    q_decayed, k_rest, chunk_decay = decayed * q, (last - cumulative).exp() * k, last.exp().transpose(-1, -2)
    outputs = []
    for n in range(num_chunks):
        pseudo = u[:, :, n] - w[:, :, n] @ state
        outputs.append(scale * (q_decayed[:, :, n] @ state + scores_qk[:, :, n] @ pseudo))
        state = chunk_decay[:, :, n] * state + k_rest[:, :, n].transpose(-1, -2) @ pseudo
    return torch.cat(outputs, 2)[:, :, :num_tokens], state


def _scores(q: Tensor, k: Tensor, cumulative: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(exp(G) q)(exp(-G) k)^T`` and the same with k for q, lower triangles with diagonal, a strip of 16 rows at a time.

    Keys before the strip are decayed to its first row, and the strip's rows from there on: both exponents are at most zero, and no row
    depends on a later token. Within the strip every pair takes its own difference.
    """
    chunk = k.shape[-2]
    rows_qk, rows_kk = [], []
    for start in range(0, chunk, STRIP):
        strip, past = slice(start, start + STRIP), slice(0, start)
        inside, k_strip = cumulative[..., strip, :], k[..., strip, :]
        length = inside.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=k.device).tril()
        difference = (inside[..., :, None, :] - inside[..., None, :, :]).masked_fill(~mask[..., None], 0)
        pair = difference.exp() * k_strip[..., None, :, :]
        reference = inside[..., :1, :]
        raised = (inside - reference).exp()
        lowered = ((reference - cumulative[..., past, :]).exp() * k[..., past, :]).transpose(-1, -2)
        tail = (0, chunk - start - length)
        for rows, queries in ((rows_qk, q[..., strip, :]), (rows_kk, k_strip)):
            diagonal = (queries[..., :, None, :] * pair).sum(-1) * mask
            rows.append(pad(torch.cat([(raised * queries) @ lowered, diagonal], -1), tail))
    return torch.cat(rows_qk, -2), torch.cat(rows_kk, -2)

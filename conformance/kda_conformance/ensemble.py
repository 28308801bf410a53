"""Correct computations in a declared arithmetic, many at once: the members whose spread is the error budget.

Two kinds, both differentiable, both stable algorithms (blocked forward substitution, causal reference rows), never the one under
test: :func:`chunkwise_member` is the WY form [KL eqs. 2-9] with the roundings of an arithmetic class, and
:func:`recurrence_member` is [KL eq. 1] in noisy float32. The leading axis R of every tensor is the member.
Dimension letters: R members, N sequences, G value heads, T tokens, K key width, V value width, C chunk, L strip.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from kda_conformance import activations
from kda_conformance.arithmetic import U32, Arithmetic
from kda_conformance.hashing import UNIFORM_TO_UNIT_VARIANCE
from kda_conformance.rounding import ACCUMULATION, Exact, Rounder, disturb

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor

STRIP = 16
SEQUENTIAL = 64
LONGEST = 128
# Kernels that call exp2 sum the gate in bits, where no round number of nats stays exact.
CHUNKS_IN_BITS = (48, 64, 128)
LOG_2 = math.log(2)


class Operands(NamedTuple):
    """The operator's own variables after the activations, still in the call's layout ``[R, B, T, heads, ...]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor


def activate(leaves: dict[str, Tensor], inputs: KdaInputs, rounder: Rounder | Exact, storage: str) -> Operands:
    """Apply the in-kernel activations in float32 and round q, k, v to the storage format."""
    q, k, v, g, beta = (leaves[name] for name in ("q", "k", "v", "g", "beta"))
    if inputs.use_qk_l2norm_in_kernel:
        q, k = activations.normalise(q, rounder), activations.normalise(k, rounder)
    if inputs.use_gate_in_kernel:
        g = log_decay(leaves, inputs, rounder)
    if inputs.use_beta_sigmoid_in_kernel:
        beta = activations.sigmoid(beta, rounder) * (2.0 if inputs.allow_neg_eigval else 1.0)
    group = v.shape[3] // q.shape[3]
    q, k = (rounder.round(x, storage).repeat_interleave(group, 3) for x in (q, k))
    return Operands(q, k, rounder.round(v, storage), g, beta)


def log_decay(leaves: dict[str, Tensor], inputs: KdaInputs, rounder: Rounder | Exact) -> Tensor:
    """Return the log decay of the softplus or bounded gate [KL eq. 10] for members' leaves, in nats."""
    x = leaves["g"]
    bias = leaves["dt_bias"].reshape(x.shape[0], 1, 1, x.shape[3], x.shape[4]) if "dt_bias" in leaves else 0.0
    a_log = (
        leaves["A_log"].reshape(x.shape[0], 1, 1, x.shape[3], 1)
        if "A_log" in leaves
        else torch.zeros_like(x[:, :1, :1, :, :1])
    )
    return activations.gate(x + bias, a_log, inputs.lower_bound, rounder)


def gate_uncertainty(leaves: dict[str, Tensor], inputs: KdaInputs, decay: Tensor) -> Tensor:
    """Return the systematic float32 error a correct gate and its exponential may have, in nats.

    ``exp`` and the base change to ``exp2`` err by up to ``2 u32 (1 + |g|)``, the same way at every token. Inside the kernel the
    softplus gate may form ``1 + exp(x)``, an absolute error of the slope times ``2 u32``; the sigmoid errs relatively.
    """
    shift = 2 * U32 * (1 + decay.abs())
    if inputs.use_gate_in_kernel:
        slope = leaves["A_log"].reshape(-1, 1, 1, decay.shape[3], 1).exp() if "A_log" in leaves else 1.0
        shift = shift + (2 * U32 * slope if inputs.lower_bound is None else 4 * U32 * decay.abs())
    return shift


def chunkwise_member(
    x: Operands, state: Tensor, *, rounder: Rounder, arithmetic: Arithmetic, chunk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the chunkwise form on operands laid side by side; return ``(o [R, N, G, T, V], state [R, N, G, K, V])``."""
    num_tokens = x.k.shape[3]
    num_chunks = -(-num_tokens // chunk)

    def chunked(tensor: Tensor) -> Tensor:
        tail = num_chunks * chunk - num_tokens
        padded = pad(tensor, (0, tail)) if tensor.dim() == 4 else pad(tensor, (0, 0, 0, tail))  # noqa: PLR2004 - beta has no width
        return padded.reshape(*padded.shape[:3], num_chunks, chunk, *padded.shape[4:])

    q, k, v, g, beta = (chunked(tensor) for tensor in x)
    store, operand = arithmetic.storage, arithmetic.operand
    unit = LOG_2 if chunk in CHUNKS_IN_BITS else 1.0
    cumulative = _scan(rounder.round(g / unit, "fp32"), rounder) * unit
    if chunk <= STRIP * 2:
        cumulative = _rounded_as_later(cumulative, rounder)
    last = cumulative[..., -1:, :]
    scores_qk, scores_kk = _scores(q, k, cumulative, rounder, arithmetic)
    scores_kk = rounder.round(scores_kk * beta[..., None], "fp32").tril(-1)
    inverse = rounder.round(_Inverse.apply(scores_kk, rounder, arithmetic), store)  # type: ignore[no-untyped-call]
    decayed = _exp(cumulative, rounder)
    if arithmetic.residual:
        k_decayed = rounder.round(k * decayed, store)
    else:
        u = rounder.round(rounder.matmul(inverse, rounder.round(v * beta[..., None], store), operand), store)
        w = rounder.round(rounder.matmul(inverse, rounder.round(k * beta[..., None] * decayed, store), operand), store)
    k_rest = rounder.round(k * _exp(last - cumulative, rounder), store)
    q_decayed = rounder.round(q * decayed, store)
    scores_qk = rounder.round(scores_qk * scale, store)
    chunk_decay = _exp(last[..., 0, :], rounder)
    outputs = []
    for n in range(num_chunks):
        operand_state = rounder.round(state, store)
        if arithmetic.residual:
            read = rounder.matmul(k_decayed[:, :, :, n], operand_state, operand)
            residual = beta[:, :, :, n, :, None] * rounder.round(v[:, :, :, n] - read, "fp32")
            pseudo = rounder.matmul(inverse[:, :, :, n], rounder.round(residual, store), operand)
        else:
            pseudo = rounder.round(u[:, :, :, n] - rounder.matmul(w[:, :, :, n], operand_state, operand), "fp32")
        pseudo = rounder.round(pseudo, store)
        inter = scale * rounder.matmul(q_decayed[:, :, :, n], operand_state, operand)
        outputs.append(inter + rounder.matmul(scores_qk[:, :, :, n], pseudo, operand))
        write = rounder.matmul(k_rest[:, :, :, n].transpose(-1, -2), pseudo, operand)
        kept = _Decay.apply(state, chunk_decay[:, :, :, n], rounder, store)  # type: ignore[no-untyped-call]
        state = rounder.round(kept + write, arithmetic.state)
    if not outputs:
        return x.v, state
    return torch.cat(outputs, 3)[:, :, :, :num_tokens], state


def _scan(g: Tensor, rounder: Rounder) -> Tensor:
    """Return the cumulative sum over tokens, every partial sum rounded to fp32: token by token in chunks of 64, else as a parallel scan."""
    # The sums of a short chunk are rounded a second time, as if it had begun earlier.
    rounded = rounder.partial_sum if g.shape[-2] > STRIP * 2 else partial(rounder.round, fmt="fp32")
    total, step = g, 1
    if g.shape[-2] == SEQUENTIAL:
        sums = [g[..., 0, :]]
        for t in range(1, SEQUENTIAL):
            sums.append(rounded(sums[-1] + g[..., t, :]))
        return torch.stack(sums, -2)
    while step < g.shape[-2]:
        total = rounded(total + pad(total, (0, 0, step, 0))[..., : g.shape[-2], :])
        step *= 2
    return total


def _rounded_as_later(cumulative: Tensor, rounder: Rounder) -> Tensor:
    """Round the sums of a chunk as if it had begun earlier, 128 tokens before its end at most: the larger a sum, the coarser it is."""
    num_chunks, chunk = cumulative.shape[-3:-1]
    reach = LONGEST // chunk - 1
    so_far = pad(cumulative[..., -1, :].detach().cumsum(-2), (0, 0, 1 + reach, 0))
    before = (so_far[..., reach : reach + num_chunks, :] - so_far[..., :num_chunks, :])[..., None, :]
    return rounder.partial_sum(before + cumulative) - before


class _Decay(torch.autograd.Function):
    """``Diag(decay) S``; its derivative by the decay is a product of the state and its cotangent as they are stored."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, decay: Tensor, rounder: Rounder, fmt: str) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(state, decay)
        ctx.rounder, ctx.fmt = rounder, fmt
        return state * decay[..., None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        state, decay = ctx.saved_tensors
        raw = ctx.rounder.raw
        return grad * decay[..., None], (raw(state, ctx.fmt) * raw(grad, ctx.fmt)).sum(-1), None, None


def _exp(x: Tensor, rounder: Rounder) -> Tensor:
    return rounder.round(x.exp(), "fp32")


def _scores(
    q: Tensor, k: Tensor, cumulative: Tensor, rounder: Rounder, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """Return the lower triangles of ``(Gamma q)(k / Gamma)^T`` and ``(Gamma k)(k / Gamma)^T``, strip by strip."""
    chunk, num_strips = k.shape[-2], k.shape[-2] // STRIP
    strips = [slice(i * STRIP, (i + 1) * STRIP) for i in range(num_strips)]
    q_L, k_L, cumulative_L = (t.unflatten(-2, (num_strips, STRIP)) for t in (q, k, cumulative))
    later, earlier = torch.tril_indices(STRIP, STRIP, device=k.device)

    def of(tokens: Tensor, tensor: Tensor) -> Tensor:
        return tensor.index_select(-2, tokens)

    # Which token between the two the decay is split at is the implementation's choice; half on each side stands for all of them.
    half = _exp((of(later, cumulative_L) - of(earlier, cumulative_L)) / 2, rounder)
    columns = rounder.round(of(earlier, k_L) * half, arithmetic.diagonal_operand)
    diagonal_qk, diagonal_kk = (
        _square(_pairwise(rounder.round(of(later, t) * half, arithmetic.diagonal_operand), columns, rounder))
        for t in (q_L, k_L)
    )
    rows_qk, rows_kk = [], []
    for i, strip in enumerate(strips):
        past = slice(0, i * STRIP)
        parts_qk, parts_kk = [diagonal_qk[..., i, :, :]], [diagonal_kk[..., i, :, :]]
        if i:
            reference = cumulative[..., i * STRIP : i * STRIP + 1, :]
            raised = _exp(cumulative[..., strip, :] - reference, rounder)
            lowered = (k[..., past, :] * _exp(reference - cumulative[..., past, :], rounder)).transpose(-1, -2)
            fmt = arithmetic.score_operand
            parts_qk.insert(0, rounder.matmul(q[..., strip, :] * raised, lowered, fmt))
            parts_kk.insert(0, rounder.matmul(k[..., strip, :] * raised, lowered, fmt))
        tail = (0, chunk - (i + 1) * STRIP)
        rows_qk.append(pad(torch.cat(parts_qk, -1), tail))
        rows_kk.append(pad(torch.cat(parts_kk, -1), tail))
    return torch.cat(rows_qk, -2), torch.cat(rows_kk, -2)


def _square(pairs: Tensor) -> Tensor:
    """Return the lower triangle that the pairs of a strip make, ``[..., L, L]``."""
    later, earlier = torch.tril_indices(STRIP, STRIP, device=pairs.device)
    empty = pairs.new_zeros(*pairs.shape[:-1], STRIP**2)
    return empty.index_copy(-1, later * STRIP + earlier, pairs).reshape(*pairs.shape[:-1], STRIP, STRIP)


def _pairwise(a: Tensor, b: Tensor, rounder: Rounder) -> Tensor:
    """Return ``sum_d a_pd b_pd`` with the noise of an fp32 accumulation."""
    terms = a * b
    product = terms.sum(-1)
    with torch.no_grad():
        noise = rounder.accumulate(product, (terms * terms).sum(-1), a.shape[-1]) - product
    return product + noise


class _Inverse(torch.autograd.Function):
    """``(I + A)^-1`` of a strictly lower A by blocked forward substitution, and ``dA = -T^T dT T^T``."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, rounder: Rounder, arithmetic: Arithmetic) -> Tensor:  # noqa: ANN401
        num_strips = scores.shape[-1] // STRIP
        blocks = scores.unflatten(-2, (num_strips, STRIP)).unflatten(-1, (num_strips, STRIP)).transpose(-3, -2)
        identity = torch.eye(STRIP, dtype=scores.dtype, device=scores.device)
        diagonal = torch.diagonal(blocks, dim1=-4, dim2=-3).movedim(-1, -3)
        solved = rounder.raw(
            torch.linalg.solve_triangular(identity + diagonal, identity.expand_as(diagonal), upper=False), "fp32"
        )
        merge = arithmetic.merge_operand
        inverse = torch.zeros_like(scores)
        for i in range(num_strips):
            strip, past = slice(i * STRIP, (i + 1) * STRIP), slice(0, i * STRIP)
            inverse[..., strip, strip] = solved[..., i, :, :]
            if i:
                a, t = rounder.raw(scores[..., strip, past], merge), rounder.raw(inverse[..., past, past], merge)
                inner = rounder.raw(rounder.exact_matmul(a, t), merge)
                outer = rounder.raw(solved[..., i, :, :], merge)
                inverse[..., strip, past] = -rounder.exact_matmul(outer, inner)
        ctx.save_for_backward(inverse)
        ctx.rounder = rounder
        ctx.fmt = arithmetic.storage if arithmetic.storage in ("bf16", "fp16") else arithmetic.operand
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (inverse,) = ctx.saved_tensors
        rounder, fmt = ctx.rounder, ctx.fmt
        transposed = rounder.raw(inverse, fmt).transpose(-1, -2)
        inner = rounder.exact_matmul(rounder.raw(grad, fmt), transposed)
        return -rounder.exact_matmul(transposed, rounder.raw(inner, fmt)).tril(-1), None, None


class NoisyFloat32:
    """Multiplicative float32 noise, independent per element; a member with level 0 is exact."""

    def __init__(self, levels: Tensor, seed: int) -> None:
        self.levels = levels
        self.generator = torch.Generator(device=levels.device).manual_seed(seed)

    def disturb(self, x: Tensor, size: float) -> Tensor:
        """Multiply ``x`` by ``1 + size`` times noise; what float32 does not hold as a normal number is zero, in the members with noise."""
        drawn = torch.rand(x.shape, generator=self.generator, dtype=torch.float64, device=x.device)
        return disturb(x, drawn, self.levels, size)

    def __call__(self, x: Tensor, ulps: float = 1.0) -> Tensor:
        """Disturb ``x`` by up to ``ulps`` units in the last place, and its cotangent too."""
        return _Disturb.apply(x, ulps * U32, self)  # type: ignore[no-any-return,no-untyped-call]

    def contract(self, vector: Tensor, matrix: Tensor) -> Tensor:
        """Return ``sum_k vector_k matrix_kv`` with the noise of an fp32 accumulation."""
        product = torch.einsum("rngk,rngkv->rngv", vector, matrix)
        with torch.no_grad():
            squares = torch.einsum("rngk,rngkv->rngv", vector**2, matrix**2)
            deviation = ACCUMULATION * U32 * (vector.shape[-1] / 2) ** 0.5 * (squares + product**2).sqrt()
            drawn = torch.rand(product.shape, generator=self.generator, dtype=torch.float64, device=product.device)
            uniform = (2 * drawn - 1) * self.levels.reshape(-1, 1, 1, 1)
            noise: Tensor = deviation * UNIFORM_TO_UNIT_VARIANCE * 0.5 * uniform
        return product + noise


class _Disturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float, noise: NoisyFloat32) -> Tensor:  # noqa: ANN401
        ctx.size, ctx.noise = size, noise
        return noise.disturb(x, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return ctx.noise.disturb(grad, ctx.size), None, None


def recurrence_member(
    x: Operands, state: Tensor, *, noise: NoisyFloat32, exp_noise: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the token recurrence in noisy float32 on operands laid side by side.

    ``exp_noise [R, N, G, T, K]`` is the relative error of ``exp(log_decay)``; it is hashed from the value, because a constant gate errs the
    same way at every token and the errors add up.
    """
    outputs = []
    for t in range(x.k.shape[3]):
        k = noise(x.k[:, :, :, t])
        decayed = noise((x.log_decay[:, :, :, t].exp() * exp_noise[:, :, :, t])[..., None] * state)
        error = noise(x.v[:, :, :, t] - noise.contract(k, decayed), 2.0)
        write = noise(noise(x.beta[:, :, :, t])[..., None] * error, 2.0)
        state = noise(decayed + noise(x.k[:, :, :, t])[..., None] * write[..., None, :], 1.5)
        outputs.append(noise(scale * noise.contract(noise(x.q[:, :, :, t]), state)))
    return (torch.stack(outputs, 3) if outputs else x.v), state

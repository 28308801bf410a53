"""Running error bounds of the float64 recurrence and of its reverse.

Columns of the state never mix, and the exact step, ``(I - beta k k^T) Diag(a)`` with ``a = exp(g)``, stretches the
error of a column by at most ``rho max(a)``, ``rho = max(1, |1 - beta |k|^2|)``. So with ``u = 2^-53``,
``gamma_n = n u / (1 - n u)`` and ``E_v >= |fl(S)[:, v] - S[:, v]|_2``:

    c    = 4 u + eg                                        relative error of each decayed channel
    ep   = (gamma_{K+2} + ek) |k| |R[:, v]| + u |e_v|      rounding of the prediction error
    E   <- rho (max(a (1 + c)) E + |c R[:, v]|) + |k| (beta ep + (2 u + eb + ek) |beta e_v|) + u |S[:, v]|
    |o error| <= scale |q| (E + (gamma_{K+4} + eq) |S[:, v]|) + u |o|

where ``ek, eq, eb`` are relative and ``eg`` absolute errors that the activations left in k, q, beta and g. An element
of the decayed state is off by at most ``a_k E_v + c_k |R_kv|``, so a closed channel keeps its own small error. The
reverse pass applies transposed steps, with the same norms. Bounds by element would be useless for the state:
``|I - beta k k^T|`` taken by element grows without limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.activation_bounds import UNDERFLOW, UNIT, InputErrors
from kda_reference.activations import Operands
from kda_reference.adjoint import along_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from kda_reference.adjoint import ReverseStep
    from kda_reference.recurrence import Step


class Factors(NamedTuple):
    """What the bounds of a call need of its operands ``[N, G, T, *]``, and the activations' errors."""

    decay: Tensor
    decay_error: Tensor
    largest_decay: Tensor
    stretch: Tensor
    q_norm: Tensor
    k_norm: Tensor
    beta: Tensor
    scale: float
    errors: InputErrors


class StepBound(NamedTuple):
    """Bounds ``[N, G, V]`` of one token: by column of the state after it, of its prediction error and output."""

    state: Tensor
    error: Tensor
    output: Tensor


class ReverseBound(NamedTuple):
    """Bounds of one token's gradients, root sums of squares behind them, and the next cotangent's bound by column."""

    gradients: Operands
    norms: Operands
    cotangent: Tensor


def gamma(num_terms: int) -> float:
    """Return the relative error that a dot product of so many terms may have."""
    return num_terms * UNIT / (1 - num_terms * UNIT)


def factors(x: Operands, scale: float, errors: InputErrors) -> Factors:
    """Collect norms and contraction factors; ``errors.log_decay`` is laid side by side like ``x``."""
    decay, decay_error = x.log_decay.exp(), (4 * UNIT + errors.log_decay) * (1 + 1e-6)
    k_norm, beta = x.k.norm(dim=-1, keepdim=True), x.beta[..., None]
    return Factors(
        decay=decay,
        decay_error=decay_error,
        largest_decay=(decay * (1 + decay_error)).amax(-1, keepdim=True),
        stretch=(1 - beta * k_norm**2).abs().clamp(min=1),
        q_norm=x.q.norm(dim=-1, keepdim=True),
        k_norm=k_norm,
        beta=beta.abs(),
        scale=abs(scale),
        errors=errors,
    )


def forward_bounds(f: Factors, steps: Iterable[Step]) -> Iterator[tuple[Step, StepBound]]:
    """Pass the steps of the recurrence on, each with its bounds."""
    k_width = f.decay.shape[-1]
    bound = torch.zeros_like(f.k_norm[:, :, 0]) if f.k_norm.shape[2] else f.k_norm
    for t, step in enumerate(steps):
        k_norm, stretch, beta = f.k_norm[:, :, t], f.stretch[:, :, t], f.beta[:, :, t]
        error, state_norm = step.error.abs(), step.state.norm(dim=-2)
        fresh = (f.decay_error[:, :, t, :, None] * step.decayed).norm(dim=-2) + UNDERFLOW
        decayed = f.largest_decay[:, :, t] * bound + fresh
        rounding = (gamma(k_width + 2) + f.errors.qk) * k_norm * step.decayed.norm(dim=-2) + UNIT * error + UNDERFLOW
        written = k_norm * beta * (rounding + (2 * UNIT + f.errors.beta + f.errors.qk) * error)
        bound = stretch * decayed + written + UNIT * state_norm + UNDERFLOW
        read = f.scale * f.q_norm[:, :, t] * (bound + (gamma(k_width + 4) + f.errors.qk) * state_norm)
        output = read + UNIT * step.output.abs() + UNDERFLOW
        yield step, StepBound(state=bound, error=k_norm * decayed + rounding, output=output)


def reverse_bounds(
    f: Factors,
    x: Operands,
    states: Sequence[Tensor],
    errors: Sequence[Tensor],
    bounds: Sequence[StepBound],
    do: Tensor,
    steps: Iterable[ReverseStep],
) -> Iterator[tuple[ReverseStep, ReverseBound]]:
    """Pass the steps of the reverse recurrence on, each with its bounds.

    Parameters
    ----------
    f
        The factors of the call.
    x, states, errors, do
        As for :func:`kda_reference.adjoint.reverse_recurrence`.
    bounds
        What :func:`forward_bounds` found for each token.
    steps
        The reverse steps, last token first.
    """
    num_tokens, k_width, v_width = len(errors), f.decay.shape[-1], do.shape[-1]
    gamma_k, gamma_v = gamma(k_width + 2) + f.errors.qk, gamma(2 * v_width + 8) + f.errors.beta
    input_error = 2 * UNIT + f.errors.beta + f.errors.qk
    bound = torch.zeros_like(f.k_norm[:, :, 0]) if num_tokens else f.k_norm
    for t, step in zip(reversed(range(num_tokens)), steps, strict=True):
        decay, decay_error, beta = f.decay[:, :, t], f.decay_error[:, :, t], f.beta[:, :, t]
        k_norm, scaled_q = f.k_norm[:, :, t], f.scale * f.q_norm[:, :, t]
        e, ee, w, do_t = errors[t].abs(), bounds[t].error, step.projection.abs(), do[:, :, t].abs()
        before = bounds[t - 1].state if t else torch.zeros_like(ee)
        state, decayed, lam, dr = (
            matrix.abs() for matrix in (states[t + 1], step.decayed, step.cotangent, step.decayed_cotangent)
        )

        lam_norm = lam.norm(dim=-2)
        bound = bound + UNIT * lam_norm + (5 * UNIT + f.errors.qk) * scaled_q * do_t + UNDERFLOW
        rounding = gamma_k * k_norm * lam_norm + UNDERFLOW
        ew = k_norm * bound + rounding
        dr_bound = f.stretch[:, :, t] * bound + beta * k_norm * (rounding + input_error * w)
        dr_bound = dr_bound + UNIT * dr.norm(dim=-2) + UNDERFLOW
        gradients = Operands(
            q=f.scale * (_dot(bounds[t].state, do_t) + gamma_v * along_values(state, do_t)),
            k=beta
            * (
                _dot(bound, e + ee)
                + along_values(lam, ee + gamma_v * e)
                + decay * (1 + decay_error) * _dot(before, w + ew)
                + along_values(decayed, ew)
                + (gamma_v + decay_error) * along_values(decayed, w)
            ),
            v=beta * (ew + (UNIT + f.errors.beta) * w),
            log_decay=along_values(decayed, dr_bound)
            + decay * (1 + decay_error) * (_dot(dr_bound, before) + along_values(dr, before))
            + (gamma_v + decay_error) * (dr * decayed).sum(-1),
            beta=(ew * (e + ee) + w * (ee + gamma_v * e)).sum(-1),
        )
        norms = Operands(
            q=f.scale * _row_norms(state, do_t),
            k=beta * torch.hypot(_row_norms(lam, e), _row_norms(decayed, w)),
            v=beta * (x.k[:, :, t, :, None] * lam).norm(dim=-2),
            log_decay=(dr * decayed).norm(dim=-1),
            beta=(w * e).norm(dim=-1),
        )
        fresh = (decay_error[..., :, None] * step.next_cotangent).norm(dim=-2)
        bound = f.largest_decay[:, :, t] * dr_bound + fresh + UNDERFLOW
        yield step, ReverseBound(Operands(*(gradient + UNDERFLOW for gradient in gradients)), norms, bound)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``sum_v a_v b_v`` as ``[..., 1]``, to stand beside any channel."""
    return (a * b).sum(-1, keepdim=True)


def _row_norms(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the norms of the rows of ``matrix * vector``: ``[..., K, V]`` and ``[..., V]`` to ``[..., K]``."""
    norms: Tensor = (matrix * vector[..., None, :]).norm(dim=-1)
    return norms

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

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from kda_reference.activation_bounds import UNDERFLOW, UNIT, InputErrors
from kda_reference.activations import Operands
from kda_reference.adjoint import along_values
from kda_reference.recurrence import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from kda_reference.adjoint import ReverseStep

# Few enough to stay in a processor's cache, many enough to spread the cost of starting an operation.
TOKENS_AT_ONCE = 8
# More than the norm of a column whose squares underflow to nothing.
LOST_NORM = 1e-150

_Step = TypeVar("_Step")


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


class ForwardBounds(NamedTuple):
    """Bounds of consecutive tokens ``[N, G, tokens, V]``: by column of the state after each, of its prediction error and output."""

    state: Tensor
    error: Tensor
    output: Tensor


class ReverseBounds(NamedTuple):
    """Bounds of consecutive tokens' gradients, and root sums of squares behind them; the cotangent's bound by column before them."""

    gradients: Operands
    norms: Operands | None
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


def forward_bounds(f: Factors, steps: Iterable[Step]) -> Iterator[tuple[slice, list[Step], ForwardBounds]]:
    """Gather the steps of the recurrence, and bound them.

    Yields
    ------
    tuple[slice, list[Step], ForwardBounds]
        Tokens, their steps, and their bounds.
    """
    k_width = f.decay.shape[-1]
    state_bound = torch.zeros_like(f.k_norm[:, :, 0]) if f.k_norm.shape[2] else f.k_norm
    start = 0
    for group in _groups(steps):
        t = slice(start, start + len(group))
        start, step = t.stop, Step(*(torch.stack(parts, 2) for parts in zip(*group, strict=True)))
        k_norm, stretch, beta, error = f.k_norm[:, :, t], f.stretch[:, :, t], f.beta[:, :, t], step.error.abs()
        (state_norm,) = _column_norms(step.state.square_(), None)
        decayed_norm, fresh = _column_norms(step.decayed.square_(), None, f.decay_error[:, :, t])
        rounding = (gamma(k_width + 2) + f.errors.qk) * k_norm * decayed_norm + UNIT * error + UNDERFLOW
        written = k_norm * beta * (rounding + (2 * UNIT + f.errors.beta + f.errors.qk) * error)
        added = stretch * fresh + written + UNIT * state_norm + UNDERFLOW
        grown = stretch * f.largest_decay[:, :, t]
        before = torch.empty_like(added)
        after = torch.empty_like(added)
        for i in range(len(group)):
            before[:, :, i] = state_bound
            after[:, :, i] = state_bound = grown[:, :, i] * state_bound + added[:, :, i]
        decayed = f.largest_decay[:, :, t] * before + fresh
        read = f.scale * f.q_norm[:, :, t] * (after + (gamma(k_width + 4) + f.errors.qk) * state_norm)
        output = read + UNIT * step.output.abs() + UNDERFLOW
        yield t, group, ForwardBounds(state=after, error=k_norm * decayed + rounding, output=output)


def reverse_bounds(
    f: Factors,
    x: Operands,
    states: list[Tensor],
    errors: list[Tensor],
    bounds: ForwardBounds,
    do: Tensor,
    steps: Iterable[ReverseStep],
    *,
    dot_norms: bool,
) -> Iterator[tuple[slice, list[ReverseStep], ReverseBounds]]:
    """Gather the steps of the reverse recurrence, and bound their gradients.

    Parameters
    ----------
    f
        The factors of the call.
    x, states, errors, do
        As for :func:`kda_reference.adjoint.reverse_recurrence`.
    bounds
        What :func:`forward_bounds` found for all tokens.
    steps
        The reverse steps, last token first.
    dot_norms
        Whether root sums of squares are wanted too; ``None`` in their place otherwise.

    Yields
    ------
    tuple[slice, list[ReverseStep], ReverseBounds]
        Tokens, their reverse steps from the first token to the last, and their bounds; later tokens first.
    """
    num_tokens, k_width, v_width = len(errors), f.decay.shape[-1], do.shape[-1]
    gamma_k, gamma_v = gamma(k_width + 2) + f.errors.qk, gamma(2 * v_width + 8) + f.errors.beta
    input_error = 2 * UNIT + f.errors.beta + f.errors.qk
    before_all = torch.cat([torch.zeros_like(bounds.state[:, :, :1]), bounds.state], 2)
    bound, stop = torch.zeros_like(bounds.state[:, :, 0]) if num_tokens else f.k_norm, num_tokens
    for group in _groups(steps):
        group.reverse()
        t = slice(stop - len(group), stop)
        stop = t.start
        projection, lam, dr = (
            torch.stack(parts, 2).abs_()
            for parts in zip(*((s.projection, s.cotangent, s.decayed_cotangent) for s in group), strict=True)
        )
        around = torch.stack(states[t.start : t.stop + 1], 2).abs_()
        decay_error, beta, k_norm = f.decay_error[:, :, t], f.beta[:, :, t], f.k_norm[:, :, t]
        decay, stretch, scaled_q = f.decay[:, :, t] * (1 + decay_error), f.stretch[:, :, t], f.scale * f.q_norm[:, :, t]
        e, ee, w, do_t = torch.stack(errors[t], 2).abs(), bounds.error[:, :, t], projection, do[:, :, t].abs()
        before, after = before_all[:, :, t], bounds.state[:, :, t]
        lam_squares, product = lam.square(), dr * around[:, :, :-1]
        (lam_norm,) = _column_norms(lam_squares, None)
        by_before = along_values(dr, before)
        dr_norm, fresh = _column_norms(dr.square_(), None, decay_error * decay)

        rounding = gamma_k * k_norm * lam_norm + UNDERFLOW
        read = UNIT * lam_norm + (5 * UNIT + f.errors.qk) * scaled_q * do_t + UNDERFLOW
        erased = beta * k_norm * (rounding + input_error * w) + UNIT * dr_norm + UNDERFLOW
        largest_decay, lam_bound = f.largest_decay[:, :, t], torch.empty_like(read)
        for i in reversed(range(len(group))):
            lam_bound[:, :, i] = bound + read[:, :, i]
            bound = stretch[:, :, i] * lam_bound[:, :, i] + erased[:, :, i]
            bound = largest_decay[:, :, i] * bound + fresh[:, :, i] + UNDERFLOW
        dr_bound, ew = stretch * lam_bound + erased, k_norm * lam_bound + rounding
        by_ew, by_w, by_dr = (decay[..., None] * (around[:, :, :-1] @ torch.stack([ew, w, dr_bound], -1))).unbind(-1)
        found = Operands(
            q=f.scale * (_dot(after, do_t) + gamma_v * along_values(around[:, :, 1:], do_t)),
            k=beta
            * (
                _dot(lam_bound, e + ee)
                + along_values(lam, ee + gamma_v * e)
                + decay * _dot(before, w + ew)
                + by_ew
                + (gamma_v + decay_error) * by_w
            ),
            v=beta * (ew + (UNIT + f.errors.beta) * w),
            log_decay=by_dr
            + decay * (_dot(dr_bound, before) + by_before)
            + (gamma_v + decay_error) * decay * product.sum(-1),
            beta=(ew * (e + ee) + w * (ee + gamma_v * e)).sum(-1),
        )
        norms = None
        if dot_norms:
            squares, plain = around.square_(), f.decay[:, :, t]
            by_squares = plain.square() * along_values(squares[:, :, :-1], w.square())
            (dv_norm,) = _column_norms(lam_squares, x.k[:, :, t])
            norms = Operands(
                q=f.scale * along_values(squares[:, :, 1:], do_t.square()).sqrt(),
                k=beta * (along_values(lam_squares, e.square()) + by_squares).sqrt(),
                v=beta * dv_norm,
                log_decay=plain * product.square_().sum(-1).sqrt(),
                beta=(w * e).norm(dim=-1),
            )
        yield t, group, ReverseBounds(Operands(*(part + UNDERFLOW for part in found)), norms, bound)


def _column_norms(squares: Tensor, *factors: Tensor | None) -> tuple[Tensor, ...]:
    """Return at least the norms of the columns of ``Diag(factor) M`` for each factor ``[..., K]``, given the squares of M."""
    one = torch.ones_like(squares[..., 0])
    weights = torch.stack([one if x is None else x.abs().clamp(min=LOST_NORM).square() for x in factors], -2)
    return ((weights @ squares).sqrt() + LOST_NORM).unbind(-2)


def _groups(steps: Iterable[_Step]) -> Iterator[list[_Step]]:
    rest = iter(steps)
    while group := list(islice(rest, TOKENS_AT_ONCE)):
        yield group


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``sum_v a_v b_v`` as ``[..., 1]``, to stand beside any channel."""
    return (a * b).sum(-1, keepdim=True)

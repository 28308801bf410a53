"""Rigorous running error bounds of the float64 recurrence and its reverse: the ground truth certifies itself.

Columns of the state never mix, and one step contracts a column's error by ``rho max(exp g)`` with ``rho = max(1, |1 - beta |k|^2|)``. So with
``E_v >= |fl(S)[:, v] - S[:, v]|_2``, ``u = 2^-53`` and ``gamma_n = n u / (1 - n u)``:

    E   <- rho amax E + rho c |R[:, v]| + |k| (beta ep + (2 u + eb + ek) |beta e|) + u |S[:, v]|
    ep   = (gamma_{K+2} + ek) |k| |R[:, v]| + u |e_v|                 error of the prediction error
    c    = 3 u + eg                                                   exp and the product
    |o error| <= scale |q| (E + (gamma_{K+3} + eq) |S[:, v]|) + u |o|

where ``ek, eq, eb`` are relative and ``eg`` absolute errors that the activations left in k, q, beta and g. The reverse pass applies the
transposed steps, with the same norms. Componentwise bounds would be useless: ``|I - beta k k^T|`` grows without limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.activations import Operands, apply_activations, gate_logit
from kda_reference.adjoint import ReverseStep, reverse
from kda_reference.packing import SideBySide
from kda_reference.pullback import Pullback
from kda_reference.recurrence import Trajectory, initial_state, laid_out, walk

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.contract import KdaInputs

UNIT = 2.0**-53
UNDERFLOW = 1e-300
ROUNDING_OF_THE_BOUND = 1.0 + 1e-8
GRADIENT_NAMES = {
    "q": "dq",
    "k": "dk",
    "v": "dv",
    "g": "dg",
    "beta": "dbeta",
    "A_log": "dA_log",
    "dt_bias": "ddt_bias",
    "initial_state": "dinitial_state",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """float64 results with a bound of their own error, by tensor name.

    Names are ``o``, ``final_state``, and ``dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial_state`` for inputs that were given.

    Attributes
    ----------
    value
        What :func:`recurrent_kda` and :func:`recurrent_kda_vjp` return.
    bound
        At least the distance of ``value`` from the exact result, per element.
    dot_norm
        Root of the sum of squares of the terms of the last dot product behind each gradient; zero elsewhere.
    """

    value: dict[str, Tensor]
    bound: dict[str, Tensor]
    dot_norm: dict[str, Tensor]


class _InputErrors(NamedTuple):
    """Errors the activations left behind: relative for q, k, beta; absolute for the log decay, ``[N, G, T]``."""

    q: float
    k: float
    beta: float
    log_decay: Tensor


class _ForwardBounds(NamedTuple):
    """Per token, ``[N, G, V]``: errors of the state after it, of the decayed state before it, and of the prediction error."""

    states: list[Tensor]
    decayed: list[Tensor]
    errors: list[Tensor]
    outputs: Tensor


def certified_kda(inputs: KdaInputs) -> Certified:
    """Evaluate a call and bound the evaluation's error.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    packing = SideBySide(inputs)
    x = Operands(*(packing.spread(operand) for operand in apply_activations(inputs)))
    path = walk(x, initial_state(inputs), inputs.effective_scale, keep=True)
    forward = _forward_bounds(x, path, inputs.effective_scale, _input_errors(inputs, packing))
    value, bound = _outputs(inputs, packing, path, forward)
    return Certified(value=value, bound=bound, dot_norm={name: torch.zeros_like(tensor) for name, tensor in value.items()})


def certified_kda_vjp(inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None = None) -> Certified:
    """Evaluate a call and its gradients and bound the error of both; cotangents as in :func:`recurrent_kda_vjp`."""
    packing, path, gradients, dstate, steps = reverse(inputs, do, dfinal_state)
    x = Operands(*(packing.spread(operand) for operand in apply_activations(inputs)))
    scale, input_errors = inputs.effective_scale, _input_errors(inputs, packing)
    forward = _forward_bounds(x, path, scale, input_errors)
    do_NGTV = torch.zeros_like(path.outputs) if do is None else packing.spread(do.detach().double())
    bounds, norms, dstate_bound = _reverse_bounds(x, path, forward, steps, do_NGTV, scale, input_errors)
    value, bound = _outputs(inputs, packing, path, forward)
    dot_norm = {name: torch.zeros_like(tensor) for name, tensor in value.items()}
    pullback = Pullback(inputs)
    operator, operator_bound, operator_norm = (
        Operands(*(packing.gather(tensor) for tensor in group)) for group in (gradients, bounds, norms)
    )
    for found, named in (
        (value, pullback.gradients(operator)),
        (bound, pullback.bounds(operator, operator_bound)),
        (dot_norm, pullback.norms(operator, operator_norm)),
    ):
        found |= {GRADIENT_NAMES[name]: tensor for name, tensor in named.items()}
    if inputs.initial_state is not None:
        value["dinitial_state"] = laid_out(inputs, dstate)
        bound["dinitial_state"] = laid_out(inputs, dstate_bound[..., None, :].expand_as(dstate))
        dot_norm["dinitial_state"] = torch.zeros_like(value["dinitial_state"])
    return Certified(
        value=value,
        bound={name: tensor * ROUNDING_OF_THE_BOUND + UNDERFLOW for name, tensor in bound.items()},
        dot_norm=dot_norm,
    )


def _outputs(inputs: KdaInputs, packing: SideBySide, path: Trajectory, forward: _ForwardBounds) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    final = path.states[-1]
    value = {"o": packing.gather(path.outputs), "final_state": laid_out(inputs, final)}
    final_bound = laid_out(inputs, forward.states[-1][..., None, :].expand_as(final))
    return value, {
        "o": packing.gather(forward.outputs) * ROUNDING_OF_THE_BOUND,
        "final_state": final_bound * ROUNDING_OF_THE_BOUND,
    }


def _gamma(num_terms: int) -> float:
    return num_terms * UNIT / (1 - num_terms * UNIT)


def _input_errors(inputs: KdaInputs, packing: SideBySide) -> _InputErrors:
    norm = (inputs.k.shape[-1] / 2 + 8) * UNIT if inputs.use_qk_l2norm_in_kernel else 0.0
    decay_error = torch.zeros_like(inputs.g[..., 0], dtype=torch.float64)
    if inputs.use_gate_in_kernel:
        logit, decay = gate_logit(inputs), apply_activations(inputs).log_decay
        steepness = logit.shifted.abs() if inputs.lower_bound is None else (logit.slope * logit.shifted).abs()
        # Where the decay itself has underflowed to zero, so has any error of its exponent.
        relevant = torch.where(decay > -745.0, decay.abs() * (16 + 8 * steepness) * UNIT, 0.0)
        decay_error = relevant.amax(-1)
    return _InputErrors(norm, norm, 8 * UNIT if inputs.use_beta_sigmoid_in_kernel else 0.0, packing.spread(decay_error))


class _Sizes(NamedTuple):
    """Norms and contraction factors per token, ``[N, G, T, 1]``, and the relative error of the decayed state."""

    k: Tensor
    q: Tensor
    rho: Tensor
    amax: Tensor
    decay_error: Tensor


def _sizes(x: Operands, errors: _InputErrors) -> _Sizes:
    k_norm, q_norm = x.k.norm(dim=-1, keepdim=True), x.q.norm(dim=-1, keepdim=True)
    rho = (1 - x.beta[..., None] * k_norm**2).abs().clamp(min=1.0)
    amax = x.log_decay.exp().amax(-1, keepdim=True)
    return _Sizes(k_norm, q_norm, rho, amax, (3 * UNIT + errors.log_decay[..., None]) * (1 + 1e-6))


def _forward_bounds(x: Operands, path: Trajectory, scale: float, errors: _InputErrors) -> _ForwardBounds:
    sizes, k_width = _sizes(x, errors), x.k.shape[-1]
    gamma_k = _gamma(k_width + 2) + errors.k
    bound = torch.zeros_like(path.states[0][..., 0, :])
    found = _ForwardBounds([bound], [], [], torch.empty_like(path.outputs))
    decay = x.log_decay.exp()
    for t in range(x.v.shape[2]):
        k_norm, rho, amax, beta = sizes.k[:, :, t], sizes.rho[:, :, t], sizes.amax[:, :, t], x.beta[:, :, t, None]
        decayed_norm = (decay[:, :, t, :, None] * path.states[t]).norm(dim=-2)
        state_norm, error = path.states[t + 1].norm(dim=-2), path.errors[t].abs()
        fresh = sizes.decay_error[:, :, t] * decayed_norm + UNDERFLOW
        decayed_bound = amax * bound + fresh
        prediction = gamma_k * k_norm * decayed_norm + UNIT * error
        local = rho * fresh + k_norm * beta * (prediction + (2 * UNIT + errors.beta + errors.k) * error)
        bound = rho * amax * bound + local + UNIT * state_norm + UNDERFLOW
        reading = scale * sizes.q[:, :, t] * (bound + (_gamma(k_width + 3) + errors.q) * state_norm)
        found.outputs[:, :, t] = abs(reading) + UNIT * path.outputs[:, :, t].abs() + UNDERFLOW
        found.states.append(bound)
        found.decayed.append(decayed_bound)
        found.errors.append(k_norm * decayed_bound + prediction)
    return found


def _reverse_bounds(
    x: Operands, path: Trajectory, forward: _ForwardBounds, steps: list[ReverseStep], do: Tensor, scale: float, errors: _InputErrors
) -> tuple[Operands, Operands, Tensor]:
    sizes, k_width, v_width = _sizes(x, errors), x.k.shape[-1], x.v.shape[-1]
    gamma_k, gamma_v = _gamma(k_width + 2) + errors.k, _gamma(2 * v_width + 6) + errors.beta
    bounds, norms = (Operands(*(torch.empty_like(operand) for operand in x)) for _ in range(2))
    bound = torch.zeros_like(path.states[0][..., 0, :])
    for step, t in zip(steps, reversed(range(x.v.shape[2])), strict=True):
        lam, w, decayed, decayed_lam, following = step
        k_norm, rho, amax, beta = sizes.k[:, :, t], sizes.rho[:, :, t], sizes.amax[:, :, t], x.beta[:, :, t, None]
        state, error, do_t = path.states[t + 1], path.errors[t], do[:, :, t]
        state_bound, decayed_bound, error_bound = forward.states[t + 1], forward.decayed[t], forward.errors[t]
        bound = bound + UNIT * lam.norm(dim=-2) + (3 * UNIT + errors.q) * abs(scale) * sizes.q[:, :, t] * do_t.abs() + UNDERFLOW
        local = gamma_k * k_norm * lam.norm(dim=-2)
        w_bound = k_norm * bound + local
        bounds.q[:, :, t] = abs(scale) * (_dot(state_bound, do_t) + gamma_v * _product(state, do_t)) + UNDERFLOW
        bounds.v[:, :, t] = beta * w_bound + (UNIT + errors.beta) * (beta * w).abs() + UNDERFLOW
        bounds.beta[:, :, t] = _dot(w_bound, error)[..., 0] + _dot(w, error_bound + gamma_v * error.abs())[..., 0]
        bounds.beta[:, :, t] += _dot(w_bound, error_bound)[..., 0] + UNDERFLOW
        bounds.k[:, :, t] = UNDERFLOW + beta * (
            _dot(bound, error) + _dot(bound, error_bound) + _dot(decayed_bound, w) + _dot(decayed_bound, w_bound)
            + _product(lam, error_bound + gamma_v * error.abs()) + _product(decayed, w_bound + gamma_v * w.abs())
        )  # fmt: skip
        decayed_lam_bound = rho * bound + beta * k_norm * (local + (2 * UNIT + errors.beta + errors.k) * w.abs())
        decayed_lam_bound = decayed_lam_bound + UNIT * decayed_lam.norm(dim=-2) + UNDERFLOW
        bounds.log_decay[:, :, t] = UNDERFLOW + (
            _dot(decayed_lam_bound, decayed_bound) + _product(decayed, decayed_lam_bound) + _product(decayed_lam, decayed_bound)
            + gamma_v * (decayed_lam * decayed).abs().sum(-1)
        )  # fmt: skip
        norms.q[:, :, t] = abs(scale) * (state * do_t[..., None, :]).norm(dim=-1)
        norms.v[:, :, t] = beta * (x.k[:, :, t, :, None] * lam).norm(dim=-2)
        norms.beta[:, :, t] = (w * error).norm(dim=-1)
        norms.k[:, :, t] = beta * torch.hypot((lam * error[..., None, :]).norm(dim=-1), (decayed * w[..., None, :]).norm(dim=-1))
        norms.log_decay[:, :, t] = (decayed_lam * decayed).norm(dim=-1)
        bound = amax * decayed_lam_bound + sizes.decay_error[:, :, t] * following.norm(dim=-2) + UNDERFLOW
    return bounds, norms, bound


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``sum_v |a_v| |b_v|`` with a channel axis to broadcast over."""
    return (a.abs() * b.abs()).sum(-1, keepdim=True)


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``|matrix| |vector|``: ``[..., K, V]`` and ``[..., V]`` to ``[..., K]``."""
    return (matrix.abs() @ vector.abs()[..., :, None])[..., 0]

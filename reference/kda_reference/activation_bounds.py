"""How far float64 activations and their chain rules may be off.

The units behind every number: a sum, product, quotient or square root is off by one ``u = 2^-53`` of its result; exp,
log1p and the logistic function by at most ``4 u``; a sum of n terms by ``n u`` of the sum of magnitudes. An argument x
that is off by ``d`` moves ``log sigmoid`` and ``log softplus`` by at most ``d`` where x is negative, and by at most
``d / x`` where it is positive. The totals below are rounded up generously. Bounds are stated to first order; the
certificate inflates them for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.activations import gate, gate_logit, inverse_norm
from kda_reference.pullback import gate_slopes, strength_slope, sum_over_group

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.activations import GateLogit, Operands
    from kda_reference.contract import KdaInputs

UNIT = 2.0**-53
# More than any loss to underflow, while inputs, states and cotangents stay below 1e30 in magnitude.
UNDERFLOW = 1e-290


class InputErrors(NamedTuple):
    """What the activations left behind: relative for elements of q, k and beta; absolute for the log decay."""

    qk: float
    beta: float
    log_decay: Tensor


def input_errors(inputs: KdaInputs) -> InputErrors:
    """Bound the errors of :func:`kda_reference.activations.apply_activations`, in the call's layout."""
    qk = (inputs.k.shape[-1] / 2 + 8) * UNIT if inputs.use_qk_l2norm_in_kernel else 0.0
    beta = 8 * UNIT if inputs.use_beta_sigmoid_in_kernel else 0.0
    if not inputs.use_gate_in_kernel:
        return InputErrors(qk, beta, torch.zeros_like(inputs.g, dtype=torch.float64))
    logit = gate_logit(inputs)
    argument = logit.shifted if inputs.lower_bound is None else logit.slope * logit.shifted
    log_decay = gate(logit, inputs.lower_bound).abs() * (16 + 8 * (-argument).clamp(min=0)) * UNIT
    return InputErrors(qk, beta, log_decay)


def pull_back_bounds(inputs: KdaInputs, operator: Operands, bound: Operands) -> dict[str, Tensor]:
    """Bound the error of :func:`kda_reference.pullback.pull_back`, given the operator's gradients and their bounds."""
    group = inputs.v.shape[2] // inputs.q.shape[2]
    found = {
        "q": sum_over_group(inputs, bound.q + group * UNIT * operator.q.abs()),
        "k": sum_over_group(inputs, bound.k + group * UNIT * operator.k.abs()),
        "v": bound.v,
        "g": bound.log_decay,
        "beta": bound.beta,
    }
    if inputs.use_qk_l2norm_in_kernel:
        units = (3 * inputs.k.shape[-1] + 32) * UNIT
        for name, x, gradient in (("q", inputs.q.double(), operator.q), ("k", inputs.k.double(), operator.k)):
            r = inverse_norm(x)
            y, size = (x * r).abs(), found[name] + units * sum_over_group(inputs, gradient.abs())
            found[name] = r * (size + y * (y * size).sum(-1, keepdim=True))
    if inputs.use_gate_in_kernel:
        found |= _gate_bounds(inputs, operator.log_decay.abs(), bound.log_decay)
    if inputs.use_beta_sigmoid_in_kernel:
        found["beta"] = strength_slope(inputs) * (bound.beta + 16 * UNIT * operator.beta.abs())
    return found


def _gate_bounds(inputs: KdaInputs, size: Tensor, bound: Tensor) -> dict[str, Tensor]:
    logit, slopes = gate_logit(inputs), gate_slopes(inputs)
    relative = _slope_error(logit, inputs.lower_bound)
    num_tokens, k_width = inputs.g.shape[0] * inputs.g.shape[1], inputs.g.shape[3]
    lost = logit.slope * UNDERFLOW * (1 + size)
    found = {"g": slopes.by_logit.abs() * (bound + relative * size) + lost}
    if inputs.A_log is not None:
        total = relative + num_tokens * k_width * UNIT
        found["A_log"] = (slopes.by_a_log.abs() * (bound + total * size) + lost).sum((0, 1, 3))
    if inputs.dt_bias is not None:
        total = relative + num_tokens * UNIT
        found["dt_bias"] = (slopes.by_logit.abs() * (bound + total * size) + lost).sum((0, 1)).flatten()
    return found


def _slope_error(logit: GateLogit, lower_bound: float | None) -> Tensor:
    """Bound the relative error of :func:`kda_reference.pullback.gate_slopes`."""
    if lower_bound is None:
        return UNIT * (32 + 8 * (-logit.shifted).clamp(min=0))
    return UNIT * (32 + 8 * (logit.slope * logit.shifted).abs())


def pull_back_norms(inputs: KdaInputs, operator: Operands, norm: Operands) -> dict[str, Tensor]:
    """Carry root sums of squares to the inputs, with the activations' slopes as factors.

    ``A_log`` and ``dt_bias`` end in a sum of their own, so theirs is that of its terms.
    """
    found = {
        "q": sum_over_group(inputs, norm.q.square()).sqrt(),
        "k": sum_over_group(inputs, norm.k.square()).sqrt(),
        "v": norm.v,
        "g": norm.log_decay,
        "beta": norm.beta,
    }
    if inputs.use_qk_l2norm_in_kernel:
        found["q"] = inverse_norm(inputs.q.double()) * found["q"]
        found["k"] = inverse_norm(inputs.k.double()) * found["k"]
    if inputs.use_gate_in_kernel:
        slopes = gate_slopes(inputs)
        found["g"] = slopes.by_logit.abs() * norm.log_decay
        if inputs.A_log is not None:
            found["A_log"] = (slopes.by_a_log * operator.log_decay).square().sum((0, 1, 3)).sqrt()
        if inputs.dt_bias is not None:
            found["dt_bias"] = (slopes.by_logit * operator.log_decay).square().sum((0, 1)).sqrt().flatten()
    if inputs.use_beta_sigmoid_in_kernel:
        found["beta"] = strength_slope(inputs) * norm.beta
    return found

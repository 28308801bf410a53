"""Carry gradients of the operator's variables back through the activations to the inputs of the call.

    normalise      dx = r (dy - y (y . dy)),  r = 1 / sqrt(sum x^2 + 1e-6)       exact with the constant inside the root
    softplus gate  dx = -exp(A) sigmoid(x + b) dg,   dA = sum dg g,   db = sum_t dx
    bounded gate   z = exp(A) (x + b), s = sigmoid(z):  dz = lower_bound s (1 - s) dg, dx = exp(A) dz, dA = sum dz z, db = sum_t dx
    strength       dx = c s (1 - s) dbeta
    grouped heads  gradients of q and k are summed over the value heads that read them

``1 - s`` is formed as ``sigmoid(-z)``, so that saturated logits keep their relative accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kda_reference.activations import Operands, gate, gate_logit, inverse_norm, strength_ceiling

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.contract import KdaInputs

UNIT = 2.0**-53


class Pullback:
    """The chain rules of one call. Operator gradients come in the call's layout ``[B, T, G, *]``."""

    def __init__(self, inputs: KdaInputs) -> None:
        self.inputs = inputs

    def gradients(self, operator: Operands) -> dict[str, Tensor]:
        """Return the gradients of the inputs, by argument name."""
        inputs = self.inputs
        found = {"q": self._ungroup(operator.q), "k": self._ungroup(operator.k), "v": operator.v, "g": operator.log_decay, "beta": operator.beta}
        if inputs.use_qk_l2norm_in_kernel:
            for name in ("q", "k"):
                r, y = self._normalised(name)
                found[name] = r * (found[name] - y * (y * found[name]).sum(-1, keepdim=True))
        if inputs.use_gate_in_kernel:
            slope, by_slope = self._gate_slopes()
            found["g"] = slope * operator.log_decay
            if inputs.A_log is not None:
                found["A_log"] = (by_slope * operator.log_decay).sum((0, 1, 3))
            if inputs.dt_bias is not None:
                found["dt_bias"] = found["g"].sum((0, 1)).flatten()
        if inputs.use_beta_sigmoid_in_kernel:
            found["beta"] = self._strength_slope() * operator.beta
        return found

    def bounds(self, operator: Operands, bound: Operands) -> dict[str, Tensor]:
        """Bound the error of :meth:`gradients`, given bounds of the operator's gradients.

        Every factor of a chain rule is formed with a relative error of at most 16 units, plus one unit per unit of the gate's logit, whose own
        rounding its exponential amplifies; a sum of n terms adds n units of the sum of magnitudes.
        """
        inputs = self.inputs
        group = inputs.v.shape[2] // inputs.q.shape[2]
        found = {
            "q": self._ungroup(bound.q) + group * UNIT * self._ungroup(operator.q.abs()),
            "k": self._ungroup(bound.k) + group * UNIT * self._ungroup(operator.k.abs()),
            "v": bound.v,
            "g": bound.log_decay,
            "beta": bound.beta,
        }
        if inputs.use_qk_l2norm_in_kernel:
            units = (3 * inputs.k.shape[-1] + 32) * UNIT
            for name, gradient in (("q", operator.q), ("k", operator.k)):
                r, y = self._normalised(name)
                size, error = self._ungroup(gradient.abs()), found[name]
                through = error + y.abs() * (y.abs() * error).sum(-1, keepdim=True)
                found[name] = r * (through + units * (size + y.abs() * (y.abs() * size).sum(-1, keepdim=True)))
        if inputs.use_gate_in_kernel:
            logit = gate_logit(inputs)
            relative = UNIT * (32 + 8 * (logit.slope * logit.shifted).abs() + 8 * logit.shifted.abs())
            slope, by_slope = self._gate_slopes()
            size = operator.log_decay.abs()
            found["g"] = slope.abs() * (bound.log_decay + relative * size)
            tokens = inputs.g.shape[0] * inputs.g.shape[1]
            if inputs.A_log is not None:
                terms = tokens * inputs.k.shape[-1] * UNIT
                found["A_log"] = (by_slope.abs() * (bound.log_decay + (relative + terms) * size)).sum((0, 1, 3))
            if inputs.dt_bias is not None:
                found["dt_bias"] = (found["g"] + tokens * UNIT * slope.abs() * size).sum((0, 1)).flatten()
        if inputs.use_beta_sigmoid_in_kernel:
            found["beta"] = self._strength_slope() * (bound.beta + 16 * UNIT * operator.beta.abs())
        return found

    def norms(self, operator: Operands, norm: Operands) -> dict[str, Tensor]:
        """Carry the root sum of squares of the last dot products, taking the activations' slopes as factors."""
        inputs = self.inputs
        found = {
            "q": self._ungroup(norm.q.square()).sqrt(),
            "k": self._ungroup(norm.k.square()).sqrt(),
            "v": norm.v,
            "g": norm.log_decay,
            "beta": norm.beta,
        }
        if inputs.use_qk_l2norm_in_kernel:
            for name in ("q", "k"):
                found[name] = self._normalised(name)[0] * found[name]
        if inputs.use_gate_in_kernel:
            slope, by_slope = self._gate_slopes()
            found["g"] = slope.abs() * norm.log_decay
            if inputs.A_log is not None:
                found["A_log"] = (by_slope * operator.log_decay).square().sum((0, 1, 3)).sqrt()
            if inputs.dt_bias is not None:
                found["dt_bias"] = (slope * operator.log_decay).square().sum((0, 1)).sqrt().flatten()
        if inputs.use_beta_sigmoid_in_kernel:
            found["beta"] = self._strength_slope() * norm.beta
        return found

    def _ungroup(self, gradient: Tensor) -> Tensor:
        """Sum over the value heads that read one query/key head."""
        heads = self.inputs.q.shape[2]
        return gradient.unflatten(2, (heads, -1)).sum(3)

    def _normalised(self, name: str) -> tuple[Tensor, Tensor]:
        x = getattr(self.inputs, name).detach().double()
        r = inverse_norm(x)
        return r, x * r

    def _gate_slopes(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the log decay by its logit and by A."""
        logit, bound = gate_logit(self.inputs), self.inputs.lower_bound
        if bound is None:
            return -logit.slope * torch.sigmoid(logit.shifted), gate(logit, None)
        z = logit.slope * logit.shifted
        by_z = bound * torch.sigmoid(z) * torch.sigmoid(-z)
        # A saturated gate has slope zero however steep its logit: 0 * inf would be NaN.
        flat = by_z == 0
        return torch.where(flat, 0.0, logit.slope * by_z), torch.where(flat, 0.0, by_z * z)

    def _strength_slope(self) -> Tensor:
        x = self.inputs.beta.detach().double()
        return strength_ceiling(self.inputs) * torch.sigmoid(x) * torch.sigmoid(-x)

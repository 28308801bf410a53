"""The in-kernel activations in float32, with the roundings that a correct kernel makes forward and backward.

What matters is where float32 loses digits although every step is right: ``1 - sigmoid(x)`` of a saturated logit, ``1 + exp(x)`` of a very
negative one, and ``dy - y (y . dy)`` of a normalised vector whose gradient is nearly parallel to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kda_conformance.rounding import Rounder

if TYPE_CHECKING:
    from torch import Tensor

    from kda_conformance.rounding import Exact

L2_EPSILON = 1e-6
LINEAR_FROM = 30.0


def normalise(x: Tensor, rounder: Rounder | Exact) -> Tensor:
    """Return ``x / sqrt(sum x^2 + 1e-6)`` over the last axis."""
    return _Normalise.apply(x, rounder)  # type: ignore[no-any-return,no-untyped-call]


def sigmoid(x: Tensor, rounder: Rounder | Exact) -> Tensor:
    """Return the logistic function; its derivative is formed from the rounded value in every second member, from ``x`` in the others."""
    return _Sigmoid.apply(x, rounder)  # type: ignore[no-any-return,no-untyped-call]


def gate(x: Tensor, a_log: Tensor, lower_bound: float | None, rounder: Rounder | Exact) -> Tensor:
    """Return ``-exp(A) softplus(x)``, or ``lower_bound sigmoid(exp(A) x)`` when there is a bound, in nats."""
    slope = rounder.round(a_log.exp(), "fp32")
    if lower_bound is None:
        small = rounder.round(1 + x.clamp(max=LINEAR_FROM).exp(), "fp32").log()
        return rounder.round(-slope * torch.where(x > LINEAR_FROM, x, small), "fp32")
    return rounder.round(lower_bound * sigmoid(rounder.round(slope * x, "fp32"), rounder), "fp32")


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounder: Rounder | Exact) -> Tensor:  # noqa: ANN401
        inverse = rounder.raw(((x * x).sum(-1, keepdim=True) + L2_EPSILON).rsqrt(), "fp32")
        y = rounder.raw(x * inverse, "fp32")
        ctx.save_for_backward(y, inverse)
        ctx.rounder = rounder
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        y, inverse = ctx.saved_tensors
        raw = ctx.rounder.raw
        along = raw((y * grad).sum(-1, keepdim=True), "fp32")
        return raw(inverse * raw(grad - raw(y * along, "fp32"), "fp32"), "fp32"), None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounder: Rounder | Exact) -> Tensor:  # noqa: ANN401
        y = rounder.raw(torch.sigmoid(x), "fp32")
        complement = torch.sigmoid(-x)
        if isinstance(rounder, Rounder):
            # Where y is 1 after rounding, 1 - y loses the cotangent and its errors, and the other form keeps both.
            complement[1::2] = 1 - y[1::2]
        ctx.save_for_backward(y * complement)
        ctx.rounder = rounder
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (slope,) = ctx.saved_tensors
        return ctx.rounder.raw(grad * slope, "fp32"), None

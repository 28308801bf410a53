"""Root mean square normalisation, and its gated form behind the operator [KL eq. 10].

    RMSNorm(x)        = w x / sqrt(mean(x^2) + eps)
    gated RMSNorm     = act(gate) RMSNorm(x)         act: sigmoid, swish, or nothing

The unit-length normalisation of queries and keys, with its constant on the SUM, is in :mod:`kda_reference.activations`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import silu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "swish": silu,
    "none": torch.ones_like,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last axis.

    Parameters
    ----------
    x
        Any shape ``[..., D]``.
    weight
        Factor per channel ``[D]`` (dimensionless).
    eps
        Added to the mean square.
    """
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def gated_rms_norm(x: Tensor, gate_logit: Tensor, weight: Tensor, eps: float, activation: str = "sigmoid") -> Tensor:
    """Normalise over the last axis and multiply with a gate; ``activation`` is a key of ``GATE_ACTIVATIONS``."""
    return GATE_ACTIVATIONS[activation](gate_logit) * rms_norm(x, weight, eps)

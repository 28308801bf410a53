"""The parts of a layer that ``fla-core`` has, under the names and in the arguments of :mod:`kda_optimized`.

Its step of the convolution is left out: it keeps W inputs a row where W - 1 are needed, in another order, and knows no slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fla.modules.causal_conv1d.ops import causal_conv1d
from fla.modules.norm.fused_norm_gate import rms_norm_gated

if TYPE_CHECKING:
    from torch import Tensor


def short_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve rows from their beginnings, with the activation."""
    y: Tensor = causal_conv1d(x, weight, activation="silu")[0]
    return y


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise and multiply with the sigmoid of the gate."""
    y: Tensor = rms_norm_gated(x, gate, weight, None, "sigmoid", eps=eps)
    return y

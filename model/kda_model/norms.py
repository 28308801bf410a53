"""Root mean square normalisation in float32, plain and gated [KL eq. 10]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

if TYPE_CHECKING:
    from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """``w x / sqrt(mean(x^2) + eps)`` over the last axis, in the dtype of ``x``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        return self.normalise(x).to(x.dtype)

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise, and stay in float32."""
        return rms_norm(at_least_float32(x), self.weight.shape, at_least_float32(self.weight), self.eps)


class GatedRMSNorm(RMSNorm):
    """``act(gate) RMSNorm(x)``; ``activation`` is ``sigmoid``, ``swish`` or ``none``."""

    def __init__(self, width: int, eps: float, activation: str) -> None:
        super().__init__(width, eps)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise ``[..., width]`` and multiply with the gate, all in float32; ``None`` only without activation."""
        y = self.normalise(x)
        if self.activation != "none":
            assert gate is not None  # noqa: S101 - the layer that owns this norm has a gate
            gate = at_least_float32(gate)
            y = y * (torch.sigmoid(gate) if self.activation == "sigmoid" else silu(gate))
        return y.to(x.dtype)

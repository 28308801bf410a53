"""The short convolution in front of the operator: depthwise, causal, of a few taps [KL fig. 3].

    y_t = sum_{j < W} w_j x_{t - W + 1 + j}        w_{W-1} meets the current token

Inputs before the first token are the ``tail`` of what came before, zeros at a beginning. Dimension letters: B sequences,
T tokens, D channels, W taps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def short_convolution(x_BTD: Tensor, weight_DW: Tensor, tail_BSD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convolve sequences that may continue earlier ones.

    Parameters
    ----------
    x_BTD
        Inputs; T may be zero.
    weight_DW
        Taps of each channel, oldest first.
    tail_BSD
        The ``S = W - 1`` inputs before the first, oldest first; ``None`` means zeros.

    Returns
    -------
    tuple[Tensor, Tensor]
        ``y [B, T, D]``, and the last W - 1 inputs, tail included, for a call that goes on.
    """
    num_tokens, taps = x_BTD.shape[1], weight_DW.shape[1]
    if tail_BSD is None:
        tail_BSD = x_BTD.new_zeros(x_BTD.shape[0], taps - 1, x_BTD.shape[2])
    known = torch.cat([tail_BSD, x_BTD], 1)
    y_BTD = sum(
        (weight_DW[:, j] * known[:, j : j + num_tokens] for j in range(taps)),
        start=torch.zeros_like(x_BTD),
    )
    return y_BTD, known[:, num_tokens:]

"""The depthwise causal convolution in front of the operator, for dense and packed rows that may continue [KL fig. 3].

Each sequence is preceded by its tail, the last W - 1 inputs of what came before, so that one convolution without padding serves
beginnings and continuations of any length, shorter than the kernel included. Dimension letters: B rows, T tokens, N sequences, D
channels, W taps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import conv1d

if TYPE_CHECKING:
    from torch import Tensor

    from kda_model.packing import Packing


class ShortConvolution(nn.Module):
    """``y_t = sum_j w_j x_(t - W + 1 + j)``; the last tap meets the current token."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))

    def forward(self, x_BTD: Tensor, packing: Packing | None, tail_NSD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve.

        Parameters
        ----------
        x_BTD
            Inputs; with a packing, one row of sequences.
        packing
            ``None`` means one sequence a row.
        tail_NSD
            The ``S = W - 1`` inputs before each sequence, oldest first; ``None`` means zeros.

        Returns
        -------
        tuple[Tensor, Tensor]
            ``[B, T, D]``, and the tails for calls that go on.
        """
        tail_len = self.weight.shape[-1] - 1
        num_sequences = x_BTD.shape[0] if packing is None else len(packing.lengths)
        if tail_NSD is None:
            tail_NSD = x_BTD.new_zeros(num_sequences, tail_len, x_BTD.shape[-1])
        if packing is None:
            known = torch.cat([tail_NSD, x_BTD], 1)
            return self._convolve(known), known[:, x_BTD.shape[1] :]
        parts = []
        for tail, tokens in zip(tail_NSD, packing.slices(), strict=True):
            parts += [tail, x_BTD[0, tokens]]
        known = torch.cat(parts)[None]
        # Sequence n has moved by n + 1 tails; the outputs in between straddle two sequences and are dropped.
        moved = torch.arange(1, num_sequences + 1, device=x_BTD.device) * tail_len
        starts = packing.cu_seqlens[:-1] + moved - tail_len
        lengths = packing.cu_seqlens.diff()
        outputs = torch.arange(x_BTD.shape[1], device=x_BTD.device) + (moved - tail_len).repeat_interleave(
            lengths, output_size=x_BTD.shape[1]
        )
        ends = (starts + lengths)[:, None] + torch.arange(tail_len, device=x_BTD.device)
        return self._convolve(known)[:, outputs], known[0, ends]

    def _convolve(self, known: Tensor) -> Tensor:
        if known.shape[1] < self.weight.shape[-1]:
            return known[:, :0]
        weight = self.weight.to(known.dtype)
        # Channels go back to the last axis in memory too: kernels read them side by side.
        return conv1d(known.transpose(1, 2), weight, groups=weight.shape[0]).transpose(1, 2).contiguous()

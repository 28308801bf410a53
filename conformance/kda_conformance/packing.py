"""Lay the independent sequences of a call side by side, aligned at their first tokens.

Missing tokens at the end become identity tokens (k = q = v = 0, beta = 0, log decay 0), which pass a state through
unchanged, so that one vectorised computation serves sequences of any lengths, empty ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor


class SideBySide:
    """Maps between the call's ``[B, T, ...]`` and ``[N, T_max, ...]``, behind one leading member axis."""

    def __init__(self, inputs: KdaInputs) -> None:
        batch, num_tokens = inputs.q.shape[:2]
        self.batch, self.num_tokens = batch, num_tokens
        if inputs.cu_seqlens is None:
            self.starts = [row * num_tokens for row in range(batch)]
            self.lengths = [num_tokens] * batch
        else:
            offsets = inputs.cu_seqlens.tolist()
            self.starts = offsets[:-1]
            self.lengths = [end - start for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
        longest = max(self.lengths, default=0)
        padding = batch * num_tokens
        index = torch.full((len(self.lengths), longest), padding, dtype=torch.int64)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            index[row, :length] = torch.arange(start, start + length)
        self.index = index.to(inputs.q.device)
        self.position = (self.index != padding).nonzero(as_tuple=True)

    def spread(self, x: Tensor) -> Tensor:
        """Turn ``[R, B, T, heads, ...]`` into ``[R, N, heads, T_max, ...]``, zero where a sequence has ended."""
        flat = x.reshape(x.shape[0], self.batch * self.num_tokens, *x.shape[3:])
        padded = torch.cat([flat, torch.zeros_like(flat[:, :1]) if flat.shape[1] else flat.new_zeros(flat.shape[0], 1, *flat.shape[2:])], 1)
        return padded[:, self.index].transpose(2, 3)

    def gather(self, x: Tensor) -> Tensor:
        """Turn ``[R, N, heads, T_max, ...]`` back into ``[R, B, T, heads, ...]``."""
        rows, columns = self.position
        flat = x.transpose(2, 3)[:, rows, columns]
        order = self.index[rows, columns].argsort()
        return flat[:, order].reshape(x.shape[0], self.batch, self.num_tokens, x.shape[2], *x.shape[4:])

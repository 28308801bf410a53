"""Lay the independent sequences of a call side by side, aligned at their first tokens, and their states in one layout.

Missing tokens at the end become identity tokens (k = q = v = 0, beta = 0, log decay 0), which pass a state through
unchanged, so that one vectorised computation serves sequences of any lengths, empty ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.contract import KdaInputs


class SideBySide:
    """Maps between the call's ``[..., B, T, heads, *]`` and ``[..., N, heads, T_max, *]``.

    Parameters
    ----------
    inputs
        The call whose sequences are laid out.
    num_leading
        Axes in front of B that are left alone.
    """

    def __init__(self, inputs: KdaInputs, num_leading: int = 0) -> None:
        batch, num_tokens = inputs.q.shape[:2]
        self.batch, self.num_tokens, self.num_leading = batch, num_tokens, num_leading
        if inputs.cu_seqlens is None:
            starts, lengths = [row * num_tokens for row in range(batch)], [num_tokens] * batch
        else:
            offsets = inputs.cu_seqlens.tolist()
            starts = offsets[:-1]
            lengths = [end - start for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
        padding = batch * num_tokens
        index = torch.full((len(lengths), max(lengths, default=0)), padding, dtype=torch.int64)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            index[row, :length] = torch.arange(start, start + length)
        self.index = index.to(inputs.q.device)
        rows, columns = (self.index != padding).nonzero(as_tuple=True)
        order = self.index[rows, columns].argsort()
        self.position = (rows[order], columns[order])

    def spread(self, x: Tensor) -> Tensor:
        """Lay sequences side by side; zero where a sequence has ended."""
        lead = self.num_leading
        flat = x.flatten(lead, lead + 1)
        zero = flat.new_zeros(*flat.shape[:lead], 1, *flat.shape[lead + 1 :])
        padded = torch.cat([flat, zero], lead)
        return padded[(slice(None),) * lead + (self.index,)].transpose(lead + 1, lead + 2)

    def gather(self, x: Tensor) -> Tensor:
        """Undo :meth:`spread`."""
        lead = self.num_leading
        flat = x.transpose(lead + 1, lead + 2)[(slice(None),) * lead + self.position]
        return torch.unflatten(flat, lead, (self.batch, self.num_tokens))


def initial_state(inputs: KdaInputs, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return ``S_0`` as ``[N, G, K, V]`` in ``dtype``, zeros when the call gives none."""
    if inputs.initial_state is None:
        return call_layout(inputs, torch.zeros(inputs.state_shape, dtype=dtype, device=inputs.q.device))
    return call_layout(inputs, inputs.initial_state.to(dtype))


def call_layout(inputs: KdaInputs, state: Tensor) -> Tensor:
    """Turn a state ``[..., K, V]`` into the call's layout, or back: the two layouts are transposes of each other."""
    return state.transpose(-1, -2) if inputs.state_v_first else state

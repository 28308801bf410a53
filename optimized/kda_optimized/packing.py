"""Index tables of a call: which chunk belongs to which sequence.

Every call is treated as packed: a batch is one row of tokens whose sequences happen to have equal lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """Where sequences and chunks begin.

    Attributes
    ----------
    cu_seqlens
        int64 ``[N + 1]``, token offsets.
    chunk_table
        int32 ``[num_chunks, 2]``: sequence, and chunk number within it.
    chunk_offsets
        int64 ``[N]``: number of chunks before each sequence.
    num_chunks
        Chunks of all sequences together.
    """

    cu_seqlens: Tensor
    chunk_table: Tensor
    chunk_offsets: Tensor
    num_chunks: int


def pack(inputs: KdaInputs, chunk: int) -> Packing:
    """Lay out the chunks of a call."""
    batch, length = inputs.q.shape[:2]
    if inputs.cu_seqlens is None:
        offsets = torch.arange(batch + 1, dtype=torch.int64) * length
    else:
        offsets = inputs.cu_seqlens.detach().to("cpu", torch.int64)
    counts = (offsets.diff() + chunk - 1) // chunk
    first = counts.cumsum(0) - counts
    num_chunks = int(counts.sum())
    sequence = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    number = torch.arange(num_chunks) - first[sequence]
    table = torch.stack([sequence, number], 1).to(torch.int32)
    device = inputs.q.device
    return Packing(offsets.to(device), table.to(device), first.to(device), num_chunks)

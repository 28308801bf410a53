"""Where each chunk of each sequence lies: the index tables of a call.

Every call is treated as packed: the rows of a batch are sequences that happen to have equal lengths. Chunks are numbered through
all sequences in order, and an empty sequence has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from kda_optimized.graph_capture import hold, outside_pools

if TYPE_CHECKING:
    from kda_reference.contract import KdaInputs
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The chunks of one call.

    Attributes
    ----------
    chunk_len
        Tokens per chunk.
    num_chunks
        Chunks of all sequences.
    cu_seqlens
        int64 ``[N + 1]``, token offsets of the sequences.
    chunk_offsets
        int64 ``[N]``, number of the first chunk of each sequence.
    chunk_table
        int64 ``[num_chunks, 5]``, of each chunk the batch row, its first token there, the tokens from there to its sequence's end, the
        sequence and the chunk's number within it.
    """

    chunk_len: int
    num_chunks: int
    cu_seqlens: Tensor
    chunk_offsets: Tensor
    chunk_table: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The sequences of a call cut into pieces of whole chunks.

    Attributes
    ----------
    num_segments
        Pieces of all sequences; an empty sequence has none.
    cu_seqlens
        int64 ``[num_segments + 1]``, token offsets of the pieces.
    chunk_offsets
        int64 ``[num_segments]``, number of the first chunk of each piece.
    span_offsets
        int64 ``[num_segments]``, number of the first span of each piece; a sequence's last span may be short.
    first_segments
        int64 ``[N + 1]``, number of the first piece of each sequence.
    """

    num_segments: int
    cu_seqlens: Tensor
    chunk_offsets: Tensor
    span_offsets: Tensor
    first_segments: Tensor


def schedule(inputs: KdaInputs, chunk_len: int) -> Schedule:
    """Cut every sequence of a call into chunks; ``cu_seqlens`` is read on the host."""
    return schedule_of(offsets_of(inputs), chunk_len, inputs.q.shape[1], inputs.q.device)


def schedule_of(offsets: tuple[int, ...], chunk_len: int, row_len: int, device: torch.device) -> Schedule:
    """Cut sequences into chunks, given their offsets and the tokens of a batch row."""
    return hold(_schedule(offsets, chunk_len, row_len, device), device)


def offsets_of(inputs: KdaInputs) -> tuple[int, ...]:
    """Return the token offsets of the sequences; rows of a batch are sequences of one length."""
    return offsets_between(inputs.cu_seqlens, *inputs.q.shape[:2])


def offsets_between(cu_seqlens: Tensor | None, batch: int, num_tokens: int) -> tuple[int, ...]:
    """Return the token offsets of packed sequences, or of the rows of a batch."""
    if cu_seqlens is not None:
        return tuple(cu_seqlens.tolist())
    return tuple(row * num_tokens for row in range(batch + 1))


def segments(inputs: KdaInputs, chunk_len: int, most_spans: int, span: int = 1) -> Segments:
    """Cut every sequence of a call into pieces of at most ``most_spans`` spans of ``span`` chunks, as equal as can be."""
    device = inputs.q.device
    return hold(_segments(offsets_of(inputs), chunk_len, most_spans, span, device), device)


@lru_cache(maxsize=64)
def _segments(offsets: tuple[int, ...], chunk_len: int, most_spans: int, span: int, device: torch.device) -> Segments:
    return outside_pools(lambda: _new_segments(offsets, chunk_len, most_spans, span, device), device)


def _new_segments(
    offsets: tuple[int, ...], chunk_len: int, most_spans: int, span: int, device: torch.device
) -> Segments:
    starts, first, chunks, spans, chunks_before, spans_before = [], [0], [], [], 0, 0
    for start, end in pairwise(offsets):
        count = -(-(end - start) // (span * chunk_len))
        pieces = -(-count // most_spans)
        cuts = [count * piece // pieces for piece in range(pieces)]
        starts += [start + span * chunk_len * cut for cut in cuts]
        chunks += [chunks_before + span * cut for cut in cuts]
        spans += [spans_before + cut for cut in cuts]
        first.append(first[-1] + pieces)
        chunks_before += -(-(end - start) // chunk_len)
        spans_before += count
    return Segments(
        num_segments=len(starts),
        cu_seqlens=torch.tensor([*starts, offsets[-1]], dtype=torch.int64, device=device),
        chunk_offsets=torch.tensor(chunks, dtype=torch.int64, device=device),
        span_offsets=torch.tensor(spans, dtype=torch.int64, device=device),
        first_segments=torch.tensor(first, dtype=torch.int64, device=device),
    )


@lru_cache(maxsize=64)
def _schedule(offsets: tuple[int, ...], chunk_len: int, row_len: int, device: torch.device) -> Schedule:
    """Return the tables, kept: calls of one shape follow each other, and a copy to the device costs more than a short kernel."""
    return outside_pools(lambda: _new_schedule(offsets, chunk_len, row_len, device), device)


def _new_schedule(offsets: tuple[int, ...], chunk_len: int, row_len: int, device: torch.device) -> Schedule:
    cu_seqlens = torch.tensor(offsets, dtype=torch.int64)
    counts = (cu_seqlens.diff() + chunk_len - 1) // chunk_len
    first = counts.cumsum(0) - counts
    sequence = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    number = torch.arange(sequence.numel()) - first[sequence]
    start = cu_seqlens[sequence] + number * chunk_len
    row = start // max(row_len, 1)
    table = torch.stack([row, start - row * row_len, cu_seqlens[sequence + 1] - start, sequence, number], dim=1)
    return Schedule(
        chunk_len=chunk_len,
        num_chunks=sequence.numel(),
        cu_seqlens=cu_seqlens.to(device),
        chunk_offsets=first.to(device),
        chunk_table=table.to(device),
    )

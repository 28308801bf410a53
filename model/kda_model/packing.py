"""Sequences of any lengths in one row of tokens: no padding, and nothing that leaks from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from kda_reference.errors import PackingError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Lengths of the sequences that lie one after another in the single row of a batch ``[1, T]``.

    Attributes
    ----------
    lengths
        Tokens of each sequence, at least 0; at least one sequence.
    device
        Where the offsets are needed.
    """

    lengths: tuple[int, ...]
    device: torch.device

    def __post_init__(self) -> None:
        """Check the lengths."""
        if not self.lengths:
            message = "lengths must name at least one sequence, got none; leave the packing out"
            raise PackingError(message)
        for row, length in enumerate(self.lengths):
            if length < 0:
                message = f"lengths must not be negative, got {length} at n={row}; count the tokens of each sequence"
                raise PackingError(message)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> Packing:
        """Take the offsets ``[N + 1]`` of the public interface."""
        offsets = cu_seqlens.tolist()
        if offsets[:1] != [0]:
            message = f"cu_seqlens must start at 0, got {offsets[:1]}; prepend the first offset"
            raise PackingError(message)
        lengths = tuple(end - start for start, end in zip(offsets[:-1], offsets[1:], strict=True))
        return cls(lengths, cu_seqlens.device)

    def check(self, tokens: Tensor) -> None:
        """Refuse tokens ``[B, T]`` that these sequences do not cover exactly.

        Raises
        ------
        ShapeError
            If the batch has more than one row.
        PackingError
            If the lengths do not add up to T.
        """
        if tokens.shape[0] != 1:
            message = (
                f"tokens must have one row with a packing, got {tokens.shape[0]}; lay the sequences one after another"
            )
            raise ShapeError(message)
        if sum(self.lengths) != tokens.shape[1]:
            message = f"lengths must add up to T={tokens.shape[1]}, got {sum(self.lengths)}; cover every token once"
            raise PackingError(message)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Return where each sequence starts, and the end."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Return the offsets as the operator takes them, int64 ``[N + 1]``."""
        return torch.tensor(self.offsets, dtype=torch.int64, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Return the place of each token in its own sequence, int64 ``[1, T]``."""
        return torch.cat([torch.arange(length, device=self.device) for length in (*self.lengths, 0)])[None]

    def slices(self) -> Iterator[slice]:
        """Yield the tokens of each sequence."""
        for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield slice(start, end)


def pack(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Packing]:
    """Lay token sequences into one row ``[1, T]``."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device=device)
    return tokens[None], Packing(tuple(len(sequence) for sequence in sequences), device)

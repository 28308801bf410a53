"""What a training step reads: tokens, what is to be predicted, and how sequences lie in the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kda_model.packing import Packing

NO_TARGET = -1


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes
    ----------
    tokens
        ``[B, T]``, int64.
    targets
        What each place is to predict ``[B, T]``; ``NO_TARGET`` where nothing is asked.
    packing
        Sequences in the row; ``None`` means one sequence a row.
    """

    tokens: Tensor
    targets: Tensor
    packing: Packing | None = None


class Source(Protocol):
    """Gives the batch of any step: the same one whenever it is asked, so that a run can be taken up again anywhere."""

    @property
    def vocab_size(self) -> int:
        """Return the number of different tokens."""

    def batch(self, step: int, device: torch.device) -> Batch:
        """Return the batch of a step."""

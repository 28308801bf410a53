"""How the next token is drawn: the likeliest, or by temperature from the smallest set that holds enough probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from kda_reference.errors import DomainError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Rule for drawing tokens.

    Attributes
    ----------
    temperature
        Divides the logits; 0 means the likeliest token.
    top_p
        Draw among the likeliest tokens whose probabilities add up to this much, in (0, 1]; the likeliest is always among them.
    seed
        Of the first sequence; the next has the next seed, so that what a sequence draws does not depend on its neighbours.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.temperature >= 0:
            message = f"temperature must be >= 0, got {self.temperature}; 0 means greedy"
            raise DomainError(message)
        if not 0 < self.top_p <= 1:
            message = f"top_p must lie in (0, 1], got {self.top_p}; 1 means all tokens"
            raise DomainError(message)


class Sampler:
    """Draws tokens of several sequences, each with its own random numbers."""

    def __init__(self, sampling: Sampling, num_sequences: int) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(num_sequences)]

    def draw(self, logits_NV: Tensor, rows: list[int]) -> list[int]:
        """Return one token for each row of logits; ``rows`` says which sequences they belong to."""
        if self.sampling.temperature == 0:
            greedy: list[int] = logits_NV.argmax(-1).tolist()
            return greedy
        kept, order = nucleus(logits_NV, self.sampling)
        numbers = torch.stack([torch.rand((), dtype=torch.float64, generator=self.generators[row]) for row in rows])
        cumulative = kept.cumsum(-1)
        # The total is that of the kept tokens; a number below it falls on one of them.
        wanted = numbers.to(kept.device)[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, wanted, right=True).clamp_max((kept > 0).sum(-1, keepdim=True) - 1)
        drawn: list[int] = order.gather(-1, place)[:, 0].tolist()
        return drawn


def nucleus(logits_NV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the tokens in falling order, zero for those that are not kept, and the tokens."""
    probabilities = (logits_NV.double() / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return ordered.masked_fill((before >= sampling.top_p) & (before > 0), 0), order

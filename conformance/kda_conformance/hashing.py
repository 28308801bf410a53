"""Random bits that depend only on a value and a seed: equal values get equal bits, in one process and the next."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from kda_conformance.arithmetic import FLOAT64_BITS

if TYPE_CHECKING:
    from torch import Tensor

# Odd multipliers of the SplitMix64 finaliser, as signed 64-bit integers.
MIX_1 = -4658895280553007687
MIX_2 = -7723592293110705685
UNIFORM_TO_UNIT_VARIANCE = 12.0**0.5
# How far apart the two numbers begin that one hash is taken for, of up to 32 bits each.
BLUR_SHIFT = 32


@cache
def member_seeds(first: int, count: int, num_axes: int, device: torch.device) -> Tensor:
    """Return one well-mixed 64-bit seed per member, shaped to broadcast over ``num_axes`` axes; not to be written to."""
    seeds = (torch.arange(count, dtype=torch.int64, device=device) + first + 1) * MIX_1
    return seeds.reshape(count, *[1] * (num_axes - 1))


def hash_bits(x: Tensor, seeds: Tensor) -> Tensor:
    """Return 64 pseudo-random bits (int64) that depend only on the value and the member's seed."""
    # In place: most of a budget's time goes through here.
    h = x.contiguous().view(torch.int64) ^ seeds
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, None)):
        tail = h >> shift
        h ^= tail.bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            h *= factor
    return h


def uniform_from(bits: Tensor) -> Tensor:
    """Return numbers in ``[0, 1)`` from hashed bits."""
    return ((bits >> 11) & ((1 << FLOAT64_BITS) - 1)).double() * 2.0**-FLOAT64_BITS

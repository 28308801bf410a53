"""The roundings of ``rounding`` for a processor, in one pass over memory: the same bits as its tensor operations make.

Half of a budget's time would be rounding, since the twenty tensor operations that one takes are bound by memory. Importing this module
needs Numba, which compiles the loops once a machine; on a GPU, and where it is not installed, ``rounding`` does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from kda_conformance.arithmetic import (
    FLOAT64_BITS,
    FP16_QUANTUM,
    FP16_SMALLEST_NORMAL,
    SIGNIFICAND_BITS,
    SMALLEST_NORMAL,
)
from kda_conformance.hashing import BLUR_SHIFT, MIX_1, MIX_2, UNIFORM_TO_UNIT_VARIANCE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

FACTOR_1, FACTOR_2 = np.int64(MIX_1), np.int64(MIX_2)
UNIFORM_UNIT = 2.0**-FLOAT64_BITS
# Numba types a Python integer by its size; these have to be 64 bits wide, or the shifts are not those of the tensor operations.
ONE, DROPPED = np.int64(1), {name: np.int64(FLOAT64_BITS - bits) for name, bits in SIGNIFICAND_BITS.items()}


def round_stochastically(x: Tensor, fmt: str, first_seed: int) -> Tensor:
    """Round float64 ``x [R, ...]`` to the significand of ``fmt``, with the random bits of the members from ``first_seed`` on."""
    rounded = torch.empty_like(x, memory_format=torch.contiguous_format)
    _round(_rows(x), _rows(rounded), DROPPED[fmt], first_seed, fmt == "fp16")
    return rounded


def blur(x: Tensor, first_seed: int) -> Tensor:
    """Disturb float64 ``x [R, ...]`` by up to a unit in the last place of float32, and leave float32 numbers alone."""
    blurred = torch.empty_like(x, memory_format=torch.contiguous_format)
    _blur(_rows(x), _rows(blurred), DROPPED["fp32"], first_seed)
    return blurred


def accumulate(
    product: Tensor, sum_of_squares: Tensor, square_of_sums: Tensor, size: float, seed: int, noise_seed: int
) -> Tensor:
    """Add noise of deviation ``size (sum_of_squares + square_of_sums)^1/2`` to ``product [R, ...]`` and round to float32.

    A tensor library's square root may be the other neighbour of the true one, once in ten million numbers.
    """
    total = torch.empty_like(product, memory_format=torch.contiguous_format)
    _accumulate(
        _rows(product),
        _rows(sum_of_squares),
        _rows(square_of_sums),
        _rows(total),
        size,
        seed,
        noise_seed,
        DROPPED["fp32"],
    )
    return total


def disturb(x: Tensor, uniform: Tensor, levels: Tensor, size: float) -> Tensor:
    """Multiply ``x [R, ...]`` by ``1 + size levels (2 uniform - 1)``, flushed where a level is not 0."""
    disturbed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _disturb(_rows(x), _rows(uniform), levels.numpy(), _rows(disturbed), size)
    return disturbed


def _rows(x: Tensor) -> Floats:
    """Return the memory of ``x`` as a matrix, one member a row."""
    members = x.shape[0]
    return x.detach().contiguous().view(members, x.numel() // max(members, 1)).numpy()


@njit(cache=True)
def _hash(h: np.int64) -> np.int64:
    h = (h ^ ((h >> 30) & ((ONE << 34) - ONE))) * FACTOR_1
    h = (h ^ ((h >> 27) & ((ONE << 37) - ONE))) * FACTOR_2
    return h ^ ((h >> 31) & ((ONE << 33) - ONE))


@njit(cache=True)
def _uniform(bits: np.int64) -> float:
    return float((bits >> 11) & ((ONE << FLOAT64_BITS) - ONE)) * UNIFORM_UNIT


@njit(cache=True)
def _round(x: Floats, rounded: Floats, dropped: np.int64, first_seed: int, subnormals: bool) -> None:  # noqa: FBT001 - no keywords in loops
    mask = (ONE << dropped) - ONE
    pattern, result = x.view(np.int64), rounded.view(np.int64)
    for member in range(x.shape[0]):
        seed = np.int64(member + first_seed + 1) * FACTOR_1
        for i in range(x.shape[1]):
            bits = _hash(pattern[member, i] ^ seed)
            result[member, i] = ((bits & mask) + pattern[member, i]) & ~mask
            if subnormals:
                if abs(x[member, i]) < FP16_SMALLEST_NORMAL:
                    rounded[member, i] = np.floor(x[member, i] / FP16_QUANTUM + _uniform(bits)) * FP16_QUANTUM
            elif abs(rounded[member, i]) < SMALLEST_NORMAL:
                rounded[member, i] = 0.0


@njit(cache=True)
def _blur(x: Floats, blurred: Floats, dropped: np.int64, first_seed: int) -> None:
    mask = (ONE << dropped) - ONE
    pattern, result = x.view(np.int64), blurred.view(np.int64)
    for member in range(x.shape[0]):
        seed = np.int64(member + first_seed + 1) * FACTOR_1
        for i in range(x.shape[1]):
            result[member, i] = pattern[member, i]
            if pattern[member, i] & mask:
                bits = _hash(pattern[member, i] ^ seed)
                result[member, i] += (bits & mask) + ((bits >> BLUR_SHIFT) & mask) - mask
            if abs(blurred[member, i]) < SMALLEST_NORMAL:
                blurred[member, i] = 0.0


@njit(cache=True)
def _accumulate(
    product: Floats,
    squares: Floats,
    squares_of_sums: Floats,
    total: Floats,
    size: float,
    first_seed: int,
    noise_seed: int,
    dropped: np.int64,
) -> None:
    pattern = product.view(np.int64)
    for member in range(product.shape[0]):
        seed = np.int64(member + noise_seed + 1) * FACTOR_1
        for i in range(product.shape[1]):
            deviation = size * np.sqrt(squares[member, i] + squares_of_sums[member, i])
            noise = _uniform(_hash(pattern[member, i] ^ seed)) - 0.5
            total[member, i] = product[member, i] + deviation * UNIFORM_TO_UNIT_VARIANCE * noise
    _round(total, total, dropped, first_seed, subnormals=False)


@njit(cache=True)
def _disturb(x: Floats, uniform: Floats, levels: Floats, disturbed: Floats, size: float) -> None:
    for member in range(x.shape[0]):
        for i in range(x.shape[1]):
            noise = (2 * uniform[member, i] - 1) * levels[member]
            y = x[member, i] * (1 + size * noise)
            disturbed[member, i] = 0.0 if levels[member] > 0 and abs(y) < SMALLEST_NORMAL else y

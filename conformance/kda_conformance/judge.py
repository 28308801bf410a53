"""Judge a tensor against its budget: one score, at most 1 for a correct computation.

With ``e`` the error, ``h`` half a unit in the last place of the tensor's dtype and ``s`` the budget's deviation,

    z     = max(0, |e| - h) / s                                          limit 10 on the largest element
    slice = rms of z over a row, a column or a head (>= 16 elements)      limit 6 on the largest slice
    gain  = |<e, w> / <value, w>| / rms of the same over the ensemble     limit 8, with w = value / s^2
    score = max(z / 10, slice / 6, gain / 8)

so that one wrong element, one weakly wrong channel and one uniformly wrong factor are each seen where they stand out.
A value beyond what the tensor's dtype holds is infinity in it, and so is what rounds to it: both sides are cut off where infinity begins.
Any other non-finite element scores infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kda_conformance.budget import TensorBudget

Z_LIMIT = 10.0
SLICE_LIMIT = 6.0
GAIN_LIMIT = 8.0
SMALLEST_SLICE = 16
SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}
LOWEST_EXPONENT = {torch.bfloat16: -133, torch.float16: -24, torch.float32: -149, torch.float64: -1074}
AXES = {
    "o": "btgv",
    "final_state": "ngkv",
    "dq": "bthk",
    "dk": "bthk",
    "dv": "btgv",
    "dg": "btgk",
    "dbeta": "btg",
    "dA_log": "g",
    "ddt_bias": "c",
    "dinitial_state": "ngkv",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """How one tensor compares with its budget.

    Attributes
    ----------
    tensor
        Its name, such as ``o`` or ``dg``.
    score
        ``max(z / 10, slice / 6, gain / 8)``; at most 1 passes.
    z, slice_z, gain
        The three statistics.
    relative_error
        Frobenius norm of the error over that of the value; for information only.
    index
        Where the largest ``z`` is, by axis name.
    got, expected, bound
        The element there, its certified value, and the largest error it may have.
    ratio
        Error over its limit per element, shaped like the tensor; for plots.
    """

    tensor: str
    score: float
    z: float
    slice_z: float
    gain: float
    relative_error: float
    index: dict[str, int]
    got: float
    expected: float
    bound: float
    ratio: Tensor


def judge(name: str, got: Tensor, budget: TensorBudget, *, num_rounded: int = 1) -> Judgement:
    """Compare ``got`` with its budget.

    Parameters
    ----------
    name
        The tensor's name, a key of ``AXES``.
    got
        What the implementation returned, in its own dtype.
    budget
        Value and variance of the same shape.
    num_rounded
        How many of the two sides were rounded to ``got``'s dtype: 2 when both are results of an implementation.
    """
    axes = AXES[name]
    infinity = _where_infinity_begins(got.dtype)
    value = budget.value.clamp(-infinity, infinity)
    actual = got.detach().to(value.device).double().clamp(-infinity, infinity)
    if value.numel() == 0:
        return Judgement(
            tensor=name, score=0.0, z=0.0, slice_z=0.0, gain=0.0, relative_error=0.0,
            index={}, got=0.0, expected=0.0, bound=0.0, ratio=value,
        )  # fmt: skip
    half_ulp = 0.5 * num_rounded * unit_in_last_place(torch.maximum(actual.abs(), value.abs()), got.dtype)
    deviation = budget.variance.sqrt()
    error = actual - value
    overflows = got.isinf().to(value.device) & (error.abs() <= Z_LIMIT * deviation + half_ulp)
    finite = got.isfinite().to(value.device) | overflows
    z = torch.where(finite, (error.abs() - half_ulp).clamp(min=0) / deviation, torch.inf)
    flat = int(z.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), z.shape))
    bound = float(Z_LIMIT * deviation[position] + half_ulp[position])
    if bool(finite.all()):
        slice_z = _largest_slice(z, axes)
        direction = value / budget.variance
        length = float((value * direction).sum())
        if length and budget.gain_rms:
            # The output's own rounding is no gain error. Comparing with the rounded value removes the part that equal
            # elements share; what is left is at most half a unit per element, at random.
            rounded = value.to(got.dtype).double().clamp(-infinity, infinity)
            along = float(((actual - rounded) * direction).sum()) / length
            rounding = float(((half_ulp * direction) ** 2).sum() / 3) ** 0.5 / length
            gain = abs(along) / math.hypot(budget.gain_rms, rounding)
        else:
            gain = 0.0
        relative = float(error.norm() / value.norm()) if bool(value.any()) else float(error.norm())
    else:
        slice_z = gain = relative = math.inf
    largest = float(z.max())
    return Judgement(
        tensor=name,
        score=max(largest / Z_LIMIT, slice_z / SLICE_LIMIT, gain / GAIN_LIMIT),
        z=largest,
        slice_z=slice_z,
        gain=gain,
        relative_error=relative,
        index=dict(zip(axes, position, strict=True)),
        got=float(actual[position]),
        expected=float(value[position]),
        bound=bound,
        ratio=z / Z_LIMIT,
    )


def _where_infinity_begins(dtype: torch.dtype) -> float:
    """Return the least number that rounds to infinity, half a unit above the largest finite one."""
    largest = torch.finfo(dtype).max
    return largest + 0.5 * float(unit_in_last_place(torch.tensor(largest, dtype=torch.float64), dtype))


def unit_in_last_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of ``dtype`` at magnitude ``x`` (float64)."""
    _, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), (exponent - SIGNIFICAND[dtype]).clamp(min=LOWEST_EXPONENT[dtype]))


def _largest_slice(z: Tensor, axes: str) -> float:
    """Return the largest rms of z over rows, columns and heads that have at least 16 elements."""
    position = {axis: i for i, axis in enumerate(axes)}
    width = next((position[axis] for axis in "vk" if axis in position and position[axis] == len(axes) - 1), None)
    length = position.get("t", position.get("k") if axes == "ngkv" else None)
    slices = [(width,), (length,), (length, width)]
    if axes == "c":
        slices = [(0,)]
    largest = 0.0
    for dims in slices:
        kept = tuple(dim for dim in dims if dim is not None)
        if len(kept) == len(dims) and math.prod(z.shape[dim] for dim in kept) >= SMALLEST_SLICE:
            largest = max(largest, float((z**2).mean(kept).max()) ** 0.5)
    return largest

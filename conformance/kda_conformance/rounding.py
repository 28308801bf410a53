"""Stochastic rounding whose random number is a hash of the value, and products that round like hardware.

Equal values round equally, as they do in a real kernel; otherwise coherent errors (a repeated key, a constant gate)
would average out in the ensemble and a correct kernel would be called wrong. Members of the ensemble are the leading
axis of every tensor, and differ only in the seed mixed into the hash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from kda_conformance.arithmetic import (
    FLOAT64_BITS,
    FP16_QUANTUM,
    FP16_SMALLEST_NORMAL,
    SIGNIFICAND_BITS,
    SMALLEST_NORMAL,
    U32,
)
from kda_conformance.hashing import BLUR_SHIFT, UNIFORM_TO_UNIT_VARIANCE, hash_bits, member_seeds, uniform_from

loops: ModuleType | None
try:
    from kda_conformance import rounding_loops
except ImportError:  # without Numba, or with a NumPy that it does not know
    loops = None
else:
    loops = rounding_loops

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

ACCUMULATION = 0.4
ACCUMULATION_SEED = 7919
Mode = Literal["stochastic", "nearest", "truncate"]


def _loops_for(x: Tensor) -> Any:  # noqa: ANN401 - a module, if it is there
    """Return the module whose loops round ``x``, or ``None``: then tensor operations do, many times as slowly on a processor."""
    return loops if x.device.type == "cpu" else None


def round_stochastically(x: Tensor, fmt: str, seeds: Tensor) -> Tensor:
    """Round float64 ``x`` to the significand of ``fmt``, up with probability equal to the remainder."""
    dropped = FLOAT64_BITS - SIGNIFICAND_BITS[fmt]
    mask = (1 << dropped) - 1
    x = x.contiguous()
    bits = hash_bits(x, seeds)
    uniform = uniform_from(bits) if fmt == "fp16" else None
    # The bit pattern of a double is monotone in its magnitude, so adding a random remainder and cutting the tail
    # rounds the magnitude stochastically, carries into the exponent included.
    rounded = bits.bitwise_and_(mask).add_(x.view(torch.int64)).bitwise_and_(~mask).view(torch.float64)
    if uniform is None:
        return rounded.masked_fill_(rounded.abs() < SMALLEST_NORMAL, 0.0)
    subnormal = torch.floor(x / FP16_QUANTUM + uniform) * FP16_QUANTUM
    return torch.where(x.abs() < FP16_SMALLEST_NORMAL, subnormal, rounded)


def blur(x: Tensor, seeds: Tensor) -> Tensor:
    """Disturb float64 ``x`` by up to a unit in the last place of float32, as the difference of two roundings does.

    A stochastic rounding has that variance on average over remainders. Where ``x`` is next to a float32 number, it errs by almost nothing
    in most members and by a whole unit in few or none. A float32 number itself stays as it is.
    """
    mask = (1 << (FLOAT64_BITS - SIGNIFICAND_BITS["fp32"])) - 1
    x = x.contiguous()
    bits, pattern = hash_bits(x, seeds), x.view(torch.int64)
    noise = (bits & mask) + ((bits >> BLUR_SHIFT) & mask) - mask
    return flush(torch.where(pattern & mask == 0, pattern, pattern + noise).view(torch.float64))


def flush(x: Tensor) -> Tensor:
    """Set what is below float32's smallest normal number to zero, as GPUs may: what it is multiplied by later may be large."""
    return torch.where(x.abs() < SMALLEST_NORMAL, torch.zeros_like(x), x)


def disturb(x: Tensor, drawn: Tensor, levels: Tensor, size: float) -> Tensor:
    """Multiply ``x [R, ...]`` by ``1 + size levels (2 drawn - 1)``, flushed where the level ``[R]`` of a member is not 0."""
    if fast := _loops_for(x):
        return fast.disturb(x, drawn, levels, size)  # type: ignore[no-any-return]
    levels = levels.reshape(-1, *[1] * (x.dim() - 1))
    disturbed = x.contiguous() * (1 + size * ((2 * drawn - 1) * levels))
    return torch.where(levels > 0, flush(disturbed), disturbed)


def truncate(x: Tensor, fmt: str) -> Tensor:
    """Cut float64 ``x`` to the significand of ``fmt``, as a tensor core may do with tf32 operands."""
    mask = (1 << (FLOAT64_BITS - SIGNIFICAND_BITS[fmt])) - 1
    return (x.contiguous().view(torch.int64) & ~mask).view(torch.float64)


def round_to_nearest(x: Tensor, fmt: str) -> Tensor:
    """Round float64 ``x`` to the significand of ``fmt``, ties to even, as processors do."""
    dropped = FLOAT64_BITS - SIGNIFICAND_BITS[fmt]
    mask, bits = (1 << dropped) - 1, x.contiguous().view(torch.int64)
    rounded = ((bits + (mask >> 1) + ((bits >> dropped) & 1)) & ~mask).view(torch.float64)
    if fmt != "fp16":
        return flush(rounded)
    return torch.where(x.abs() < FP16_SMALLEST_NORMAL, torch.round(x / FP16_QUANTUM) * FP16_QUANTUM, rounded)


class Rounder:
    """The rounding rules of one group of members; every hook rounds the cotangent too.

    Parameters
    ----------
    first_seed, count
        Seeds of the members on the leading axis.
    device
        Where the tensors live.
    mode
        ``stochastic``; or one deterministic member: ``nearest`` rounds as processors do, ``truncate`` cuts tf32 operands and rounds
        nothing else.
    """

    def __init__(self, first_seed: int, count: int, device: torch.device, mode: Mode = "stochastic") -> None:
        self.first_seed, self.count, self.device, self.mode = first_seed, count, device, mode

    def raw(self, x: Tensor, fmt: str | None) -> Tensor:
        """Round outside of the derivative graph; ``None`` leaves ``x`` alone."""
        if fmt is None:
            return x
        if self.mode == "truncate":
            return truncate(x, fmt) if fmt == "tf32" else x
        if self.mode == "nearest":
            return round_to_nearest(x, fmt)
        if fast := _loops_for(x):
            return fast.round_stochastically(x, fmt, self.first_seed)  # type: ignore[no-any-return]
        return round_stochastically(x, fmt, member_seeds(self.first_seed, self.count, x.dim(), self.device))

    def round(self, x: Tensor, fmt: str | None) -> Tensor:
        """Round ``x``, and its cotangent to the same format."""
        return x if fmt is None else _RoundBothWays.apply(x, fmt, self)  # type: ignore[no-untyped-call]

    def partial_sum(self, x: Tensor) -> Tensor:
        """Disturb a partial sum as a rounding to float32 may, whatever the order it was summed in; round its cotangent to float32.

        The remainder that is rounded away is a matter of the order of summation: its error is that of any remainder, not that of this one.
        """
        return _PartialSum.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]

    def matmul(self, a: Tensor, b: Tensor, fmt: str | None) -> Tensor:
        """Multiply with operands rounded to ``fmt`` and fp32 accumulation, forward and backward."""
        return _RoundedMatmul.apply(a, b, fmt, self)  # type: ignore[no-any-return,no-untyped-call]

    def accumulate(
        self, product: Tensor, sum_of_squares: Tensor, num_terms: int, square_of_sums: Tensor | None = None
    ) -> Tensor:
        """Add the noise of an fp32 accumulation of ``num_terms`` products, then round to fp32.

        The standard deviation is ``0.4 u32 sqrt(n / 2) sqrt(sum (ab)^2 + S^2)`` with ``S`` the total: partial sums grow like a random
        walk towards it, each is rounded once, and 0.4 is between the uniform rounding error's 0.29 and its bound 0.5.

        Parameters
        ----------
        square_of_sums
            ``S^2``; ``None`` means that of ``product``.
        """
        if self.mode != "stochastic":
            return self.raw(product, "fp32")
        square_of_sums = product**2 if square_of_sums is None else square_of_sums
        size = ACCUMULATION * U32 * (num_terms / 2) ** 0.5
        noise_seed = self.first_seed + ACCUMULATION_SEED
        if fast := _loops_for(product):
            return fast.accumulate(product, sum_of_squares, square_of_sums, size, self.first_seed, noise_seed)  # type: ignore[no-any-return]
        deviation = size * (sum_of_squares + square_of_sums).sqrt()
        seeds = member_seeds(noise_seed, self.count, product.dim(), self.device)
        uniform = uniform_from(hash_bits(product, seeds))
        return self.raw(product + deviation * UNIFORM_TO_UNIT_VARIANCE * (uniform - 0.5), "fp32")

    def exact_matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply already rounded operands with fp32 accumulation, outside of the derivative graph.

        Hardware and libraries sum in interleaved lanes. Where signs alternate, as they do in the inverse of nearly identical keys, each
        lane grows while the total does not; so ``S^2`` is twice the squares of the even and of the odd sum, which is the square of the
        total where the two agree and more where they cancel.
        """
        even = a[..., ::2] @ b[..., ::2, :]
        odd = a[..., 1::2] @ b[..., 1::2, :]
        return self.accumulate(even + odd, (a * a) @ (b * b), a.shape[-1], 2 * (even**2 + odd**2))


class _RoundBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: str, rounder: Rounder) -> Tensor:  # noqa: ANN401
        ctx.fmt, ctx.rounder = fmt, rounder
        return rounder.raw(x, fmt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return ctx.rounder.raw(grad, ctx.fmt), None, None


class _PartialSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounder: Rounder) -> Tensor:  # noqa: ANN401
        ctx.rounder = rounder
        if rounder.mode != "stochastic":
            return rounder.raw(x, "fp32")
        if fast := _loops_for(x):
            return fast.blur(x, rounder.first_seed)  # type: ignore[no-any-return]
        return blur(x, member_seeds(rounder.first_seed, rounder.count, x.dim(), x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return ctx.rounder.raw(grad, "fp32"), None


class _RoundedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, fmt: str | None, rounder: Rounder) -> Tensor:  # noqa: ANN401
        a, b = rounder.raw(a, fmt), rounder.raw(b, fmt)
        ctx.save_for_backward(a, b)
        ctx.fmt, ctx.rounder = fmt, rounder
        return rounder.exact_matmul(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        a, b = ctx.saved_tensors
        grad = ctx.rounder.raw(grad, ctx.fmt)
        grad_a = ctx.rounder.exact_matmul(grad, b.transpose(-1, -2))
        grad_b = ctx.rounder.exact_matmul(a.transpose(-1, -2), grad)
        return grad_a, grad_b, None, None


class Exact:
    """A rounder that leaves everything alone, for members whose noise is added elsewhere."""

    def raw(self, x: Tensor, fmt: str | None) -> Tensor:
        """Return ``x``."""
        del fmt
        return x

    def round(self, x: Tensor, fmt: str | None) -> Tensor:
        """Return ``x``."""
        del fmt
        return x

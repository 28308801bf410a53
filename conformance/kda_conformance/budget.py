"""The error budget of one call: how far a correct computation in a declared arithmetic may be from the truth.

For every element of every output and gradient the budget holds the certified float64 value and a variance

    s^2 = pool(rms over groups of mean e_r^2)  of 24 chunkwise members   + pool(mean e_r^2)  over 6 noisy float32 recurrences
        + e_coherent^2      one exact run with shifted gate + (0.4 u32 sqrt(n/2))^2 times the squares of the last dot product
        + (certified bound + smallest normal)^2             + e_truncated^2   eight runs, where operands are truncated
        + the noise of a chunkwise reverse cumulative sum   for the gradient of the gate

Derivations, measured false alarms and separations: ``docs/numerics.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from kda_reference import certified_kda, certified_kda_vjp
from torch.nn.functional import avg_pool1d

from kda_conformance.arithmetic import U32, U64, Arithmetic
from kda_conformance.cumulative_sum import cumulative_sum_variance
from kda_conformance.members import FIRST_SEED, Members
from kda_conformance.rounding import ACCUMULATION, Rounder

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor


class Group(NamedTuple):
    """Chunkwise members of one make.

    Attributes
    ----------
    chunk, size
        Tokens of a chunk, and how many members there are.
    throughout
        Whether every product takes rounded operands, as long as they are of the class's format.
    exact_inverse
        Whether the inverse is made without rounding and rounded where it is used. Made from rounded blocks it undoes in later rows what
        earlier ones got wrong, so that the same rounding shows only in the other kind.
    residual
        Whether pseudo-values are made from the residual ``v - (E k) S``, as :class:`Arithmetic` says.
    """

    chunk: int
    size: int
    throughout: bool = False
    exact_inverse: bool = False
    residual: bool = False

    def choose(self, arithmetic: Arithmetic) -> Arithmetic:
        """Return what the members of the group compute in."""
        chosen = arithmetic.throughout() if self.throughout else arithmetic
        return replace(
            chosen, residual=self.residual, merge_operand=None if self.exact_inverse else chosen.merge_operand
        )


# Where a chunk begins and ends is the implementation's choice, and decides which errors cancel: 48 and 80 share few ends with the others.
# Which products take rounded operands is its choice too. The error of an exact inverse that is rounded may be one number for all of a
# token's channels, so that its members alone tell how large it is: those are more. A residual errs most where chunks
# are short: later in a longer one, decayed keys are smaller.
GROUPS = (
    Group(16, 3),
    Group(32, 2, exact_inverse=True, residual=True),
    Group(48, 2),
    Group(48, 2, throughout=True, residual=True),
    Group(64, 6, exact_inverse=True),
    Group(80, 4, exact_inverse=True),
    Group(80, 2, throughout=True),
    Group(128, 2),
)
NEAREST_CHUNKS = (16, 64, 128)
TRUNCATED_CHUNKS = (16, 48, 64, 128)
NUM_CHUNKWISE = sum(group.size for group in GROUPS)
SMOOTHING_WIDTH = 17
# How much finer than the deviation of correct computations the reference has to be.
FINER = 4.0
# What share of the largest number that goes into a state the reference may be off by in any case: a float32 rounding of that number is
# 65 thousand times as large. A state that decayed to nothing has no deviation to compare with, and its bound decays by the slowest channel.
NEGLIGIBLE = 2.0**-40
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
INPUT_DTYPE_TENSORS = ("o", "dq", "dk", "dv")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBudget:
    """What one tensor may be.

    Attributes
    ----------
    value
        Certified float64 value.
    variance
        ``s^2`` per element.
    gain_rms
        Root mean square, over the members, of the relative error along ``w = value / s^2``.
    strict_variance
        ``variance`` without the allowance for a cumulative sum, which only ``dg`` and its reductions have.
    """

    value: Tensor
    variance: Tensor
    gain_rms: float
    strict_variance: Tensor


Budget = dict[str, TensorBudget]


def compute_budget(inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None, arithmetic: Arithmetic) -> Budget:
    """Compute the budget of ``(o, final_state)`` and, given a cotangent, of every gradient.

    Parameters
    ----------
    inputs
        The call, exactly as the implementation under test receives it.
    do, dfinal_state
        Cotangents of the outputs; both ``None`` means outputs only.
    arithmetic
        The declared arithmetic class.

    Raises
    ------
    CertificateError
        If the reference's own error may be more than a quarter of the deviation that correct computations show, the float32 one for
        fp64, and not negligible beside what goes into a state: then nothing can be judged with it.
    """
    inputs = inputs.replace(output_final_state=True)
    members = Members(inputs, do, dfinal_state)
    certified = (
        certified_kda_vjp(inputs, do, dfinal_state, dot_norms=True) if members.backward else certified_kda(inputs)
    )
    device = inputs.q.device
    chunkwise = [
        members.chunkwise(
            Rounder(FIRST_SEED + 16 * number, group.size, device),
            group.choose(arithmetic),
            group.chunk,
        )
        for number, group in enumerate(GROUPS)
    ]
    recurrences = members.recurrences()
    extra = cumulative_sum_variance(members) if members.backward else {}
    # Truncation errs one way, and how far depends on what is truncated alike: every choice counts in full.
    gentle = replace(arithmetic, diagonal_operand=None, merge_operand=None)
    choices = (arithmetic, gentle) if arithmetic.truncates else ()
    truncated = [
        members.chunkwise(Rounder(0, 1, device, "truncate"), choice, chunk)
        for chunk in TRUNCATED_CHUNKS
        for choice in choices
    ]
    rounds_operands = arithmetic.operand in ("bf16", "fp16")
    nearest = [
        members.chunkwise(Rounder(0, 1, device, "nearest"), arithmetic, chunk)
        for chunk in (NEAREST_CHUNKS if rounds_operands else ())
    ]
    unit = U64 / U32 if arithmetic.name == "fp64" else 1.0
    kappa = ACCUMULATION * U32 * (inputs.k.shape[-1] / 2) ** 0.5
    zero = torch.zeros((), dtype=torch.float64, device=device)
    budget: Budget = {}
    for name, value in certified.value.items():
        if name not in recurrences:
            continue
        errors = torch.cat([group[name] - value for group in chunkwise])
        noisy = recurrences[name][:-1] - value
        shifted = recurrences[name][-1] - value
        cut = [member[name][0] - value for member in truncated]
        # An error that one alignment alone makes counts for more than its share of the members.
        by_group = torch.stack([((group[name] - value) ** 2).mean(0) for group in chunkwise])
        spread = (
            _pool(name, by_group.square().mean(0).sqrt()) + _pool(name, (noisy**2).mean(0)) + _pool(name, shifted**2)
        )
        if cut:
            spread = spread + _pool(name, torch.stack(cut).square().sum(0))
        spread = spread + (kappa * certified.dot_norm.get(name, zero)) ** 2
        dtype = inputs.q.dtype if name in INPUT_DTYPE_TENSORS or arithmetic.name == "fp64" else torch.float32
        if spread.numel():
            certified.demand(name, float(spread.max()) ** 0.5 / FINER + _negligible(name, inputs, do, dfinal_state))
        spread = unit**2 * spread
        # What underflows at every token adds up along the sequence; a float16 output underflows once.
        smallest = SMALLEST[dtype] * (1 if dtype == torch.float16 else max(1, inputs.q.shape[1]))
        strict = (spread + (certified.bound[name] + smallest) ** 2).clamp(min=SMALLEST[torch.float64])
        entry = TensorBudget(value=value, variance=strict, gain_rms=0.0, strict_variance=strict)
        if name in extra:
            entry = replace(entry, variance=strict + unit**2 * extra[name])
        to_nearest = [member[name][0] - value for member in nearest]
        gain = _gain_rms(entry, certified.bound[name], torch.cat([errors, noisy]), to_nearest, [shifted, *cut], unit)
        budget[name] = replace(entry, gain_rms=gain)
    return budget


def _negligible(name: str, inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None) -> float:
    """Return the error of the reference that hides nothing, even where the tensor has decayed to nothing."""
    sources = {"final_state": (inputs.v, inputs.initial_state), "dinitial_state": (do, dfinal_state)}.get(name, ())
    largest = max((float(x.abs().max()) for x in sources if x is not None and x.numel()), default=0.0)
    return SMALLEST[torch.float32] + NEGLIGIBLE * largest


def _pool(name: str, x: Tensor) -> Tensor:
    """Shrink a mean square of few samples half way to a smooth model, so that no element is trusted by luck.

    The model is rank one over (tokens, channels) of each head; ``dbeta`` has no channels and is smoothed along tokens.
    """
    if x.numel() == 0 or name == "dA_log":
        return x
    if name == "dbeta":
        smooth = avg_pool1d(x.transpose(1, 2), SMOOTHING_WIDTH, 1, SMOOTHING_WIDTH // 2, count_include_pad=False)
        return 0.5 * (x + smooth.transpose(1, 2))
    if name == "ddt_bias":
        return 0.5 * (x + x.mean())
    axes = (2, 3) if name in ("final_state", "dinitial_state") else (1, 3)
    row, column = x.mean(axes[1], keepdim=True), x.mean(axes[0], keepdim=True)
    mean = x.mean(axes, keepdim=True).clamp(min=SMALLEST[torch.float64])
    return 0.5 * (x + row / mean.sqrt() * (column / mean.sqrt()))


def _gain_rms(
    entry: TensorBudget,
    bound: Tensor,
    members: Tensor,
    to_nearest: list[Tensor],
    systematic: list[Tensor],
    unit: float,
) -> float:
    direction = entry.value / entry.variance
    length = float((entry.value * direction).sum())
    if length == 0:
        return 0.0
    squares = [
        [(float((error * direction).sum()) / length) ** 2 for error in group]
        for group in (members, to_nearest, systematic)
    ]
    # To the nearest, a row times a decay close to one is the row again, whatever the element: an error that all share, where random
    # rounding averages it away. Each such run is what a correct implementation may be; of a stored state the shortest chunks lose most.
    random = max(sum(squares[0]) / NUM_CHUNKWISE, *squares[1], 0.0)
    square = unit**2 * (random + sum(squares[2]))
    square += (float(((entry.variance - entry.strict_variance) * direction**2).sum()) ** 0.5 / length) ** 2
    reference = float((bound * direction.abs()).sum()) / length
    return float(square**0.5 + reference)

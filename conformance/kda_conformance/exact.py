"""Calls whose arithmetic is exact in every dtype, so that any correct implementation must agree bit for bit.

One-hot queries and keys, zero log decay, beta in {0, 1}, integers in v and S_0, scale a power of two: every intermediate of any chunk
size and order is an integer that the claimed arithmetic holds. What is written is the difference of two such integers, which takes every
bit of an operand: one that is rounded to a coarser format shows at once, where a budget sees it only among all other roundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from kda_reference import KdaInputs

from kda_conformance.arithmetic import CLASSES, SIGNIFICAND_BITS
from kda_conformance.cases import Case, move
from kda_conformance.claims import DTYPES
from kda_conformance.judge import SIGNIFICAND
from kda_conformance.regimes import Draw
from kda_conformance.subject import Call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kda_conformance.arithmetic import Arithmetic
    from kda_conformance.claims import Claims

# Sums of all of a call's differences, in any order, are to be exact in float32.
MOST_BITS = 16
SIZES = ((20, 1, 1, 8, 8), (70, 1, 2, 16, 24), (130, 2, 2, 16, 16), (64, 1, 1, 32, 17))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactProblem:
    """A call and its result, both exact."""

    call: Call
    inputs: KdaInputs
    o: Tensor
    final_state: Tensor


def problems(dtype: str, device: str, claims: Claims, seed: int) -> Iterator[ExactProblem]:
    """Yield exact problems within the claims, in the draw of a number."""
    for number, (length, heads, value_heads, k_width, v_width) in enumerate(SIZES):
        # K = 16 makes the default scale 1/4, a power of two, for implementations that take no scale.
        if not claims.scale:
            k_width = 16  # noqa: PLW2901
        if value_heads != heads and not claims.grouped_values:
            value_heads = heads  # noqa: PLW2901
        case = Case(
            T=(length,), H=heads, G=value_heads, K=k_width, V=v_width, seed=number, scale=0.25 if claims.scale else 0.0
        ).redrawn(seed)
        if case.unclaimed(claims) not in (None, "initial_state"):
            continue
        largest = largest_integer(dtype, CLASSES[claims.precision[dtype]])
        yield _problem(case, dtype, device, largest, with_state=claims.initial_state)


def largest_integer(dtype: str, arithmetic: Arithmetic) -> int:
    """Return the largest integer such that inputs and operands hold the difference of any two up to it."""
    operand_bits = SIGNIFICAND_BITS[arithmetic.operand or arithmetic.storage]
    return (1 << min(operand_bits, SIGNIFICAND[DTYPES[dtype]], MOST_BITS) - 1) - 1


def _problem(case: Case, dtype: str, device: str, largest: int, *, with_state: bool) -> ExactProblem:
    draw, length = Draw(case.seed), case.num_tokens
    q_index, k_index = ((draw.uniform((length, case.H)) * case.K).long() for _ in range(2))
    v_TGV = (draw.uniform((length, case.G, case.V)) * (2 * largest + 1)).floor() - largest
    beta_TG = (draw.uniform((length, case.G)) < 0.6).double()  # noqa: PLR2004 - share of writes
    state_GKV = (draw.uniform((case.G, case.K, case.V)) * (2 * largest + 1)).floor() - largest
    if not with_state:
        state_GKV = torch.zeros_like(state_GKV)
    torch_dtype = DTYPES[dtype]
    wide = torch.float64 if torch_dtype == torch.float64 else torch.float32
    identity = torch.eye(case.K, dtype=torch.float64)
    inputs = KdaInputs(
        q=identity[q_index][None].to(torch_dtype),
        k=identity[k_index][None].to(torch_dtype),
        v=v_TGV[None].to(torch_dtype),
        g=torch.zeros(1, length, case.G, case.K, dtype=wide),
        beta=beta_TG[None].to(wide),
        initial_state=state_GKV[None].to(wide) if with_state else None,
        scale=case.scale or None,
    )
    # A one-hot key with beta 1 replaces a row of the state by v; beta 0 leaves it. Nothing else ever happens.
    group, state, outputs = case.G // case.H, state_GKV.clone(), []
    for t in range(length):
        for head in range(case.G):
            if beta_TG[t, head]:
                state[head, k_index[t, head // group]] = v_TGV[t, head]
        outputs.append(
            torch.stack([state[head, q_index[t, head // group]] for head in range(case.G)]) * inputs.effective_scale
        )
    return ExactProblem(
        call=Call(case, dtype),
        inputs=move(inputs, device),
        o=torch.stack(outputs)[None].to(device),
        final_state=state[None].to(device),
    )

"""Calls whose arithmetic is exact in every dtype, so that any correct implementation must agree bit for bit.

One-hot queries and keys, zero log decay, beta in {0, 1}, small integers in v and S_0, scale a power of two: every intermediate of any chunk
size, order and precision is an integer that bfloat16 holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from kda_reference import KdaInputs

from kda_conformance.cases import Case, move
from kda_conformance.claims import DTYPES
from kda_conformance.regimes import Draw
from kda_conformance.subject import Call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kda_conformance.claims import Claims

LARGEST_INTEGER = 7
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
        yield _problem(case, dtype, device, with_state=claims.initial_state)


def _problem(case: Case, dtype: str, device: str, *, with_state: bool) -> ExactProblem:
    draw, length = Draw(case.seed), case.num_tokens
    q_index, k_index = ((draw.uniform((length, case.H)) * case.K).long() for _ in range(2))
    v_TGV = (draw.uniform((length, case.G, case.V)) * (2 * LARGEST_INTEGER + 1)).floor() - LARGEST_INTEGER
    beta_TG = (draw.uniform((length, case.G)) < 0.6).double()  # noqa: PLR2004 - share of writes
    state_GKV = (draw.uniform((case.G, case.K, case.V)) * (2 * LARGEST_INTEGER + 1)).floor() - LARGEST_INTEGER
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

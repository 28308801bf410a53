"""How one tensor is judged where its dtype ends."""

from __future__ import annotations

import math

import pytest
import torch
from kda_conformance.budget import TensorBudget
from kda_conformance.judge import judge

INFINITY = math.inf


def score(got: float, value: float, *, dtype: torch.dtype = torch.float16, deviation: float = 50.0) -> float:
    """Return the score of a gradient of 16 numbers, one of them ``got`` where ``value`` is right, the others right."""
    truth = torch.arange(1.0, 17.0, dtype=torch.float64)
    truth[3] = value
    found = truth.to(dtype)
    found[3] = got
    variance = torch.full_like(truth, deviation**2)
    shape = (1, 1, 1, 16)
    allowed = TensorBudget(
        value=truth.reshape(shape),
        variance=variance.reshape(shape),
        gain_rms=1e-3,
        strict_variance=variance.reshape(shape),
    )
    return judge("dk", found.reshape(shape), allowed).score


@pytest.mark.parametrize(
    ("got", "value"), [(INFINITY, 7e4), (-INFINITY, -7e4), (INFINITY, 65300.0), (65504.0, 7e4), (INFINITY, INFINITY)]
)
def test_infinity_is_right_where_the_dtype_ends(got: float, value: float) -> None:
    assert score(got, value) < 1


@pytest.mark.parametrize(
    ("got", "value"), [(INFINITY, 6e4), (-INFINITY, 7e4), (INFINITY, 1.0), (math.nan, 7e4), (6e4, 7e4)]
)
def test_what_is_not_beyond_the_dtype_is_judged_as_ever(got: float, value: float) -> None:
    assert score(got, value) > 1
    assert math.isfinite(got) or score(got, value) == INFINITY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_wider_exponents_end_elsewhere(dtype: torch.dtype) -> None:
    assert score(INFINITY, 7e4, dtype=dtype) == INFINITY

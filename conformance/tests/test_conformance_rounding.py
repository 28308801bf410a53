"""Roundings: those of a processor, and one result whether loops over numbers make it or tensor operations."""

from __future__ import annotations

import pytest
import torch
from kda_conformance import rounding
from kda_conformance.arithmetic import DTYPE_OF_FORMAT, SIGNIFICAND_BITS
from kda_conformance.ensemble import NoisyFloat32
from kda_conformance.rounding import Rounder

MEMBERS = 3
NEEDS_NUMBA = pytest.mark.skipif(rounding.loops is None, reason="Numba is not installed")


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "fp32"])
def test_rounding_to_nearest_is_that_of_the_processor(fmt: str) -> None:
    draw = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    halfway = 1 + torch.arange(40, dtype=torch.float64) * 2.0 ** -SIGNIFICAND_BITS[fmt]
    x = torch.cat([draw, draw * 2.0**-16, halfway, -halfway, torch.zeros(1)])
    assert torch.equal(rounding.round_to_nearest(x, fmt), x.to(DTYPE_OF_FORMAT[fmt]).double())


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Return numbers of all magnitudes, transposed in memory, zeros, infinities and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    x, exponent = torch.randn(2, MEMBERS, *shape, generator=generator, dtype=torch.float64)
    x = torch.ldexp(x, 60 * exponent)
    special = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 5e-324, -1e-310, 2.0**-126, 2.0**-14, 65504.0)
    x.view(MEMBERS, -1)[:, : len(special)] = torch.tensor(special, dtype=torch.float64)
    return x.mT


def assert_same_bits(loops: torch.Tensor, operations: torch.Tensor) -> None:
    assert loops.stride() == operations.stride()
    assert torch.equal(loops.view(torch.int64), operations.view(torch.int64))


@NEEDS_NUMBA
@pytest.mark.parametrize("shape", [(40, 30), (0, 4), (2, 5, 7)])
@pytest.mark.parametrize("fmt", sorted(SIGNIFICAND_BITS))
def test_loops_round_as_tensor_operations_do(fmt: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(3, *shape) if 0 not in shape else torch.empty(MEMBERS, *shape, dtype=torch.float64)
    rounder = Rounder(900, MEMBERS, x.device)
    in_loops = rounder.raw(x, fmt)
    monkeypatch.setattr(rounding, "loops", None)
    assert_same_bits(in_loops, rounder.raw(x, fmt))


@NEEDS_NUMBA
def test_loops_blur_as_tensor_operations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rounder = drawn(7, 12, 9), Rounder(900, MEMBERS, torch.device("cpu"))
    in_loops = rounder.partial_sum(x)
    monkeypatch.setattr(rounding, "loops", None)
    operations = rounder.partial_sum(x)
    assert torch.equal(in_loops.isnan(), operations.isnan())
    assert torch.equal(in_loops.nan_to_num(), operations.nan_to_num())


@NEEDS_NUMBA
def test_loops_accumulate_as_tensor_operations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    product, squares = torch.randn(2, MEMBERS, 5, 40, generator=generator, dtype=torch.float64)
    rounder = Rounder(900, MEMBERS, product.device)
    in_loops = rounder.accumulate(product, squares**2, 64)
    assert not torch.equal(in_loops, rounder.raw(product, "fp32"))
    monkeypatch.setattr(rounding, "loops", None)
    assert_same_bits(in_loops, rounder.accumulate(product, squares**2, 64))


@NEEDS_NUMBA
def test_loops_disturb_as_tensor_operations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(5, 12, 9)
    levels = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    in_loops = NoisyFloat32(levels, seed=6).disturb(x, 2.0**-24)
    assert_same_bits(in_loops[-1], x[-1].contiguous())
    monkeypatch.setattr(rounding, "loops", None)
    assert_same_bits(in_loops, NoisyFloat32(levels, seed=6).disturb(x, 2.0**-24))


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "fp32"])
def test_stochastic_rounding_goes_to_either_neighbour_and_is_right_on_average(fmt: str) -> None:
    step, count = 2.0 ** (1 - SIGNIFICAND_BITS[fmt]), 4000
    x = torch.full((count, 1), 1 + 0.25 * step, dtype=torch.float64)
    rounded = Rounder(0, count, x.device).raw(x, fmt)
    assert set(rounded.flatten().tolist()) == {1.0, 1.0 + step}
    assert abs(float((rounded - 1).mean() / step) - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5


@pytest.mark.parametrize("remainder", [2.0**-10, 0.15, 0.5])
def test_a_partial_sum_errs_by_as_much_whatever_its_remainder(remainder: float) -> None:
    step, count = 2.0**-23, 4000
    x = torch.full((count, 1), 397 + 256 * step * remainder, dtype=torch.float64)
    error = (Rounder(0, count, x.device).partial_sum(x) - x) / (256 * step)
    assert float(error.abs().max()) <= 1
    assert abs(float(error.mean())) < 5 * (1 / 6 / count) ** 0.5
    assert abs(float(error.square().mean()) * 6 - 1) < 0.1


def test_a_partial_sum_that_float32_holds_has_no_error() -> None:
    x = (-5.0 * torch.arange(64, dtype=torch.float64)).expand(MEMBERS, 64)
    assert torch.equal(Rounder(900, MEMBERS, x.device).partial_sum(x), x)

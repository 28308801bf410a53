"""The repaired interpreter computes bfloat16 as a GPU does; where Triton compiles there is nothing to repair."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kda_optimized import interpreter

pytestmark = pytest.mark.skipif(
    not interpreter.is_interpreted(), reason="Triton compiles here; only its interpreter is repaired"
)


@triton.jit
def arithmetic_kernel(a, b, total, product, difference, root, larger, less, N: tl.constexpr):
    o = tl.arange(0, N)
    b_a = tl.load(a + o)
    b_b = tl.load(b + o)
    tl.store(total + o, b_a + b_b)
    tl.store(product + o, b_a * b_b)
    tl.store(difference + o, b_a - b_b)
    tl.store(root + o, tl.sqrt(tl.abs(b_a).to(tl.float32)).to(tl.bfloat16))
    tl.store(larger + o, tl.maximum(b_a, b_b))
    tl.store(less + o, (b_a < b_b).to(tl.int32))


@triton.jit
def reduce_kernel(a, total, largest, smallest, running, N: tl.constexpr):
    o = tl.arange(0, N)
    b_a = tl.load(a + o)
    tl.store(total, tl.sum(b_a, axis=0))
    tl.store(largest, tl.max(b_a, axis=0))
    tl.store(smallest, tl.min(b_a, axis=0))
    tl.store(running + o, tl.cumsum(b_a, axis=0))


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)
    o_ij = o[:, None] * N + o[None, :]
    tl.store(c + o_ij, tl.dot(tl.load(a + o_ij), tl.load(b + o_ij), input_precision=PRECISION))


@triton.jit
def bounded_kernel(a, c, bound):
    b_s = 0.0
    for i in range(tl.load(bound)):
        b_s += tl.load(a + i)
    tl.store(c, b_s)


@triton.jit
def constants_kernel(x, c, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(x + o)
    # Rows and columns meet a scalar here, twice: what was worked out at first is used again.
    for i in range(2):
        b_table = tl.where(o[:, None] < o[None, :], b_x[:, None] * 2.0, b_x[None, :] * i)
        b_table += tl.where(o[:, None] == i, True + b_x[:, None], 1 + b_x[None, :])
        tl.store(c + i * N * N + o[:, None] * N + o[None, :], b_table)


def pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, generator=generator).bfloat16(), torch.randn(n, generator=generator).bfloat16()


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties]).view(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    found = torch.from_numpy(interpreter.decode(interpreter.encode(values)))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(nan=0.0), expected.float().nan_to_num(nan=0.0))


def test_bfloat16_arithmetic_is_that_of_torch() -> None:
    a, b = pair(64)
    total, product, difference, root, larger = (torch.zeros(64, dtype=torch.bfloat16) for _ in range(5))
    less = torch.zeros(64, dtype=torch.int32)
    arithmetic_kernel[(1,)](a, b, total, product, difference, root, larger, less, N=64)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(difference, a - b)
    assert torch.equal(root, a.abs().float().sqrt().bfloat16())
    assert torch.equal(larger, torch.maximum(a, b))
    assert torch.equal(less.bool(), a < b)


def test_bfloat16_reductions_are_sums_of_values() -> None:
    a, _ = pair(64)
    total, largest, smallest = (torch.zeros(1, dtype=torch.bfloat16) for _ in range(3))
    running = torch.zeros(64, dtype=torch.bfloat16)
    reduce_kernel[(1,)](a, total, largest, smallest, running, N=64)
    assert torch.allclose(total.float(), a.float().sum(), rtol=2**-7)
    assert torch.equal(largest[0], a.max())
    assert torch.equal(smallest[0], a.min())
    assert torch.allclose(running.float(), a.float().cumsum(0), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_accumulate_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    c = torch.zeros(32, 32)
    dot_kernel[(1,)](a, b, c, N=32, PRECISION="ieee")
    assert torch.allclose(c, a.float() @ b.float(), rtol=0, atol=1e-5)


def test_tf32_products_lose_thirteen_bits() -> None:
    a = torch.full((16, 16), 1 + 2.0**-12)
    c = torch.zeros(16, 16)
    dot_kernel[(1,)](a, torch.eye(16), c, N=16, PRECISION="tf32")
    assert torch.equal(c, torch.ones(16, 16))


def test_loop_bounds_may_come_from_memory() -> None:
    a, c = torch.arange(5.0), torch.zeros(1)
    bounded_kernel[(1,)](a, c, torch.tensor([4]))
    assert c.item() == 6.0


def test_what_is_remembered_of_operands_is_right() -> None:
    n = 16
    x = torch.arange(1.0, n + 1)
    found = torch.empty(2, n, n)
    constants_kernel[(1,)](x, found, n)
    o = torch.arange(n)
    for i in range(2):
        expected = torch.where(o[:, None] < o[None, :], 2 * x[:, None], i * x[None, :])
        expected += torch.where((o == i)[:, None], x[:, None] + 1, x[None, :] + 1)
        assert torch.equal(found[i], expected)


def test_an_argument_that_a_kernel_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match=r"bounded_kernel must be given its own arguments.*taps"):
        bounded_kernel[(1,)](torch.ones(3), torch.empty(1), torch.tensor([3]), taps=4, num_warps=2)


def test_a_triton_without_the_places_to_repair_is_refused() -> None:
    with pytest.raises(ImportError, match=r"InterpreterBuilder\.cast_impl"):
        interpreter.require_hooks(SimpleNamespace())

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device functions for matrix products of float32 tiles, in one of two kinds of arithmetic.

``EXACT`` multiplies in float32 (float32 inputs). Otherwise the operands are rounded for the tensor cores, in whichever of three ways fits:

* *scaled*: each row of the left and each column of the right operand is divided by a power of two and rounded to float16,
  whose relative error, ``2^-11``, is an eighth of bfloat16's. The scale of a row is a function of that row alone, so it fits
  wherever the reduced axis is not time; any magnitude is allowed.
* *split*: each operand is the sum of two bfloat16 values, and three products are added; relative error about ``2^-16``. It
  needs no scale at all, so it fits a reduction over the tokens of a chunk, where a scale taken over the tokens would let a
  later token change the rounding of an earlier output, and where what one channel has kept may be far below the others.
* *tf32*: rounded to nearest, relative error ``2^-12``, with float32's range, which raised rows need.

Scaled rows fill the upper half of float16's range, so that an element loses accuracy only ``2^-28`` below the largest of its row.
"""

import triton
import triton.language as tl

EXPONENT_BITS = tl.constexpr(0x7F800000)
BITS_OF_LARGEST = tl.constexpr(0x7E800000)
BITS_OF_LEAST = tl.constexpr(0x07800000)
BITS_OF_HEADROOM = tl.constexpr(0x07000000)
UPPER_BITS = tl.constexpr(-65536)
HALF_OF_LOWER_BITS = tl.constexpr(0x8000)
HALF_OF_IGNORED_BITS = tl.constexpr(0x1000)
BITS_OF_ONE_TWICE = tl.constexpr(0x7F000000)


@triton.jit
def half_scale(b_x):
    """Return powers of two ``s`` and ``1 / s`` such that ``x / s`` lies in ``[2^14, 2^15)``, for ``x >= 0`` not below ``2^-112``."""
    b_e = tl.minimum(b_x.to(tl.int32, bitcast=True) & EXPONENT_BITS, BITS_OF_LARGEST)
    b_e = tl.maximum(b_e, BITS_OF_LEAST) - BITS_OF_HEADROOM
    return b_e.to(tl.float32, bitcast=True), (-(b_e - BITS_OF_ONE_TWICE)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_rows(b_x):
    """Return ``x`` ``[R, C]`` in float16 with each row divided by a power of two, and those powers ``[R]``."""
    b_s, b_r = half_scale(tl.max(tl.abs(b_x), axis=1))
    return (b_x * b_r[:, None]).to(tl.float16), b_s


@triton.jit
def scaled_columns(b_x):
    """Return ``x`` ``[R, C]`` in float16 with each column divided by a power of two, and those powers ``[C]``."""
    b_s, b_r = half_scale(tl.max(tl.abs(b_x), axis=0))
    return (b_x * b_r[None, :]).to(tl.float16), b_s


@triton.jit
def pair_product(b_a, b_b, EXACT: tl.constexpr):
    """Return ``a b^T`` of each of several pairs of float32 tiles ``[B, M, C]`` and ``[B, N, C]``, split.

    Where both are results of products, or elementwise functions of one, nothing leaves the registers of a warp.
    """
    return product_split(b_a, tl.permute(b_b, (0, 2, 1)), EXACT)


@triton.jit
def round_tf32(b_x):
    """Return what tensor cores read as the nearest tf32 value: they ignore the lower 13 bits."""
    return (b_x.to(tl.int32, bitcast=True) + HALF_OF_IGNORED_BITS).to(tl.float32, bitcast=True)


@triton.jit
def pair_product_tf32(b_a, b_b):
    """Return ``a b^T`` of each of several pairs of float32 tiles ``[B, M, C]`` and ``[B, N, C]``, in tf32."""
    return tl.dot(round_tf32(b_a), tl.permute(round_tf32(b_b), (0, 2, 1)), input_precision="tf32")


@triton.jit
def product_split(b_a, b_b, EXACT: tl.constexpr):
    """Return ``a b`` of float32 tiles, split."""
    if EXACT:
        b_o = tl.dot(b_a, b_b, input_precision="ieee")
    else:
        b_ah, b_al = split(b_a)
        b_bh, b_bl = split(b_b)
        b_o = dot_split(b_ah, b_al, b_bh, b_bl)
    return b_o


@triton.jit
def split(b_x):
    """Return two bfloat16 tiles whose sum is ``x`` to 16 bits: the nearest one and what is left, cut off; neither takes a conversion."""
    b_h = (b_x.to(tl.int32, bitcast=True) + HALF_OF_LOWER_BITS) & UPPER_BITS
    b_l = (b_x - b_h.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return upper_half(b_h), upper_half(b_l)


@triton.jit
def upper_half(b_bits):
    """Return the bfloat16 tile that the upper halves of float32 patterns are."""
    return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def dot_split(b_ah, b_al, b_bh, b_bl):
    """Return the product of two split operands, smallest terms first."""
    b_o = tl.dot(b_al, b_bh)
    b_o = tl.dot(b_ah, b_bl, b_o)
    return tl.dot(b_ah, b_bh, b_o)


@triton.jit
def store_planes(p_a, b_a, o_ij, PLANE: tl.constexpr, EXACT: tl.constexpr):
    """Write a float32 tile as an operand: as it is, or split into two planes ``PLANE`` elements apart."""
    if EXACT:
        tl.store(p_a + o_ij, b_a)
    else:
        b_h, b_l = split(b_a)
        tl.store(p_a + o_ij, b_h)
        tl.store(p_a + PLANE + o_ij, b_l)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device functions on a strip of 16 tokens held with its channels first, ``[W, BC, 16]``: slabs of BC channels, one to a warp.

In the last chunkwise kernel everything is a sum over tokens or over value channels, none over key channels. With channels first, a
strip is the left operand of all sums over its tokens, and results of products are laid out as left operands are: nothing leaves
the registers of a warp but matrices of pairs ``[16, 16]``, which all slabs share.
"""

import triton
import triton.language as tl

from kda_optimized.products import scaled_columns, split
from kda_optimized.strips import STRIP


@triton.jit
def load_channels(p_x, i_b, i_h, t_0, o_t, o_k, m_x, stride_b, stride_t, stride_h, stride_c):
    """Load ``[W, BC, 16]`` of a ``[B, T, heads, channels]`` tensor as it is, zero off the mask."""
    p_x += i_b * stride_b + i_h.to(tl.int64) * stride_h
    o_x = (t_0 + o_t)[None, None, :] * stride_t + o_k.to(tl.int64)[:, :, None] * stride_c
    return tl.load(p_x + o_x, mask=m_x, other=0.0)


@triton.jit
def as_product(b_x, EXACT: tl.constexpr):
    """Return ``[W, BC, 16]`` in float32, laid out as a product's result is: nothing is added, and what moves still has 16 bits."""
    b_y = b_x.to(tl.float32)
    if not EXACT:
        b_o = tl.zeros((b_x.shape[0], STRIP, STRIP), dtype=tl.bfloat16)
        b_y = tl.dot(tl.zeros_like(b_x).to(tl.bfloat16), b_o, b_y)
    return b_y


@triton.jit
def slab_product(b_a, b_b):
    """Return ``a b`` for ``a`` ``[W, BC, R]`` and ``b`` ``[R, 16]``, both in the operand dtype."""
    b_b = tl.broadcast_to(b_b[None, :, :], (b_a.shape[0], b_b.shape[0], b_b.shape[1]))
    return tl.dot(b_a, b_b, input_precision="ieee")


@triton.jit
def zero_product(W: tl.constexpr, EXACT: tl.constexpr):
    """Return zeros ``[W, 16, 16]`` laid out in registers as a product's result is.

    What is made from them takes over that layout, and the transpose of that is the layout of a right operand.
    """
    b_o = tl.zeros((W, STRIP, STRIP), dtype=tl.float32)
    if not EXACT:
        b_o = b_o.to(tl.bfloat16)
    return tl.dot(b_o, b_o, input_precision="ieee")


@triton.jit
def add_pairs(b_o, b_a, b_x, EXACT: tl.constexpr):
    """Return ``o + a x^T`` for float32 tiles ``a`` ``[W, BC, 16]`` and ``x`` ``[W, 16, 16]``, split."""
    if EXACT:
        b_o = tl.dot(b_a, tl.permute(b_x, (0, 2, 1)), b_o, input_precision="ieee")
    else:
        b_ah, b_al = split(b_a)
        b_xh, b_xl = split(b_x)
        b_xh = tl.permute(b_xh, (0, 2, 1))
        b_o = tl.dot(b_al, b_xh, b_o)
        b_o = tl.dot(b_ah, tl.permute(b_xl, (0, 2, 1)), b_o)
        b_o = tl.dot(b_ah, b_xh, b_o)
    return b_o


@triton.jit
def across_strips(b_rows, b_s, b_p, EXACT: tl.constexpr):
    """Return ``rows p`` for decayed rows of another strip ``[W, BC, 16]`` with the scales of its tokens, and gradients of pairs ``p``."""
    b_p = b_p * b_s[:, None]
    if EXACT:
        b_o = slab_product(b_rows, b_p)
    else:
        b_h, b_r = scaled_columns(b_p)
        b_o = slab_product(b_rows, b_h) * b_r[None, None, :]
    return b_o


@triton.jit
def add_tokens(b_o, b_x, m_tt, b_none, EXACT: tl.constexpr):
    """Return ``o`` and, for each row of the mask ``[16, 16]``, the sum of the tokens of ``x`` ``[W, BC, 16]`` that it selects.

    ``b_none`` is :func:`zero_product`.
    """
    b_m = tl.where(m_tt[None, :, :], 1.0, b_none)
    if EXACT:
        b_o = tl.dot(b_x, tl.permute(b_m, (0, 2, 1)), b_o, input_precision="ieee")
    else:
        b_h, b_l = split(b_x)
        b_m = tl.permute(b_m.to(tl.bfloat16), (0, 2, 1))
        b_o = tl.dot(b_h, b_m, tl.dot(b_l, b_m, b_o))
    return b_o


@triton.jit
def decays(b_g, m_tt, b_none, EXACT: tl.constexpr):
    """Return for each row of the mask the decay of the tokens that it selects, from log decays in bits."""
    return tl.exp2(add_tokens(tl.zeros_like(b_g), b_g, m_tt, b_none, EXACT))


@triton.jit
def decays_through(i_l, o_i, o_s):
    """Return whether token i's factor at level ``i_l`` decays through token s; see :func:`kda_optimized.chunks.tokens_between`."""
    return ((o_i >> i_l) == (o_s >> i_l)) & ((((o_i >> i_l) & 1) == 1) == (o_i >= o_s))


@triton.jit
def later_half(i_l, o_i, o_j):
    """Return whether tokens i and j are a pair of level ``i_l``, i the later; see :func:`kda_optimized.chunks.level_mask`."""
    return ((o_i >> i_l) == (o_j >> i_l) + 1) & (((o_i >> i_l) & 1) == 1)


@triton.jit
def neighbours(b_x):
    """Return the even and the odd tokens of ``[W, BC, 16]``, ``[W, BC, 8]`` each; a product's result has both in one lane."""
    return tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1], STRIP // 2, 2)))


@triton.jit
def beside(b_even, b_odd):
    """Return what :func:`neighbours` takes apart."""
    return tl.reshape(tl.join(b_even, b_odd), (b_even.shape[0], b_even.shape[1], STRIP))


@triton.jit
def neighbour_gradients(b_q, b_k, b_g, b_dP, b_dL):
    """Return what the pairs of an odd token with the even one before it, ``[8]``, give to the gradients of q, k and the log decay."""
    _, b_q = neighbours(b_q)
    b_k_even, b_k = neighbours(b_k)
    _, b_E = neighbours(tl.exp2(b_g))
    b_xq = b_E * b_dP[None, None, :]
    b_xk = b_E * b_dL[None, None, :]
    b_yq = b_xq * b_k_even
    b_yk = b_xk * b_k_even
    b_none = tl.zeros_like(b_yq)
    return beside(b_none, b_yq), beside(b_xk * b_k + b_xq * b_q, b_yk), beside(b_none, b_q * b_yq + b_k * b_yk)


@triton.jit
def unit_pullback(b_dy, b_y, b_r):
    """Return the gradient of x from that of ``y = r x``, with r its inverse norm ``[16]``."""
    b_c = tl.sum(tl.sum(b_y * b_dy, axis=1), axis=0)
    return b_r[None, None, :] * (b_dy - b_y * b_c[None, None, :])

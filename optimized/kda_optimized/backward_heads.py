# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Last backward kernel, where value heads share queries and keys, or programs a norm: gradients summed and carried through the norm."""

import triton
import triton.language as tl

from kda_optimized.chunks import locate_chunk


@triton.jit
def gather_heads(p_dy, p_x, o_x, m_tk, RATIO: tl.constexpr, K: tl.constexpr, USE_L2NORM: tl.constexpr):
    """Return the gradient of x from those of its normalised rows under each of ``RATIO`` value heads."""
    b_dy = tl.load(p_dy, mask=m_tk, other=0.0)
    for i_r in tl.static_range(1, RATIO):
        b_dy += tl.load(p_dy + i_r * K, mask=m_tk, other=0.0)
    if USE_L2NORM:
        b_x = tl.load(p_x + o_x, mask=m_tk, other=0.0).to(tl.float32)
        b_r = (1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) + 1e-6))[:, None]
        b_y = b_x * b_r
        b_dy = b_r * (b_dy - b_y * tl.sum(b_y * b_dy, axis=1)[:, None])
    return b_dy


@triton.jit(do_not_specialize=["T", "first_span"])
def kda_chunk_bwd_heads_kernel(
    q, k, dq_G, dk_G, dq, dk, span_table, first_span,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, USE_L2NORM: tl.constexpr,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr,
):  # fmt: skip
    """Sum gradients of normalised q and k, ``[spans, BT, G, K]``, over the value heads that read them, and carry them through the norm.

    One program per BR tokens of a span and query head.
    """
    RATIO: tl.constexpr = G // H
    i_h = tl.program_id(0) % H
    i_r = tl.program_id(0) // H % (BT // BR)
    i_p = tl.program_id(0) // H // (BT // BR)
    i_b, t_0, t_g, n_t = locate_chunk(first_span + i_p, span_table, T)
    o_r = i_r * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    m_tk = (o_r < n_t)[:, None] & (o_k < K)[None, :]
    o_t = (t_0 + o_r)[:, None]
    o_c = o_k.to(tl.int64)[None, :]
    o_g = ((i_p.to(tl.int64) * BT + o_r) * G + i_h * RATIO)[:, None] * K + o_k[None, :]
    o_h = ((t_g + o_r) * H + i_h)[:, None] * K + o_k[None, :]
    o_q = i_b * stride_qb + o_t * stride_qt + i_h.to(tl.int64) * stride_qh + o_c * stride_qk
    o_x = i_b * stride_kb + o_t * stride_kt + i_h.to(tl.int64) * stride_kh + o_c * stride_kk
    if HAS_DQ:
        tl.store(dq + o_h, gather_heads(dq_G + o_g, q, o_q, m_tk, RATIO, K, USE_L2NORM), mask=m_tk)
    if HAS_DK:
        tl.store(dk + o_h, gather_heads(dk_G + o_g, k, o_x, m_tk, RATIO, K, USE_L2NORM), mask=m_tk)

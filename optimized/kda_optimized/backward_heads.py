# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Last backward kernel, where value heads share queries and keys: their gradients summed and carried through the norm."""

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["T", "num_tokens"])
def kda_chunk_bwd_heads_kernel(
    q, k, dq_G, dk_G, dq, dk, stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk, T, num_tokens,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, USE_L2NORM: tl.constexpr,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr,
):  # fmt: skip
    """Sum gradients of normalised q and k over the value heads that read them, and carry them through the norm."""
    RATIO: tl.constexpr = G // H
    i_h = tl.program_id(0) % H
    o_r = (tl.program_id(0) // H).to(tl.int64) * BT + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_tk = (o_r < num_tokens)[:, None] & (o_k < K)[None, :]
    i_b = (o_r // T)[:, None]
    i_t = (o_r % T)[:, None]
    o_c = o_k.to(tl.int64)[None, :]
    o_g = (o_r * G + i_h * RATIO)[:, None] * K + o_k[None, :]
    o_h = (o_r * H + i_h)[:, None] * K + o_k[None, :]
    o_q = i_b * stride_qb + i_t * stride_qt + i_h.to(tl.int64) * stride_qh + o_c * stride_qk
    o_x = i_b * stride_kb + i_t * stride_kt + i_h.to(tl.int64) * stride_kh + o_c * stride_kk
    if HAS_DQ:
        tl.store(dq + o_h, gather_heads(dq_G + o_g, q, o_q, m_tk, RATIO, K, USE_L2NORM), mask=m_tk)
    if HAS_DK:
        tl.store(dk + o_h, gather_heads(dk_G + o_g, k, o_x, m_tk, RATIO, K, USE_L2NORM), mask=m_tk)

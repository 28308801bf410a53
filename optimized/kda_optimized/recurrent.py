# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The recurrence, one token at a time in float32 with the state on chip: for decoding and short calls [KL eq. 1].

S <- Diag(exp g) S         e = v - S^T k         S <- S + k (beta e)^T         o = scale S^T q
"""

import triton
import triton.language as tl

from kda_optimized.activations import gate_slope
from kda_optimized.token_rows import activated, load_token


@triton.jit(do_not_specialize=["T"])
def kda_recurrent_fwd_kernel(
    q, k, v, g, beta, A_log, dt_bias, initial_state, o, final_state, cu_seqlens,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_bb, stride_bt, stride_bh, stride_vb, stride_vt, stride_vh, stride_vv,
    stride_in, stride_ig, stride_ik, stride_iv, stride_fn, stride_fg, stride_fk, stride_fv, scale, lower_bound, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr, USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr,
):  # fmt: skip
    """Run along one sequence of one value head, for BV of its value channels."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = (tl.program_id(0) // NV // G).to(tl.int64)
    i_g = (tl.program_id(0) // NV % G).to(tl.int64)
    i_h = i_g // (G // H)
    t_g = tl.load(cu_seqlens + i_n)
    n_t = tl.load(cu_seqlens + i_n + 1) - t_g
    i_b = t_g // tl.maximum(T, 1)
    t_0 = t_g - i_b * T
    o_k = tl.arange(0, BK).to(tl.int64)
    o_v = (i_v * BV + tl.arange(0, BV)).to(tl.int64)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]

    b_S = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_INITIAL:
        p_s = initial_state + i_n * stride_in + i_g * stride_ig + o_k[:, None] * stride_ik + o_v[None, :] * stride_iv
        b_S += tl.load(p_s, mask=m_kv, other=0.0)
    b_A, b_slope = gate_slope(A_log, i_g, HAS_A_LOG)
    b_bias = tl.zeros((BK,), dtype=tl.float32)
    if HAS_DT_BIAS:
        b_bias += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    p_q = q + i_b * stride_qb + t_0 * stride_qt + i_h * stride_qh + o_k * stride_qk
    p_k = k + i_b * stride_kb + t_0 * stride_kt + i_h * stride_kh + o_k * stride_kk
    p_g = g + i_b * stride_gb + t_0 * stride_gt + i_g * stride_gh + o_k * stride_gk
    p_v = v + i_b * stride_vb + t_0 * stride_vt + i_g * stride_vh + o_v * stride_vv
    p_b = beta + i_b * stride_bb + t_0 * stride_bt + i_g * stride_bh
    p_o = o + (t_g * G + i_g) * V + o_v

    b_q, b_k, b_g, b_v, b_b = load_token(p_q, p_k, p_g, p_v, p_b, m_k, m_v, n_t > 0)
    b_q, b_k, b_d, b_b = activated(
        b_q, b_k, b_g, b_b, b_bias, b_A, b_slope, lower_bound, USE_L2NORM, USE_GATE, BOUNDED, USE_SIGMOID, CEILING
    )
    for t in range(n_t):
        p_q += stride_qt
        p_k += stride_kt
        p_g += stride_gt
        p_v += stride_vt
        p_b += stride_bt
        # The next token is under way while this one is worked on.
        b_qn, b_kn, b_gn, b_vn, b_bn = load_token(p_q, p_k, p_g, p_v, p_b, m_k, m_v, t + 1 < n_t)
        b_S = b_S * b_d[:, None]
        b_w = b_b * (b_v.to(tl.float32) - tl.sum(b_S * b_k[:, None], axis=0))
        b_S += b_k[:, None] * b_w[None, :]
        tl.store(p_o, tl.sum(b_S * (b_q * scale)[:, None], axis=0), mask=m_v)
        p_o += G * V
        b_v = b_vn
        b_q, b_k, b_d, b_b = activated(
            b_qn, b_kn, b_gn, b_bn, b_bias, b_A, b_slope, lower_bound, USE_L2NORM, USE_GATE, BOUNDED, USE_SIGMOID, CEILING
        )  # fmt: skip

    if HAS_FINAL:
        p_s = final_state + i_n * stride_fn + i_g * stride_fg + o_k[:, None] * stride_fk + o_v[None, :] * stride_fv
        tl.store(p_s, b_S, mask=m_kv)

"""The recurrence, one token at a time, with the state on chip: for decoding and short calls [KL eq. 1]."""

import triton
import triton.language as tl

from kda_optimized.activations import load_slope, sigmoid, softplus


@triton.jit
def kda_recurrent_fwd_kernel(
    q, k, v, g, beta, a_log, dt_bias, o, initial_state, final_state, cu_seqlens, scale, lower_bound,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    STATE_STRIDE_K: tl.constexpr, STATE_STRIDE_V: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr,
    L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, CEILING: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_ng = i_p % NV, i_p // NV
    i_n, i_g = i_ng // G, i_ng % G
    i_h = i_g // (G // H)
    i_begin = tl.load(cu_seqlens + i_n).to(tl.int64)
    i_end = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_state = i_ng * K * V + o_k[:, None] * STATE_STRIDE_K + o_v[None, :] * STATE_STRIDE_V
    b_s = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_INITIAL:
        b_s += tl.load(initial_state + o_state, mask=m_kv, other=0.0)
    b_slope = load_slope(a_log + i_g, HAS_A)
    b_bias = tl.zeros((BK,), dtype=tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)

    for i_t in range(i_begin, i_end):
        b_q = tl.load(q + (i_t * H + i_h) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(k + (i_t * H + i_h) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + (i_t * G + i_g) * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_g = tl.load(g + (i_t * G + i_g) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_beta = tl.load(beta + i_t * G + i_g).to(tl.float32)
        if L2NORM:
            b_q = b_q / tl.sqrt_rn(tl.sum(b_q * b_q, axis=0) + 1e-6)
            b_k = b_k / tl.sqrt_rn(tl.sum(b_k * b_k, axis=0) + 1e-6)
        if USE_GATE:
            b_g = b_g + b_bias
            if BOUNDED:
                b_g = lower_bound * sigmoid(b_slope * b_g)
            else:
                b_g = -b_slope * softplus(b_g)
        if SIGMOID:
            b_beta = CEILING * sigmoid(b_beta)
        b_s = b_s * tl.exp(b_g)[:, None]
        b_error = b_v - tl.sum(b_s * b_k[:, None], axis=0)
        b_s += b_k[:, None] * (b_beta * b_error)[None, :]
        b_o = tl.sum(b_s * b_q[:, None], axis=0) * scale
        tl.store(o + (i_t * G + i_g) * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)

    if STORE_FINAL:
        tl.store(final_state + o_state, b_s, mask=m_kv)

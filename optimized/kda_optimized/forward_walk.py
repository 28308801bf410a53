"""Kernel 2 of the forward: walk over the chunks of a sequence with the state on chip [KL eqs. 7-9].

    V' = (I + A)^-1 Diag(beta) (V - (exp(G) K) S)
    O  = scale (exp(G) Q) S + scores V'
    S <- Diag(exp(G_C)) S + (exp(G_C - G) K)^T V'

One program takes one sequence, one value head and BV columns of the state, which never mix with other columns.
"""

import triton
import triton.language as tl

from kda_optimized.activations import load_strength


@triton.jit
def kda_chunk_fwd_walk_kernel(
    q_decayed, k_decayed, k_rest, v, beta, scores, inverse, chunk_decay, o, initial_state, final_state, states, pseudo,
    cu_seqlens, chunk_offsets, scale,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    STATE_STRIDE_K: tl.constexpr, STATE_STRIDE_V: tl.constexpr,
    HAS_INITIAL: tl.constexpr, STORE_FINAL: tl.constexpr, STORE_STATES: tl.constexpr,
    SIGMOID: tl.constexpr, CEILING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_ng = i_p % NV, i_p // NV
    i_n, i_g = i_ng // G, i_ng % G
    i_begin = tl.load(cu_seqlens + i_n).to(tl.int64)
    i_end = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    i_c = tl.load(chunk_offsets + i_n).to(tl.int64)

    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_state = i_ng * K * V + o_k[:, None] * STATE_STRIDE_K + o_v[None, :] * STATE_STRIDE_V
    b_s = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_INITIAL:
        b_s += tl.load(initial_state + o_state, mask=m_kv, other=0.0)

    for i_start in range(i_begin, i_end, BT):
        o_t = i_start + o_i
        m_t = o_t < i_end
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        o_tk = o_t[:, None] * (G * K) + i_g * K + o_k[None, :]
        o_tv = o_t[:, None] * (G * V) + i_g * V + o_v[None, :]
        o_tt = o_t[:, None] * (G * BT) + i_g * BT + o_i[None, :]
        b_operand = b_s.to(k_decayed.dtype.element_ty)
        if STORE_STATES:
            o_h = (i_c * G + i_g) * K * V + o_k[:, None] * V + o_v[None, :]
            tl.store(states + o_h, b_operand, mask=m_kv)

        b_kd = tl.load(k_decayed + o_tk, mask=m_tk, other=0.0)
        b_r = tl.load(v + o_tv, mask=m_tv, other=0.0).to(tl.float32) - tl.dot(b_kd, b_operand, input_precision=PRECISION)
        b_r = b_r * load_strength(beta + i_g, o_t, m_t, G, SIGMOID, CEILING)[:, None]
        b_inverse = tl.load(inverse + o_tt, mask=m_t[:, None], other=0.0)
        b_new = tl.dot(b_inverse, b_r.to(b_inverse.dtype), input_precision=PRECISION).to(b_inverse.dtype)  # [BT, BV]
        if STORE_STATES:
            tl.store(pseudo + o_tv, b_new, mask=m_tv)

        b_qd = tl.load(q_decayed + o_tk, mask=m_tk, other=0.0)
        b_scores = tl.load(scores + o_tt, mask=m_t[:, None], other=0.0)
        b_o = tl.dot(b_qd, b_operand, input_precision=PRECISION) * scale
        b_o += tl.dot(b_scores, b_new, input_precision=PRECISION)
        tl.store(o + o_tv, b_o.to(o.dtype.element_ty), mask=m_tv)

        b_kr = tl.load(k_rest + o_tk, mask=m_tk, other=0.0)
        b_decay = tl.load(chunk_decay + (i_c * G + i_g) * K + o_k, mask=m_k, other=0.0)
        b_s = b_s * b_decay[:, None] + tl.dot(tl.trans(b_kr), b_new, input_precision=PRECISION)
        i_c += 1

    if STORE_FINAL:
        tl.store(final_state + o_state, b_s, mask=m_kv)

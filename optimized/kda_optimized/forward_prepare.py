"""Kernel 1 of the forward: everything of a chunk that does not need the state [KL eqs. 3-6].

One program takes one chunk of one value head and writes, in the operand dtype, decayed q and k, k decayed to the chunk's end, the
score block of q with k (scale included), the inverse ``(I + A)^-1``, and the chunk's total decay.
"""

import triton
import triton.language as tl

from kda_optimized.activations import inverse_norm, load_gate_logit, load_rows, load_slope, load_strength, log_decay
from kda_optimized.dyadic import decay_to_end, level_mask, merge_inverse, reference_decay


@triton.jit
def kda_chunk_fwd_prepare_kernel(
    q, k, g, beta, a_log, dt_bias, q_decayed, k_decayed, k_rest, scores, inverse, chunk_decay, chunk_table, cu_seqlens,
    scale, lower_bound,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A: tl.constexpr, HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, CEILING: tl.constexpr, SCORE_PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    i_c, i_g = i_p // G, i_p % G
    i_h = i_g // (G // H)
    i_n = tl.load(chunk_table + i_c * 2).to(tl.int64)
    i_t = tl.load(chunk_table + i_c * 2 + 1).to(tl.int64)
    i_start = tl.load(cu_seqlens + i_n).to(tl.int64) + i_t * BT
    i_end = tl.load(cu_seqlens + i_n + 1).to(tl.int64)

    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_t = i_start + o_i
    m_t = o_t < i_end
    m_tk = m_t[:, None] & (o_k[None, :] < K)

    b_q = load_rows(q + i_h * K, o_t, m_t, o_k, K, H * K)  # [BT, BK]
    b_k = load_rows(k + i_h * K, o_t, m_t, o_k, K, H * K)
    if L2NORM:
        b_q = b_q * inverse_norm(b_q)[:, None]
        b_k = b_k * inverse_norm(b_k)[:, None]
    b_x = load_gate_logit(g + i_g * K, dt_bias + i_g * K, o_t, m_t, o_k, K, G * K, HAS_BIAS)
    b_g = log_decay(b_x, load_slope(a_log + i_g, HAS_A), lower_bound, m_t, o_k, K, USE_GATE, BOUNDED)
    b_beta = load_strength(beta + i_g, o_t, m_t, G, SIGMOID, CEILING)  # [BT]
    # Rows past the end have no decay, so the sum over all rows is that up to the last token.
    b_last = tl.sum(b_g, axis=0)  # [BK]

    b_scores = tl.where(o_i[:, None] == o_i[None, :], tl.sum(b_q * b_k, axis=1)[:, None], 0.0)  # [BT, BT]
    b_inverse = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0) + tl.zeros((BT, BT), dtype=tl.float32)
    for i_level in tl.static_range(LEVELS):
        b_e = reference_decay(b_g, BT, i_level, SUM_PRECISION)
        m_pair = level_mask(BT, i_level)
        b_ke = tl.trans(b_k * b_e)
        b_scores += tl.where(m_pair, tl.dot(b_q * b_e, b_ke, input_precision=SCORE_PRECISION), 0.0)
        b_kk = tl.where(m_pair, tl.dot(b_k * b_e, b_ke, input_precision=SCORE_PRECISION), 0.0)
        b_inverse = merge_inverse(b_inverse, b_kk * b_beta[:, None], SUM_PRECISION)

    o_tk = o_t[:, None] * (G * K) + i_g * K + o_k[None, :]
    b_decay = tl.exp(tl.cumsum(b_g, axis=0))
    tl.store(q_decayed + o_tk, (b_q * b_decay).to(q_decayed.dtype.element_ty), mask=m_tk)
    tl.store(k_decayed + o_tk, (b_k * b_decay).to(k_decayed.dtype.element_ty), mask=m_tk)
    tl.store(k_rest + o_tk, (b_k * decay_to_end(b_g, BT, SUM_PRECISION)).to(k_rest.dtype.element_ty), mask=m_tk)
    o_tt = o_t[:, None] * (G * BT) + i_g * BT + o_i[None, :]
    tl.store(scores + o_tt, (b_scores * scale).to(scores.dtype.element_ty), mask=m_t[:, None])
    tl.store(inverse + o_tt, b_inverse.to(inverse.dtype.element_ty), mask=m_t[:, None])
    tl.store(chunk_decay + i_p * K + o_k, tl.exp(b_last), mask=o_k < K)

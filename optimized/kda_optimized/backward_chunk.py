"""Kernel 2 of the backward: gradients of q, k, the gate and beta of one chunk, all chunks in parallel.

With S the state before the chunk, dS the cotangent after it, ``R = V - (exp(G) K) S`` and X, V' as in ``backward_walk``:

    d(exp(G) Q) = scale dO S^T          d(exp(G) K) = -Diag(beta) X S^T          d(exp(G_C - G) K) = V' dS^T
    dscores     = scale M (dO V'^T)     dA = -M- (X V'^T)                        dbeta = sum_v X R + rowsum(dA * (A / beta))

and every product of decays gives the gate its share: ``dG = q dq + k dk(rows) - k dk(columns)``, the last row also the total. The gradient
of the log decay is the reverse cumulative sum of dG, summed from the end, so that no large prefix is subtracted.
"""

import triton
import triton.language as tl

from kda_optimized.activations import inverse_norm, load_gate_logit, load_rows, load_slope, load_strength, log_decay, sigmoid
from kda_optimized.dyadic import decay_to_end, level_mask, reference_decay


@triton.jit
def normalise_gradient(b_y, b_dy, b_r):
    """Return the gradient of x from that of ``y = r x``."""
    return b_r[:, None] * (b_dy - b_y * tl.sum(b_y * b_dy, axis=1)[:, None])


@triton.jit
def kda_chunk_bwd_chunk_kernel(
    q, k, v, g, beta, a_log, dt_bias, k_decayed, states, pseudo, do, x, dstates, dq, dk, dg, dbeta, da_parts, dbias_parts,
    chunk_table, cu_seqlens, scale, lower_bound,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A: tl.constexpr,
    HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr, CEILING: tl.constexpr, PRECISION: tl.constexpr, SCORE_PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
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
    m_t, m_k = o_t < i_end, o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    b_beta = load_strength(beta + i_g, o_t, m_t, G, SIGMOID, CEILING)

    b_dqd = tl.zeros((BT, BK), dtype=tl.float32)
    b_dkd = tl.zeros((BT, BK), dtype=tl.float32)
    b_dkr = tl.zeros((BT, BK), dtype=tl.float32)
    b_dscores = tl.zeros((BT, BT), dtype=tl.float32)
    b_dinner = tl.zeros((BT, BT), dtype=tl.float32)
    b_dbeta = tl.zeros((BT,), dtype=tl.float32)
    b_dtotal = tl.zeros((BK,), dtype=tl.float32)
    b_kd = tl.load(k_decayed + o_t[:, None] * (G * K) + i_g * K + o_k[None, :], mask=m_tk, other=0.0)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
        m_tv, m_kv = m_t[:, None] & m_v[None, :], m_k[:, None] & m_v[None, :]
        o_tv = o_t[:, None] * (G * V) + i_g * V + o_v[None, :]
        o_h = i_p * K * V + o_k[:, None] * V + o_v[None, :]
        b_s = tl.load(states + o_h, mask=m_kv, other=0.0)  # [BK, BV]
        b_ds = tl.load(dstates + o_h, mask=m_kv, other=0.0)
        b_new = tl.load(pseudo + o_tv, mask=m_tv, other=0.0)  # [BT, BV]
        b_x = tl.load(x + o_tv, mask=m_tv, other=0.0)
        b_do = tl.load(do + o_tv, mask=m_tv, other=0.0).to(b_new.dtype)
        b_r = tl.load(v + o_tv, mask=m_tv, other=0.0).to(tl.float32) - tl.dot(b_kd, b_s, input_precision=PRECISION)
        b_x32 = b_x.to(tl.float32)
        b_dbeta += tl.sum(b_x32 * b_r, axis=1)
        b_dtotal += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
        b_dqd += tl.dot(b_do, tl.trans(b_s), input_precision=PRECISION)
        b_dkd -= tl.dot((b_x32 * b_beta[:, None]).to(b_s.dtype), tl.trans(b_s), input_precision=PRECISION)
        b_dkr += tl.dot(b_new, tl.trans(b_ds), input_precision=PRECISION)
        b_dscores += tl.dot(b_do, tl.trans(b_new), input_precision=PRECISION)
        b_dinner -= tl.dot(b_x, tl.trans(b_new), input_precision=PRECISION)

    b_q = load_rows(q + i_h * K, o_t, m_t, o_k, K, H * K)
    b_k = load_rows(k + i_h * K, o_t, m_t, o_k, K, H * K)
    b_rq = tl.full((BT,), 1.0, dtype=tl.float32)
    b_rk = tl.full((BT,), 1.0, dtype=tl.float32)
    if L2NORM:
        b_rq, b_rk = inverse_norm(b_q), inverse_norm(b_k)
        b_q, b_k = b_q * b_rq[:, None], b_k * b_rk[:, None]
    b_logit = load_gate_logit(g + i_g * K, dt_bias + i_g * K, o_t, m_t, o_k, K, G * K, HAS_BIAS)
    b_slope = load_slope(a_log + i_g, HAS_A)
    b_g = log_decay(b_logit, b_slope, lower_bound, m_t, o_k, K, USE_GATE, BOUNDED)
    b_last = tl.sum(b_g, axis=0)

    b_decay = tl.exp(tl.cumsum(b_g, axis=0))
    b_dkr = b_dkr * decay_to_end(b_g, BT, SUM_PRECISION)
    b_dtotal = b_dtotal * tl.exp(b_last) + tl.sum(b_k * b_dkr, axis=0)  # [BK]
    b_dq = b_dqd * b_decay * scale
    b_drow = b_dkd * b_decay
    b_dcol = b_dkr
    # The diagonal of the scores knows no decay: q_i . k_i.
    b_dscores = b_dscores * scale
    b_ddiag = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_dscores, 0.0), axis=1)
    for i_level in tl.static_range(LEVELS):
        b_e = reference_decay(b_g, BT, i_level, SUM_PRECISION)
        m_pair = level_mask(BT, i_level)
        b_qe, b_ke = b_q * b_e, b_k * b_e
        b_dqk = tl.where(m_pair, b_dscores, 0.0)
        b_da = tl.where(m_pair, b_dinner, 0.0)
        b_kk = tl.dot(b_ke, tl.trans(b_ke), input_precision=SCORE_PRECISION)
        b_dbeta += tl.sum(b_da * b_kk, axis=1)
        b_dkk = b_da * b_beta[:, None]
        b_dq += b_e * tl.dot(b_dqk, b_ke, input_precision=SCORE_PRECISION)
        b_drow += b_e * tl.dot(b_dkk, b_ke, input_precision=SCORE_PRECISION)
        b_column = tl.dot(tl.trans(b_dqk), b_qe, input_precision=SCORE_PRECISION)
        b_column += tl.dot(tl.trans(b_dkk), b_ke, input_precision=SCORE_PRECISION)
        b_dcol += b_e * b_column
    b_dcum = b_q * b_dq + b_k * (b_drow - b_dcol)
    b_dg = tl.cumsum(b_dcum, axis=0, reverse=True) + b_dtotal[None, :]
    b_dq += b_ddiag[:, None] * b_k
    b_dk = b_drow + b_dcol + b_ddiag[:, None] * b_q
    if L2NORM:
        b_dq = normalise_gradient(b_q, b_dq, b_rq)
        b_dk = normalise_gradient(b_k, b_dk, b_rk)
    o_tk = o_t[:, None] * (G * K) + i_g * K + o_k[None, :]
    tl.store(dq + o_tk, b_dq.to(dq.dtype.element_ty), mask=m_tk)
    tl.store(dk + o_tk, b_dk.to(dk.dtype.element_ty), mask=m_tk)

    b_dg = tl.where(m_tk, b_dg, 0.0)
    if USE_GATE:
        if BOUNDED:
            b_z = b_slope * b_logit
            b_dz = b_dg * lower_bound * sigmoid(b_z) * sigmoid(-b_z)
            # A saturated gate has no slope, however steep its logit.
            b_da_log = tl.where(b_dz == 0.0, 0.0, b_dz * b_z)
            b_dg = tl.where(b_dz == 0.0, 0.0, b_dz * b_slope)
        else:
            b_da_log = b_dg * b_g
            b_dg = -b_dg * b_slope * sigmoid(b_logit)
        if HAS_A:
            tl.store(da_parts + i_p, tl.sum(tl.sum(b_da_log, axis=1), axis=0))
        if HAS_BIAS:
            tl.store(dbias_parts + i_p * K + o_k, tl.sum(b_dg, axis=0), mask=m_k)
    tl.store(dg + o_tk, b_dg.to(dg.dtype.element_ty), mask=m_tk)
    if SIGMOID:
        b_dbeta = b_dbeta * b_beta * (1.0 - b_beta / CEILING)
    tl.store(dbeta + o_t * G + i_g, b_dbeta.to(dbeta.dtype.element_ty), mask=m_t)

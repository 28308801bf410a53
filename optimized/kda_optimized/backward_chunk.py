# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The chunk-parallel backward kernels: from cotangents of the chunk's products to gradients of q, k, the gate and beta.

With S the state before a chunk, dS the cotangent of the state after it, and ``e, w, Y, dV`` as in the two walks:

    pairs      dP = dO w^T              dL = -dV w^T              dbeta = rowsum(Y e)
    channels   d(q_dec) = dO S^T        d(k_dec) = -dV S^T        d(k_rest) = w dS^T        d(exp(G_C)) = rowsum(S dS)

The gradient of the log decay of token s is the sum, over everything that decays through s, of what it contributes: pairs
i >= s > j, reads of S by i >= s, writes of j < s that reach dS, and S itself. Each sum is formed from its own terms; a
reverse cumulative sum of ``q dq - k dk`` would be shorter, but leaves the rounding of terms that s does not
decay in a result that may be many orders smaller.
"""

import triton
import triton.language as tl

from kda_optimized.activations import gate_slope, log_decay, log_decay_pullback, strength_pullback
from kda_optimized.chunks import (
    BETA,
    K_NORM,
    Q_NORM,
    TOKEN_ROWS,
    cumulative,
    factored_exp,
    level_exponent,
    level_mask,
    load_column,
    load_tile,
    locate_chunk,
)
from kda_optimized.products import product_rows, scaled_rows, split, unit_rows


@triton.jit(do_not_specialize=["T"])
def kda_chunk_bwd_pairs_kernel(
    beta, tokens, errors, pulled, do, dscores, dbeta, chunk_table,
    stride_ob, stride_ot, stride_oh, stride_ov, stride_bb, stride_bt, stride_bh, scale, T,
    G: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr, HAS_DO: tl.constexpr,
    USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr,
):  # fmt: skip
    """Write ``scale dP`` and ``dL`` of one chunk and value head, unmasked, and the gradient of beta or its logit."""
    i_c = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    i_b, t_0, t_g, n_t = locate_chunk(i_c, chunk_table, T)
    i_cg = i_c.to(tl.int64) * G + i_g
    o_t = tl.arange(0, BT)
    m_t = o_t < n_t
    b_b = tl.load(tokens + i_cg * (TOKEN_ROWS * BT) + BETA * BT + o_t)
    b_dP = tl.zeros((BT, BT), dtype=tl.float32)
    b_dL = tl.zeros((BT, BT), dtype=tl.float32)
    b_db = tl.zeros((BT,), dtype=tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_tv = m_t[:, None] & (o_v < V)[None, :]
        p_tv = i_cg * (BT * V) + o_t[:, None] * V + o_v[None, :]
        b_e = tl.load(errors + p_tv, mask=m_tv, other=0.0)
        b_Y = tl.load(pulled + p_tv, mask=m_tv, other=0.0)
        b_w = b_e * b_b[:, None]
        b_db += tl.sum(b_Y * b_e, axis=1)
        b_dL -= product_rows(b_Y * b_b[:, None], b_w, EXACT)
        if HAS_DO:
            b_do = load_tile(do, i_b, i_g, t_0, o_t, o_v, m_tv, stride_ob, stride_ot, stride_oh, stride_ov)
            b_dP += product_rows(b_do, b_w, EXACT)
    p_tt = dscores + i_cg * (2 * BT * BT) + o_t[:, None] * BT + o_t[None, :]
    tl.store(p_tt, b_dP * scale)
    tl.store(p_tt + BT * BT, b_dL)
    b_x = load_column(beta, i_b, i_g, t_0, o_t, m_t, stride_bb, stride_bt, stride_bh)
    tl.store(dbeta + (t_g + o_t) * G + i_g, strength_pullback(b_db, b_x, USE_SIGMOID, CEILING), mask=m_t)


@triton.jit
def sum_tokens(m_tt, b_x, EXACT: tl.constexpr):
    """Return ``[BT, BK]``: for each row of the mask, the sum of the rows of ``x`` that it selects."""
    b_m = tl.where(m_tt, 1.0, 0.0)
    if EXACT:
        b_o = tl.dot(b_m, b_x, input_precision="ieee")
    else:
        b_h, b_l = split(b_x)
        b_m = b_m.to(tl.bfloat16)
        b_o = tl.dot(b_m, b_h, tl.dot(b_m, b_l))
    return b_o


@triton.jit
def product_pairs(b_a, b_x, EXACT: tl.constexpr):
    """Return ``a x`` for gradients of pairs ``a`` ``[BT, BT]``, scaled by rows, and decayed rows ``x`` in the operand dtype."""
    if EXACT:
        b_o = tl.dot(b_a, b_x, input_precision="ieee")
    else:
        b_h, b_s = scaled_rows(b_a)
        b_o = tl.dot(b_h, b_x) * b_s[:, None]
    return b_o


@triton.jit(do_not_specialize=["T"])
def kda_chunk_bwd_channels_kernel(
    q, k, g, A_log, dt_bias, tokens, states, dstates, errors, pulled, do, dscores, dq, dk, dg, dA_parts, dbias_parts,
    chunk_table,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_ob, stride_ot, stride_oh, stride_ov, scale, lower_bound, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, EXACT: tl.constexpr, HAS_DO: tl.constexpr, USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr,
    BOUNDED: tl.constexpr, HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of normalised q and k and of the gate for BK channels of one chunk and value head."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    i_c = tl.program_id(0) // NK // G
    i_g = tl.program_id(0) // NK % G
    i_h = i_g // (G // H)
    i_b, t_0, t_g, n_t = locate_chunk(i_c, chunk_table, T)
    i_cg = i_c.to(tl.int64) * G + i_g
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_t = o_t < n_t
    m_k = o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    p_token = tokens + i_cg * (TOKEN_ROWS * BT) + o_t
    b_b = tl.load(p_token + BETA * BT)

    b_dq = tl.zeros((BT, BK), dtype=tl.float32)
    b_dk = tl.zeros((BT, BK), dtype=tl.float32)
    b_dr = tl.zeros((BT, BK), dtype=tl.float32)
    b_dt = tl.zeros((BK,), dtype=tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_tv = m_t[:, None] & (o_v < V)[None, :]
        m_kv = m_k[:, None] & (o_v < V)[None, :]
        p_tv = i_cg * (BT * V) + o_t[:, None] * V + o_v[None, :]
        p_kv = i_cg * (K * V) + o_k[:, None] * V + o_v[None, :]
        b_S = tl.load(states + p_kv, mask=m_kv, other=0.0)
        b_dS = tl.load(dstates + p_kv, mask=m_kv, other=0.0)
        b_w = tl.load(errors + p_tv, mask=m_tv, other=0.0) * b_b[:, None]
        b_dv = tl.load(pulled + p_tv, mask=m_tv, other=0.0) * b_b[:, None]
        b_dt += tl.sum(b_S * b_dS, axis=1)
        b_dk -= product_rows(b_dv, b_S, EXACT)
        b_dr += product_rows(b_w, b_dS, EXACT)
        if HAS_DO:
            b_do = load_tile(do, i_b, i_g, t_0, o_t, o_v, m_tv, stride_ob, stride_ot, stride_oh, stride_ov)
            b_dq += product_rows(b_do, b_S, EXACT)

    b_q = load_tile(q, i_b, i_h, t_0, o_t, o_k, m_tk, stride_qb, stride_qt, stride_qh, stride_qk)  # [BT, BK]
    b_k = load_tile(k, i_b, i_h, t_0, o_t, o_k, m_tk, stride_kb, stride_kt, stride_kh, stride_kk)
    if USE_L2NORM:
        b_q = b_q * tl.load(p_token + Q_NORM * BT)[:, None]
        b_k = b_k * tl.load(p_token + K_NORM * BT)[:, None]
    b_x = load_tile(g, i_b, i_g, t_0, o_t, o_k, m_tk, stride_gb, stride_gt, stride_gh, stride_gk)
    if HAS_DT_BIAS:
        b_x += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    b_A, b_slope = gate_slope(A_log, i_g, HAS_A_LOG)
    b_G = cumulative(tl.where(m_tk, log_decay(b_x, b_A, b_slope, lower_bound, USE_GATE, BOUNDED), 0.0), EXACT)
    b_total = tl.sum(tl.where((o_t == BT - 1)[:, None], b_G, 0.0), axis=0)  # [BK]

    b_E = tl.exp(b_G.to(tl.float32))
    b_dq = b_dq * b_E * scale
    b_dk = b_dk * b_E
    b_dr = b_dr * tl.exp((b_total[None, :] - b_G).to(tl.float32))
    m_after = o_t[:, None] <= o_t[None, :]
    b_dg = sum_tokens(m_after, b_q * b_dq + b_k * b_dk, EXACT)
    b_dg += sum_tokens(o_t[:, None] > o_t[None, :], b_k * b_dr, EXACT)
    b_dg += (b_dt * tl.exp(b_total.to(tl.float32)))[None, :]
    b_dk += b_dr

    p_tt = dscores + i_cg * (2 * BT * BT) + o_t[:, None] * BT + o_t[None, :]
    b_dP = tl.load(p_tt)
    b_dL = tl.load(p_tt + BT * BT)
    b_diagonal = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_dP, 0.0), axis=1)[:, None]
    b_dq += b_diagonal * b_k
    b_dk += b_diagonal * b_q
    b_qu, b_qs = unit_rows(b_q, EXACT)
    b_ku, b_ks = unit_rows(b_k, EXACT)
    for i_l in range(LEVELS):
        m_l = level_mask(i_l, BT)
        b_E, b_f = factored_exp(level_exponent(b_G, m_k, i_l, BT, BK), EXACT)
        b_p = tl.where(m_l, b_dP, 0.0)
        b_a = tl.where(m_l, b_dL, 0.0)
        b_qE = b_qu * b_E
        b_kE = b_ku * b_E
        if not EXACT:
            b_qE = b_qE.to(tl.float16)
            b_kE = b_kE.to(tl.float16)
        b_cq = (b_qs * b_f)[None, :]
        b_ck = (b_ks * b_f)[None, :]
        b_E = b_E * b_f[:, None]
        # A row of this level reads, and a column is read; no row is both, so one product serves the keys.
        b_dql = b_E * product_pairs(b_p * b_ck, b_kE, EXACT)
        b_dkl = product_pairs((b_a + tl.trans(b_a)) * b_ck, b_kE, EXACT)
        b_dkl = b_E * (b_dkl + product_pairs(tl.trans(b_p) * b_cq, b_qE, EXACT))
        b_dq += b_dql
        b_dk += b_dkl
        o_b = o_t >> i_l
        m_odd = ((o_b & 1) == 1)[:, None]
        m_s = (o_b[:, None] == o_b[None, :]) & (m_odd == m_after)
        b_dg += sum_tokens(m_s, b_q * b_dql + b_k * b_dkl, EXACT)

    p_tk = ((t_g + o_t) * G + i_g)[:, None] * K + o_k[None, :]
    tl.store(dq + p_tk, b_dq, mask=m_tk)
    tl.store(dk + p_tk, b_dk, mask=m_tk)
    if USE_GATE:
        b_dg, b_dA = log_decay_pullback(tl.where(m_tk, b_dg, 0.0), b_x, b_A, b_slope, lower_bound, BOUNDED)
        if HAS_A_LOG:
            tl.store(dA_parts + i_cg * NK + i_k, tl.sum(tl.sum(b_dA, axis=1), axis=0))
        if HAS_DT_BIAS:
            tl.store(dbias_parts + i_cg * K + o_k, tl.sum(b_dg, axis=0), mask=m_k)
    tl.store(dg + p_tk, b_dg, mask=m_tk)


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
    tl.store(dq + o_h, gather_heads(dq_G + o_g, q, o_q, m_tk, RATIO, K, USE_L2NORM), mask=m_tk)
    tl.store(dk + o_h, gather_heads(dk_G + o_g, k, o_x, m_tk, RATIO, K, USE_L2NORM), mask=m_tk)

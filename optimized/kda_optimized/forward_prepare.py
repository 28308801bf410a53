# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""First forward kernel: everything about a chunk that does not depend on the state, one program per chunk and value head.

With ``G`` the log decay accumulated from the first token of the chunk, that token's own excluded [KL eqs. 2-9]:

    q_dec  = q exp(G)            each row divided by its ``Q_SCALE``, which also holds the scale
    k_dec  = k exp(G)            each row divided by its ``K_SCALE``
    k_rest = k exp(G_C - G)      each row divided by its ``REST_SCALE``
    P_ij = scale q_i k_j exp(G_i - G_j),  i >= j               ``scores``
    L_ij = k_i k_j exp(G_i - G_j),  i > j
    Z = (I + L Diag(beta))^-1                                  ``solve``
    X = (I + Diag(beta) L)^-1                                  ``pull``, for the backward only
    exp(g_1), exp(G_C)           decay on entry and afterwards   ``decay``

The decay of the first token is applied to the state, in float32. What is left of a channel's decay is one for that token,
whatever its magnitude, so a channel that has almost forgotten the state keeps its own relative accuracy in 16 bits.
"""

import triton
import triton.language as tl

from kda_optimized.activations import gate_slope, inverse_norm, log_decay, strength
from kda_optimized.chunks import (
    BETA,
    K_NORM,
    K_SCALE,
    OFF_MASK,
    Q_NORM,
    Q_SCALE,
    REST_SCALE,
    TOKEN_ROWS,
    cumulative,
    factored_exp,
    level_exponent,
    level_mask,
    load_column,
    load_tile,
    locate_chunk,
)
from kda_optimized.products import dot_split, power_of_two, split, store_planes


@triton.jit
def unit_rows(b_x, EXACT: tl.constexpr):
    """Return rows divided by a power of two near their largest element, and those powers; nothing to do if ``EXACT``."""
    b_s, b_r = power_of_two(tl.max(tl.abs(b_x), axis=1))
    if EXACT:
        b_s = tl.zeros_like(b_s) + 1.0
    else:
        b_x = b_x * b_r[:, None]
    return b_x, b_s


@triton.jit
def inverse(b_A, BT: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """Return ``(I + A)^-1`` of a strictly lower triangular ``A`` by block elimination.

    Given the inverses ``X`` of the diagonal blocks of h tokens, those of 2h tokens are ``X - X A_h X`` with ``A_h`` the pairs of
    level h. This is forward substitution, not a power series: every intermediate is a part of the inverse itself, so
    nearly identical keys lose no accuracy.
    """
    o_t = tl.arange(0, BT)
    b_X = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0) - tl.where(level_mask(0, BT), b_A, 0.0)
    for i_l in range(1, LEVELS):
        b_a = tl.where(level_mask(i_l, BT), b_A, 0.0)
        if EXACT:
            b_a = tl.dot(b_X, b_a, input_precision="ieee")
            b_X = b_X - tl.dot(b_a, b_X, input_precision="ieee")
        else:
            b_Xh, b_Xl = split(b_X)
            b_ah, b_al = split(b_a)
            b_ah, b_al = split(dot_split(b_Xh, b_Xl, b_ah, b_al))
            b_X = b_X - dot_split(b_ah, b_al, b_Xh, b_Xl)
    return b_X


@triton.jit(do_not_specialize=["T"])
def kda_chunk_fwd_prepare_kernel(
    q, k, g, beta, A_log, dt_bias, q_dec, k_dec, k_rest, tokens, scores, solve, pull, decay, cu_seqlens, chunk_table,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_bb, stride_bt, stride_bh, scale, lower_bound, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    EXACT: tl.constexpr, BACKWARD: tl.constexpr, USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr, USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr,
):  # fmt: skip
    """Prepare one chunk of one value head."""
    PLANE: tl.constexpr = BT * BT
    PLANES: tl.constexpr = 1 if EXACT else 2
    i_c = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    i_h = i_g // (G // H)
    i_b, t_0, _, n_t = locate_chunk(i_c, cu_seqlens, chunk_table, T, BT)
    i_cg = i_c.to(tl.int64) * G + i_g
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < n_t
    m_k = o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    o_tk = o_t[:, None] * BK + o_k[None, :]
    o_tt = o_t[:, None] * BT + o_t[None, :]
    p_tk = i_cg * (BT * BK)
    p_token = tokens + i_cg * (TOKEN_ROWS * BT) + o_t

    b_q = load_tile(q, i_b, i_h, t_0, o_t, o_k, m_tk, stride_qb, stride_qt, stride_qh, stride_qk)  # [BT, BK]
    b_k = load_tile(k, i_b, i_h, t_0, o_t, o_k, m_tk, stride_kb, stride_kt, stride_kh, stride_kk)
    if USE_L2NORM:
        b_qn = inverse_norm(b_q)
        b_kn = inverse_norm(b_k)
        b_q = b_q * b_qn[:, None]
        b_k = b_k * b_kn[:, None]
        if BACKWARD:
            tl.store(p_token + Q_NORM * BT, b_qn)
            tl.store(p_token + K_NORM * BT, b_kn)
    b_q, b_qs = unit_rows(b_q, EXACT)
    b_k, b_ks = unit_rows(b_k, EXACT)
    b_qs = b_qs * scale

    b_x = load_tile(g, i_b, i_g, t_0, o_t, o_k, m_tk, stride_gb, stride_gt, stride_gh, stride_gk)
    if HAS_DT_BIAS:
        b_x += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    b_A, b_slope = gate_slope(A_log, i_g, HAS_A_LOG)
    b_g = tl.where(m_tk, log_decay(b_x, b_A, b_slope, lower_bound, USE_GATE, BOUNDED), 0.0)
    m_first = (o_t == 0)[:, None]
    b_entry = tl.sum(tl.where(m_first, b_g, 0.0), axis=0)  # [BK]
    b_G = cumulative(tl.where(m_first, 0.0, b_g), EXACT)
    b_b = load_column(beta, i_b, i_g, t_0, o_t, m_t, stride_bb, stride_bt, stride_bh)
    b_b = tl.where(m_t, strength(b_b, USE_SIGMOID, CEILING), 0.0)  # [BT]
    tl.store(p_token + BETA * BT, b_b)

    b_E, b_f = factored_exp(tl.where(m_k[None, :], b_G.to(tl.float32), OFF_MASK), EXACT)
    tl.store(q_dec + p_tk + o_tk, b_q * b_E)
    tl.store(k_dec + p_tk + o_tk, b_k * b_E)
    tl.store(p_token + Q_SCALE * BT, b_qs * b_f)
    tl.store(p_token + K_SCALE * BT, b_ks * b_f)
    # Rows past the end do not decay, so the last row holds the total of a shorter chunk too.
    b_total = tl.sum(tl.where((o_t == BT - 1)[:, None], b_G, 0.0), axis=0)  # [BK]
    b_E, b_f = factored_exp(tl.where(m_k[None, :], (b_total[None, :] - b_G).to(tl.float32), OFF_MASK), EXACT)
    tl.store(k_rest + p_tk + o_tk, b_k * b_E)
    tl.store(p_token + REST_SCALE * BT, b_ks * b_f)
    p_decay = decay + i_cg * (2 * BK) + o_k
    tl.store(p_decay, tl.exp(b_entry))
    tl.store(p_decay + BK, tl.exp(b_total.to(tl.float32)))

    b_P = tl.where(o_t[:, None] == o_t[None, :], (tl.sum(b_q * b_k, axis=1) * b_qs * b_ks)[:, None], 0.0)  # [BT, BT]
    b_L = tl.zeros((BT, BT), dtype=tl.float32)
    if not EXACT:
        # Held through the loop in half the registers; the decayed rows are rounded to float16 in any case.
        b_q = b_q.to(tl.float16)
        b_k = b_k.to(tl.float16)
    for i_l in range(LEVELS):
        m_l = level_mask(i_l, BT)
        b_E, b_f = factored_exp(level_exponent(b_G, m_k, i_l, BT, BK), EXACT)
        if EXACT:
            b_kE = b_k * b_E
            b_p = tl.dot(b_q * b_E, tl.trans(b_kE), input_precision="ieee")
            b_a = tl.dot(b_kE, tl.trans(b_kE), input_precision="ieee")
        else:
            b_kE = (b_k * b_E).to(tl.float16)
            b_p = tl.dot((b_q * b_E).to(tl.float16), tl.trans(b_kE))
            b_a = tl.dot(b_kE, tl.trans(b_kE))
        b_ck = b_ks * b_f
        b_P = tl.where(m_l, b_p * (b_qs * b_f)[:, None] * b_ck[None, :], b_P)
        b_L = tl.where(m_l, b_a * b_ck[:, None] * b_ck[None, :], b_L)

    p_tt = i_cg * (PLANES * PLANE)
    store_planes(scores + p_tt, b_P, o_tt, PLANE, EXACT)
    store_planes(solve + p_tt, inverse(b_L * b_b[None, :], BT, LEVELS, EXACT), o_tt, PLANE, EXACT)
    if BACKWARD:
        store_planes(pull + p_tt, inverse(b_L * b_b[:, None], BT, LEVELS, EXACT), o_tt, PLANE, EXACT)

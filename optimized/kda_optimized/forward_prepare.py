# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""First forward kernel: everything about a chunk that does not depend on the state, one program per chunk and value head.

With ``q_dec``, ``k_dec``, ``k_rest``, ``P`` and ``L`` as in :mod:`kda_optimized.strips`, and

    Z = (I + L Diag(beta))^-1                          M = Diag(beta) Z

what the walk along the chunks needs of them is folded so that its chain of dependent products is as short as can be:

    mix    = P M                 outputs from the values of the chunk
    q_read = q_dec - mix k_dec   outputs from the state before it
    k_read = k_dec               what the state predicts
    k_write = M^T k_rest         the state after it, from what was not predicted
"""

import triton
import triton.language as tl

from kda_optimized.activations import strength
from kda_optimized.chunks import K_SCALE, Q_SCALE, TOKEN_ROWS, level_mask, load_column, locate_chunk
from kda_optimized.products import product_split, store_planes
from kda_optimized.strips import (
    STRIP,
    STRIP_LEVELS,
    block_product,
    decayed_strip,
    store_decays,
    store_rows,
)


@triton.jit
def inverse(b_A, EXACT: tl.constexpr):
    """Return ``(I + A)^-1`` of a strictly lower triangular ``A`` by block elimination.

    Given the inverses ``X`` of the diagonal blocks of h tokens, those of 2h tokens are ``X - X A_h X`` with ``A_h`` the pairs of
    level h. This is forward substitution, not a power series: every intermediate is a part of the inverse itself, so
    nearly identical keys lose no accuracy.
    """
    o_t = tl.arange(0, STRIP)
    b_X = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0) - tl.where(level_mask(0, STRIP), b_A, 0.0)
    for i_l in range(1, STRIP_LEVELS):
        b_a = product_split(b_X, tl.where(level_mask(i_l, STRIP), b_A, 0.0), EXACT)
        b_X = b_X - product_split(b_a, b_X, EXACT)
    return b_X


@triton.jit(do_not_specialize=["T"])
def kda_chunk_fwd_prepare_kernel(
    q, k, g, beta, A_log, dt_bias, q_rows, k_rows, rest_rows, tokens, scores, decay, chunk_table,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_bb, stride_bt, stride_bh, scale, lower_bound, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, RAISED: tl.constexpr, EXACT: tl.constexpr,
    USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr,
):  # fmt: skip
    """Prepare one chunk of one value head."""
    PLANE: tl.constexpr = STRIP * STRIP
    PLANES: tl.constexpr = 1 if EXACT else 2
    W: tl.constexpr = BK // BC
    i_c = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    i_h = i_g // (G // H)
    i_b, t_0, _, n_t = locate_chunk(i_c, chunk_table, T)
    i_cg = i_c.to(tl.int64) * G + i_g
    o_t = tl.arange(0, STRIP)
    o_k = tl.arange(0, W)[:, None] * BC + tl.arange(0, BC)[None, :]  # [W, BC]
    o_x = o_t[None, :, None] * BK + o_k[:, None, :]  # [W, 16, BC]
    o_tt = o_t[:, None] * STRIP + o_t[None, :]
    p_token = tokens + i_cg * (TOKEN_ROWS * STRIP) + o_t
    p_tk = i_cg * (STRIP * BK)

    b_b = load_column(beta, i_b, i_g, t_0, o_t, o_t < n_t, stride_bb, stride_bt, stride_bh)
    b_b = tl.where(o_t < n_t, strength(b_b, USE_SIGMOID, CEILING), 0.0)  # [16]
    b_q, b_k, b_kr, b_P, b_L, b_g, _, _ = decayed_strip(
        q, k, g, A_log, dt_bias, i_b, i_h, i_g, t_0, o_t, o_k, n_t,
        stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
        stride_gb, stride_gt, stride_gh, stride_gk, scale, lower_bound, K, W, RAISED,
        EXACT, USE_L2NORM, USE_GATE, BOUNDED, HAS_A_LOG, HAS_DT_BIAS,
    )  # fmt: skip
    store_decays(decay + i_cg * (2 * BK) + o_k, b_g, o_t, BK)
    store_rows(k_rows + p_tk, p_token + K_SCALE * STRIP, b_k, o_x, EXACT, RAISED)
    b_Z = inverse(b_L * b_b[None, :], EXACT)
    b_mix = product_split(b_P * b_b[None, :], b_Z, EXACT)
    store_planes(scores + i_cg * (PLANES * PLANE), b_mix, o_tt, PLANE, EXACT)
    store_rows(q_rows + p_tk, p_token + Q_SCALE * STRIP, b_q - block_product(b_mix, b_k, W, EXACT), o_x, EXACT, RAISED)
    b_M = tl.trans(b_Z * b_b[:, None])
    store_planes(rest_rows + PLANES * p_tk, block_product(b_M, b_kr, W, EXACT), o_x, STRIP * BK, EXACT)

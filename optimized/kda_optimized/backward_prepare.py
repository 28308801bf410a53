# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""First backward kernel: everything about a chunk that does not depend on the state, one program per chunk and value head.

With the names of :mod:`kda_optimized.strips`, ``Z = (I + L Diag(beta))^-1`` and ``X = (I + Diag(beta) L)^-1``:

    solve  = L X                 Z = I - solve Diag(beta),  X = I - Diag(beta) solve
    mix    = P X                 outputs from the values of the chunk
    k_pull = X^T k_rest          the state after it from ``beta u``, and ``Y`` from the cotangent of that state

Nothing is folded with beta, since its own gradient needs ``e = Z u`` and ``Y``, which beta multiplies and may be zero.
"""

import triton
import triton.language as tl

from kda_optimized.activations import strength
from kda_optimized.chunks import (
    BETA,
    K_NORM,
    K_SCALE,
    PULL_SCALE,
    Q_NORM,
    Q_SCALE,
    REST_SCALE,
    TOKEN_ROWS,
    level_mask,
    load_column,
    locate_chunk,
)
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
def solve_pairs(b_L, b_b, EXACT: tl.constexpr):
    """Return ``L (I + Diag(beta) L)^-1`` of one strip by block elimination.

    Given the solution of the diagonal blocks of h tokens, that of 2h tokens adds ``Z L_h X``, with ``L_h`` the pairs of level h:
    forward substitution, whose every intermediate is a part of the two inverses.
    """
    o_t = tl.arange(0, STRIP)
    b_I = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    b_R = tl.where(level_mask(0, STRIP), b_L, 0.0)
    for i_l in range(1, STRIP_LEVELS):
        b_a = product_split(b_I - b_R * b_b[None, :], tl.where(level_mask(i_l, STRIP), b_L, 0.0), EXACT)
        b_R += product_split(b_a, b_I - b_b[:, None] * b_R, EXACT)
    return b_R


@triton.jit(do_not_specialize=["T"])
def kda_chunk_bwd_prepare_kernel(
    q, k, g, beta, A_log, dt_bias, q_rows, k_rows, rest_rows, pull_rows, tokens, mix, solve, decay, chunk_table,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_bb, stride_bt, stride_bh, scale, lower_bound, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, RAISED: tl.constexpr,
    EXACT: tl.constexpr, USE_L2NORM: tl.constexpr,
    USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr, USE_SIGMOID: tl.constexpr,
    CEILING: tl.constexpr,
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
    p_tt = i_cg * (PLANES * PLANE)

    b_b = load_column(beta, i_b, i_g, t_0, o_t, o_t < n_t, stride_bb, stride_bt, stride_bh)
    b_b = tl.where(o_t < n_t, strength(b_b, USE_SIGMOID, CEILING), 0.0)  # [16]
    b_q, b_k, b_rest, b_P, b_L, b_g, b_qn, b_kn = decayed_strip(
        q, k, g, A_log, dt_bias, i_b, i_h, i_g, t_0, o_t, o_k, n_t,
        stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
        stride_gb, stride_gt, stride_gh, stride_gk, scale, lower_bound, K, W, RAISED,
        EXACT, USE_L2NORM, USE_GATE, BOUNDED, HAS_A_LOG, HAS_DT_BIAS,
    )  # fmt: skip
    if USE_L2NORM:
        tl.store(p_token + Q_NORM * STRIP, b_qn)
        tl.store(p_token + K_NORM * STRIP, b_kn)
    tl.store(p_token + BETA * STRIP, b_b)
    store_decays(decay + i_cg * (2 * BK) + o_k, b_g, o_t, BK)
    store_rows(q_rows + p_tk, p_token + Q_SCALE * STRIP, b_q, o_x, EXACT, RAISED)
    store_rows(k_rows + p_tk, p_token + K_SCALE * STRIP, b_k, o_x, EXACT, RAISED)
    store_rows(rest_rows + p_tk, p_token + REST_SCALE * STRIP, b_rest, o_x, EXACT)
    b_R = solve_pairs(b_L, b_b, EXACT)
    store_planes(solve + p_tt, b_R, o_tt, PLANE, EXACT)
    b_X = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0) - b_b[:, None] * b_R
    store_planes(mix + p_tt, product_split(b_P, b_X, EXACT), o_tt, PLANE, EXACT)
    b_pull = block_product(tl.trans(b_X), b_rest, W, EXACT)
    store_rows(pull_rows + p_tk, p_token + PULL_SCALE * STRIP, b_pull, o_x, EXACT)

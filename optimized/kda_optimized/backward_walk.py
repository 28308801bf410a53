# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""First backward kernel: walk the chunks from the last to the first with the cotangent of the state on chip.

With dS the cotangent of the state after a chunk, and the names of the forward kernels:

    dw = P^T dO + k_rest dS          Y = X^T dw                  ``pulled``, the cotangent of beta u
    dV = beta Y                      dS <- exp(g_1) (exp(G_C) dS + q_dec^T dO - k_dec^T dV)      ``dstates`` holds dS after each chunk

The adjoint of the inverse needs no product of its own: what reaches the pairs of tokens is ``-dV w^T``.
"""

import triton
import triton.language as tl

from kda_optimized.chunks import BETA, K_SCALE, Q_SCALE, REST_SCALE, TOKEN_ROWS, load_tile, locate_sequence
from kda_optimized.products import product_columns, product_planes


@triton.jit(do_not_specialize=["T"])
def kda_chunk_bwd_walk_kernel(
    q_rows, k_rows, rest_rows, tokens, scores, pull, decay, do, dfinal_state, dv, dinitial_state, dstates, pulled,
    cu_seqlens, chunk_offsets,
    stride_ob, stride_ot, stride_oh, stride_ov, stride_fn, stride_fg, stride_fk, stride_fv,
    stride_in, stride_ig, stride_ik, stride_iv, T,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr,
):  # fmt: skip
    """Walk back along one sequence of one value head, for BV of its value channels."""
    PLANE: tl.constexpr = BT * BT
    PLANES: tl.constexpr = 1 if EXACT else 2
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // NV // G
    i_g = tl.program_id(0) // NV % G
    i_b, t_0, t_g, n_t, c_0, n_c = locate_sequence(i_n, cu_seqlens, chunk_offsets, T, BT)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    m_kv = (o_k < K)[:, None] & m_v[None, :]
    o_tk = o_t[:, None] * BK + o_k[None, :]
    o_tt = o_t[None, :] * BT + o_t[:, None]  # of the transpose
    o_tv = o_t[:, None] * V + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]

    b_dS = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_DFINAL:
        p_s = dfinal_state + i_n.to(tl.int64) * stride_fn + i_g.to(tl.int64) * stride_fg
        b_dS += tl.load(
            p_s + o_k.to(tl.int64)[:, None] * stride_fk + o_v.to(tl.int64)[None, :] * stride_fv, mask=m_kv, other=0.0
        )

    for i_r in range(n_c):
        i_t = n_c - 1 - i_r
        i_cg = (c_0 + i_t) * G + i_g
        t_c = i_t * BT
        m_tv = (t_c + o_t < n_t)[:, None] & m_v[None, :]
        p_tk = i_cg * (BT * BK)
        p_tt = i_cg * (PLANES * PLANE)
        p_token = tokens + i_cg * (TOKEN_ROWS * BT) + o_t
        tl.store(dstates + i_cg * (K * V) + o_kv, b_dS, mask=m_kv)

        b_dw = (
            product_columns(tl.load(rest_rows + p_tk + o_tk), b_dS, EXACT) * tl.load(p_token + REST_SCALE * BT)[:, None]
        )
        if HAS_DO:
            b_do = load_tile(
                do, i_b, i_g, t_0 + t_c, o_t, o_v, m_tv, stride_ob, stride_ot, stride_oh, stride_ov
            )  # [BT, BV]
            b_dw += product_planes(scores + p_tt, b_do, o_tt, PLANE, EXACT)
        b_Y = product_planes(pull + p_tt, b_dw, o_tt, PLANE, EXACT)
        tl.store(pulled + i_cg * (BT * V) + o_tv, b_Y, mask=m_v[None, :])
        b_dv = b_Y * tl.load(p_token + BETA * BT)[:, None]
        tl.store(dv + ((t_g + t_c + o_t) * G + i_g)[:, None] * V + o_v[None, :], b_dv, mask=m_tv)

        p_decay = decay + i_cg * (2 * BK) + o_k
        b_dS = b_dS * tl.load(p_decay + BK)[:, None]
        if HAS_DO:
            b_do = b_do * tl.load(p_token + Q_SCALE * BT)[:, None]
            b_dS += product_columns(tl.trans(tl.load(q_rows + p_tk + o_tk)), b_do, EXACT)
        b_dv = b_dv * tl.load(p_token + K_SCALE * BT)[:, None]
        b_dS -= product_columns(tl.trans(tl.load(k_rows + p_tk + o_tk)), b_dv, EXACT)
        b_dS = b_dS * tl.load(p_decay)[:, None]

    if HAS_DINITIAL:
        p_s = dinitial_state + i_n.to(tl.int64) * stride_in + i_g.to(tl.int64) * stride_ig
        tl.store(p_s + o_k.to(tl.int64)[:, None] * stride_ik + o_v.to(tl.int64)[None, :] * stride_iv, b_dS, mask=m_kv)

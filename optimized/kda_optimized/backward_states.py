# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Recompute for the backward what the forward does not keep: states and errors, one program per sequence, value head and V tile.

Per chunk, with the names of :mod:`kda_optimized.forward_prepare` [KL eqs. 6-9]:

    S <- exp(g_1) S                                                         ``states`` holds S before each chunk
    u = V - k_dec S         what the decayed state does not predict
    e = Z u                 prediction error of each token                  ``errors``
    w = beta e              what is written
    S <- exp(G_C) S + k_rest^T w

The state stays float32. In 16-bit arithmetic it enters products in float16, each of its columns divided by a power of two.
"""

import triton
import triton.language as tl

from kda_optimized.chunks import BETA, K_SCALE, REST_SCALE, TOKEN_ROWS, load_tile, locate_sequence
from kda_optimized.products import product_columns, product_planes


@triton.jit(do_not_specialize=["T"])
def kda_chunk_bwd_states_kernel(
    v, k_rows, rest_rows, tokens, solve, decay, initial_state, states, errors, cu_seqlens, chunk_offsets,
    stride_vb, stride_vt, stride_vh, stride_vv, stride_in, stride_ig, stride_ik, stride_iv, T,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Walk along one sequence of one value head, for BV of its value channels."""
    PLANE: tl.constexpr = BT * BT
    PLANES: tl.constexpr = 1 if EXACT else 2
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // NV // G
    i_g = tl.program_id(0) // NV % G
    i_b, t_0, _, n_t, c_0, n_c = locate_sequence(i_n, cu_seqlens, chunk_offsets, T, BT)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    m_kv = (o_k < K)[:, None] & m_v[None, :]
    o_tk = o_t[:, None] * BK + o_k[None, :]
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tv = o_t[:, None] * V + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]

    b_S = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_INITIAL:
        p_s = initial_state + i_n.to(tl.int64) * stride_in + i_g.to(tl.int64) * stride_ig
        b_S += tl.load(
            p_s + o_k.to(tl.int64)[:, None] * stride_ik + o_v.to(tl.int64)[None, :] * stride_iv, mask=m_kv, other=0.0
        )

    for i_t in range(n_c):
        i_cg = (c_0 + i_t) * G + i_g
        t_c = i_t * BT
        m_tv = (t_c + o_t < n_t)[:, None] & m_v[None, :]
        p_tk = i_cg * (BT * BK)
        p_tt = i_cg * (PLANES * PLANE)
        p_token = tokens + i_cg * (TOKEN_ROWS * BT) + o_t
        tl.store(states + i_cg * (K * V) + o_kv, b_S, mask=m_kv)

        p_decay = decay + i_cg * (2 * BK) + o_k
        b_S = b_S * tl.load(p_decay)[:, None]
        b_v = load_tile(v, i_b, i_g, t_0 + t_c, o_t, o_v, m_tv, stride_vb, stride_vt, stride_vh, stride_vv)  # [BT, BV]
        b_u = (
            b_v - product_columns(tl.load(k_rows + p_tk + o_tk), b_S, EXACT) * tl.load(p_token + K_SCALE * BT)[:, None]
        )
        b_e = product_planes(solve + p_tt, b_u, o_tt, PLANE, EXACT)
        tl.store(errors + i_cg * (BT * V) + o_tv, b_e, mask=m_v[None, :])
        b_w = b_e * (tl.load(p_token + BETA * BT) * tl.load(p_token + REST_SCALE * BT))[:, None]
        b_S = b_S * tl.load(p_decay + BK)[:, None]
        b_S += product_columns(tl.trans(tl.load(rest_rows + p_tk + o_tk)), b_w, EXACT)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Third backward kernel: walk the chunks from the last to the first with the cotangent of the state on chip.

With dS the cotangent of the state after a chunk, and the names of :mod:`kda_optimized.backward_prepare`:

    Y = mix^T dO + k_pull dS         cotangent of ``beta u``            ``pulled``
    dV = beta Y
    dS <- exp(g_1) (exp(G_C) dS + q_dec^T dO - k_dec^T dV)

``dstates`` holds dS after every span of SPAN chunks. The adjoint of the inverse needs no product of its own: what reaches the pairs
of tokens is ``-dV w^T``. Layout and formats are those of :mod:`kda_optimized.backward_states`.
"""

import triton
import triton.language as tl

from kda_optimized.backward_states import (
    load_state,
    pair_planes,
    read_product,
    store_columns,
    store_state,
    write_product,
)
from kda_optimized.chunks import BETA, K_SCALE, PULL_SCALE, Q_SCALE, TOKEN_ROWS, locate_sequence
from kda_optimized.products import half_scale
from kda_optimized.strips import STRIP


@triton.jit
def write_products(b_x, b_xs, b_xrows, b_y, b_ys, b_yrows, EXACT: tl.constexpr):
    """Return the sum of two products as :func:`~kda_optimized.backward_states.write_product` has them, of one scale a value channel."""
    b_x = b_x * b_xs[None, :]
    b_y = b_y * b_ys[None, :]
    if EXACT:
        b_o = tl.dot(b_y, b_yrows, tl.dot(b_x, b_xrows, input_precision="ieee"), input_precision="ieee")
    else:
        b_s, b_r = half_scale(tl.max(tl.maximum(tl.abs(b_x), tl.abs(b_y)), axis=1))
        b_o = tl.dot((b_x * b_r[:, None]).to(tl.float16), b_xrows)
        b_o = tl.dot((b_y * b_r[:, None]).to(tl.float16), b_yrows, b_o) * b_s[:, None]
    return b_o


@triton.jit
def own_outputs(b_do, p_mix, o_tt, EXACT: tl.constexpr, WHOLE: tl.constexpr):
    """Return ``dO^T mix`` ``[BV, 16]``, what reaches Y from the outputs of its own chunk, for ``dO`` ``[16, BV]`` as it was loaded."""
    b_x = tl.trans(b_do)
    if not WHOLE:
        b_x = b_x.to(tl.float32)
    return pair_planes(b_x, p_mix, o_tt, EXACT, WHOLE)


@triton.jit(do_not_specialize=["T"])
def kda_chunk_bwd_walk_kernel(
    q_rows, k_rows, pull_rows, tokens, mix, decay, do, dfinal_state, dv, dinitial_state, dstates, dstate_scales,
    pulled, pulled_scales, cu_seqlens, chunk_offsets, span_offsets,
    stride_ob, stride_ot, stride_oh, stride_ov, stride_fn, stride_fg, stride_fk, stride_fv,
    stride_in, stride_ig, stride_ik, stride_iv, T,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr, EXACT: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_DV: tl.constexpr, HAS_PULLED: tl.constexpr,
    HAS_STATES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walk back along one segment of one value head, for BV of its value channels."""
    PLANES: tl.constexpr = 1 if EXACT else 2
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // NV // G
    i_g = tl.program_id(0) // NV % G
    i_b, t_0, t_g, n_t, c_0, n_c = locate_sequence(i_n, cu_seqlens, chunk_offsets, T, STRIP)
    s_0 = tl.load(span_offsets + i_n)
    o_t = tl.arange(0, STRIP)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    m_vk = m_v[:, None] & (o_k < K)[None, :]
    o_tk = o_t[:, None] * BK + o_k[None, :]
    o_tt = o_t[:, None] * STRIP + o_t[None, :]
    o_vk = o_v[:, None] * BK + o_k[None, :]
    o_y = o_t[None, :] * (G * V) + o_v[:, None]
    o_ys = o_t * (G * NV) + i_v

    b_dS = tl.zeros((BV, BK), dtype=tl.float32)
    if HAS_DFINAL:
        p_s = dfinal_state + i_n.to(tl.int64) * stride_fn + i_g.to(tl.int64) * stride_fg
        b_dS += load_state(p_s, o_v, o_k, m_vk, stride_fk, stride_fv)
    if HAS_STATES and n_c > 0:
        i_sg = (s_0 + (n_c - 1) // SPAN) * G + i_g
        store_columns(
            dstates + i_sg * (V * BK) + o_vk,
            dstate_scales + (i_sg * NV + i_v) * BK + o_k,
            b_dS,
            m_v[:, None],
            o_k >= 0,
            EXACT,
        )

    p_do = do
    o_tv = o_t[:, None] + o_v[None, :]
    if HAS_DO:
        p_do += i_b * stride_ob + i_g.to(tl.int64) * stride_oh + (t_0 + (n_c - 1) * STRIP) * stride_ot
        o_tv = o_t.to(tl.int64)[:, None] * stride_ot + o_v.to(tl.int64)[None, :] * stride_ov
    p_token = tokens + ((c_0 + n_c - 1) * G + i_g) * (TOKEN_ROWS * STRIP) + o_t
    p_decay = decay + ((c_0 + n_c - 1) * G + i_g) * (2 * BK) + o_k
    # What a product does not read from shared memory is loaded one chunk ahead, which is the chunk before.
    m_more = (o_k >= 0) & (n_c > 0)
    m_t = ((n_c - 1) * STRIP + o_t < n_t) & (n_c > 0)
    b_do = tl.zeros((STRIP, BV), dtype=tl.float32)
    if HAS_DO:
        b_do = tl.load(p_do + o_tv, mask=m_t[:, None] & m_v[None, :], other=0.0)
    b_do_next = b_do
    b_qs = tl.load(p_token + Q_SCALE * STRIP, mask=m_t, other=0.0)
    b_ks = tl.load(p_token + K_SCALE * STRIP, mask=m_t, other=0.0)
    b_ps = tl.load(p_token + PULL_SCALE * STRIP, mask=m_t, other=0.0)
    b_b = tl.load(p_token + BETA * STRIP, mask=m_t, other=0.0)
    b_entry = tl.load(p_decay, mask=m_more, other=0.0)
    b_total = tl.load(p_decay + BK, mask=m_more, other=0.0)
    # What reaches Y from the chunk's own outputs is multiplied out a chunk ahead, too.
    b_Y = tl.zeros((BV, STRIP), dtype=tl.float32)
    if HAS_DO & (n_c > 0):
        i_cg = (c_0 + n_c - 1) * G + i_g
        b_Y += own_outputs(b_do, mix + i_cg * (PLANES * STRIP * STRIP), o_tt, EXACT, WHOLE)
    for i_r in range(n_c):
        i_t = n_c - 1 - i_r
        i_cg = (c_0 + i_t) * G + i_g
        t_c = i_t * STRIP
        b_p = tl.load(pull_rows + i_cg * (STRIP * BK) + o_tk)
        b_k = tl.load(k_rows + i_cg * (STRIP * BK) + o_tk)
        m_t = t_c + o_t < n_t
        p_token -= G * (TOKEN_ROWS * STRIP)
        p_decay -= G * (2 * BK)
        m_next = (o_t >= 0) & (i_t > 0)
        m_more = (o_k >= 0) & (i_t > 0)
        if HAS_DO:
            p_do -= tl.full((), STRIP, tl.int64) * stride_ot
            b_do_next = tl.load(p_do + o_tv, mask=m_next[:, None] & m_v[None, :], other=0.0)
        b_qs_next = tl.load(p_token + Q_SCALE * STRIP, mask=m_next, other=0.0)
        b_ks_next = tl.load(p_token + K_SCALE * STRIP, mask=m_next, other=0.0)
        b_ps_next = tl.load(p_token + PULL_SCALE * STRIP, mask=m_next, other=0.0)
        b_b_next = tl.load(p_token + BETA * STRIP, mask=m_next, other=0.0)
        b_entry_next = tl.load(p_decay, mask=m_more, other=0.0)
        b_total_next = tl.load(p_decay + BK, mask=m_more, other=0.0)
        b_Y += read_product(b_dS, b_p, b_ps, EXACT)
        b_dv = b_Y * b_b[None, :]
        if HAS_DO:
            b_q = tl.load(q_rows + i_cg * (STRIP * BK) + o_tk)
            b_x = write_products(tl.trans(b_do).to(tl.float32), b_qs, b_q, -b_dv, b_ks, b_k, EXACT)
        else:
            b_x = write_product(-b_dv, b_ks, b_k, EXACT)
        b_dS = (b_dS * b_total[None, :] + b_x) * b_entry[None, :]
        i_tg = (t_g + t_c) * G + i_g
        m_vt = m_v[:, None] & m_t[None, :]
        if HAS_DV:
            tl.store(dv + i_tg * V + o_y, b_dv, mask=m_vt)
        if HAS_PULLED:
            store_columns(pulled + i_tg * V + o_y, pulled_scales + i_tg * NV + o_ys, b_Y, m_vt, m_t, EXACT)
        b_Y = tl.zeros((BV, STRIP), dtype=tl.float32)
        if HAS_DO:
            i_cg = (c_0 + tl.maximum(i_t - 1, 0)) * G + i_g
            b_Y += own_outputs(b_do_next, mix + i_cg * (PLANES * STRIP * STRIP), o_tt, EXACT, WHOLE)
        b_do, b_qs, b_ks, b_ps, b_b, b_entry, b_total = (
            b_do_next, b_qs_next, b_ks_next, b_ps_next, b_b_next, b_entry_next, b_total_next,
        )  # fmt: skip
        if HAS_STATES and (i_t % SPAN == 0) & (i_t > 0):
            i_sg = (s_0 + i_t // SPAN - 1) * G + i_g
            store_columns(
                dstates + i_sg * (V * BK) + o_vk,
                dstate_scales + (i_sg * NV + i_v) * BK + o_k,
                b_dS,
                m_v[:, None],
                o_k >= 0,
                EXACT,
            )

    if HAS_DINITIAL:
        p_s = dinitial_state + i_n.to(tl.int64) * stride_in + i_g.to(tl.int64) * stride_ig
        store_state(p_s, b_dS, o_v, o_k, m_vk, stride_ik, stride_iv)

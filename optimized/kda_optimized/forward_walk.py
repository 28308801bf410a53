# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Second forward kernel: walk along the chunks with the state on chip, one program per segment, value head and V tile.

A segment is a whole sequence, or a part of one where there are few sequences and heads: see :mod:`kda_optimized.forward_segments`.

Per chunk, with the names of :mod:`kda_optimized.forward_prepare` [KL eqs. 6-9]:

    S <- exp(g_1) S
    O = q_read S + mix V
    U = V - k_read S         what the decayed state does not predict
    S <- exp(G_C) S + k_write^T U

The state is held transposed, value channels by key channels: it is then the left operand of every product it enters and what
it gives is the left operand of the next, so nothing on the chain from state to state leaves the registers. It stays float32; in 16-bit
arithmetic it enters products in float16, each value channel divided by a power of two.
"""

import triton
import triton.language as tl

from kda_optimized.chunks import K_SCALE, Q_SCALE, TOKEN_ROWS, locate_sequence
from kda_optimized.products import dot_split, scaled_rows, split


@triton.jit(do_not_specialize=["T"])
def kda_chunk_fwd_walk_kernel(
    v, q_rows, k_rows, rest_rows, tokens, scores, decay, initial_state, o, final_state, cu_seqlens, chunk_offsets,
    stride_vb, stride_vt, stride_vh, stride_vv, stride_in, stride_ig, stride_ik, stride_iv,
    stride_fn, stride_fg, stride_fk, stride_fv, T,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, IDENTITY: tl.constexpr, HAS_VALUES: tl.constexpr, HAS_OUTPUT: tl.constexpr, HAS_FINAL: tl.constexpr,
    WHOLE_VALUES: tl.constexpr,
):  # fmt: skip
    """Walk along one segment of one value head, for BV of its value channels; from the identity, without values, for its propagator."""
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
    m_vk = m_v[:, None] & (o_k < K)[None, :]
    o_tk = o_t[:, None] * BK + o_k[None, :]
    o_tt = o_t[:, None] * BT + o_t[None, :]

    b_S = tl.zeros((BV, BK), dtype=tl.float32)
    if IDENTITY:
        b_S += tl.where(o_v[:, None] == o_k[None, :], 1.0, 0.0)
    if HAS_INITIAL:
        p_s = initial_state + i_n.to(tl.int64) * stride_in + i_g.to(tl.int64) * stride_ig
        b_S += tl.load(
            p_s + o_v.to(tl.int64)[:, None] * stride_iv + o_k.to(tl.int64)[None, :] * stride_ik, mask=m_vk, other=0.0
        )

    p_v = v + i_b * stride_vb + i_g.to(tl.int64) * stride_vh + t_0 * stride_vt
    o_tv = o_t.to(tl.int64)[:, None] * stride_vt + o_v.to(tl.int64)[None, :] * stride_vv
    step_v = tl.full((), BT, tl.int64) * stride_vt
    p_token = tokens + (c_0 * G + i_g) * (TOKEN_ROWS * BT) + o_t
    p_decay = decay + (c_0 * G + i_g) * (2 * BK) + o_k
    # What a product does not read from shared memory is loaded one chunk ahead.
    b_v = tl.zeros((BT, BV), dtype=v.dtype.element_ty)
    b_v_next = b_v
    if HAS_VALUES:
        b_v = tl.load(p_v + o_tv, mask=(o_t < n_t)[:, None] & m_v[None, :], other=0.0)
    b_ks = tl.load(p_token + K_SCALE * BT, mask=o_t < n_t, other=0.0)
    b_qs = tl.load(p_token + Q_SCALE * BT, mask=o_t < n_t, other=0.0)
    b_entry = tl.load(p_decay, mask=(o_k >= 0) & (n_c > 0), other=0.0)
    b_total = tl.load(p_decay + BK, mask=(o_k >= 0) & (n_c > 0), other=0.0)
    for i_t in range(n_c):
        i_cg = (c_0 + i_t) * G + i_g
        t_c = i_t * BT
        b_k = tl.load(k_rows + i_cg * (BT * BK) + o_tk)  # [BT, BK]
        b_kw = tl.load(rest_rows + i_cg * (PLANES * BT * BK) + o_tk)
        if HAS_OUTPUT:
            b_q = tl.load(q_rows + i_cg * (BT * BK) + o_tk)
            b_P = tl.load(scores + i_cg * (PLANES * PLANE) + o_tt)  # [BT, BT]
        p_v += step_v
        p_token += G * (TOKEN_ROWS * BT)
        p_decay += G * (2 * BK)
        m_next = t_c + BT + o_t < n_t
        m_more = (o_k >= 0) & (i_t + 1 < n_c)
        if HAS_VALUES:
            b_v_next = tl.load(p_v + o_tv, mask=m_next[:, None] & m_v[None, :], other=0.0)
        b_ks_next = tl.load(p_token + K_SCALE * BT, mask=m_next, other=0.0)
        b_qs_next = tl.load(p_token + Q_SCALE * BT, mask=m_next, other=0.0)
        b_entry_next = tl.load(p_decay, mask=m_more, other=0.0)
        b_total_next = tl.load(p_decay + BK, mask=m_more, other=0.0)

        b_vT = tl.trans(b_v)  # [BV, BT]
        b_S = b_S * b_entry[None, :]
        if EXACT:
            if HAS_OUTPUT:
                b_o = tl.dot(b_S, tl.trans(b_q), input_precision="ieee")
                b_o += tl.dot(b_vT.to(tl.float32), tl.trans(b_P), input_precision="ieee")
            b_u = b_vT.to(tl.float32) - tl.dot(b_S, tl.trans(b_k), input_precision="ieee")
            b_S = b_S * b_total[None, :]
            b_S += tl.dot(b_u, b_kw, input_precision="ieee")
        else:
            b_kwl = tl.load(rest_rows + i_cg * (PLANES * BT * BK) + BT * BK + o_tk)
            b_h, b_s = scaled_rows(b_S)
            b_u = b_vT.to(tl.float32) - tl.dot(b_h, tl.trans(b_k)) * b_s[:, None] * b_ks[None, :]
            b_S = b_S * b_total[None, :]
            b_uh, b_ul = split(b_u)
            b_S = tl.dot(b_ul, b_kw, b_S)
            b_S = tl.dot(b_uh, b_kwl, b_S)
            b_S = tl.dot(b_uh, b_kw, b_S)
            # Last, because the compiler lays out all products of a loop as it does the last: by the rows of this narrow one, so that
            # each warp holds whole rows of the state and nothing of it goes through shared memory.
            if HAS_OUTPUT:
                b_Pl = tl.load(scores + i_cg * (PLANES * PLANE) + PLANE + o_tt)
                b_o = tl.dot(b_h, tl.trans(b_q)) * b_s[:, None] * b_qs[None, :]
                if WHOLE_VALUES:
                    # bfloat16 values are their own upper part.
                    b_o = tl.dot(b_vT, tl.trans(b_Pl), b_o)
                    b_o = tl.dot(b_vT, tl.trans(b_P), b_o)
                else:
                    b_vh, b_vl = split(b_vT.to(tl.float32))
                    b_o += dot_split(b_vh, b_vl, tl.trans(b_P), tl.trans(b_Pl))
        if HAS_OUTPUT:
            o_o = ((t_g + t_c + o_t) * G + i_g)[:, None] * V + o_v[None, :]
            tl.store(o + o_o, tl.trans(b_o), mask=(t_c + o_t < n_t)[:, None] & m_v[None, :])
        b_v, b_ks, b_qs, b_entry, b_total = b_v_next, b_ks_next, b_qs_next, b_entry_next, b_total_next

    if HAS_FINAL:
        p_s = final_state + i_n.to(tl.int64) * stride_fn + i_g.to(tl.int64) * stride_fg
        tl.store(p_s + o_v.to(tl.int64)[:, None] * stride_fv + o_k.to(tl.int64)[None, :] * stride_fk, b_S, mask=m_vk)

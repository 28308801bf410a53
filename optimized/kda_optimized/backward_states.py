# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Second backward kernel: recompute states and errors, which the forward does not keep; one program per segment, value head and V tile.

A segment is a whole sequence, or a part of one where there are few sequences and heads: see :mod:`kda_optimized.forward_segments`.

Per chunk, with the names of :mod:`kda_optimized.backward_prepare`:

    S <- exp(g_1) S
    u = V - k_dec S         what the decayed state does not predict
    e = u - solve (beta u)  prediction error of each token                  ``errors``
    S <- exp(G_C) S + k_pull^T (beta u)

``states`` holds S before every span of SPAN chunks. The state is held transposed, for the reason given in
:mod:`kda_optimized.forward_walk`, and stays float32; in 16-bit arithmetic it enters products in float16, each value channel divided
by a power of two, and is stored in float16, each key channel divided by one. Errors are stored likewise, token by token.
"""

import triton
import triton.language as tl

from kda_optimized.chunks import (
    BETA,
    K_SCALE,
    PULL_SCALE,
    TOKEN_ROWS,
    locate_sequence,
)
from kda_optimized.products import dot_split, scaled_columns, scaled_rows, split
from kda_optimized.strips import STRIP


@triton.jit
def load_state(p_s, o_v, o_k, m_vk, stride_k, stride_v):
    """Load a state of any layout, transposed ``[BV, BK]``."""
    return tl.load(
        p_s + o_v.to(tl.int64)[:, None] * stride_v + o_k.to(tl.int64)[None, :] * stride_k, mask=m_vk, other=0.0
    )


@triton.jit
def store_state(p_s, b_S, o_v, o_k, m_vk, stride_k, stride_v):
    """Write a transposed state ``[BV, BK]`` in any layout."""
    tl.store(p_s + o_v.to(tl.int64)[:, None] * stride_v + o_k.to(tl.int64)[None, :] * stride_k, b_S, mask=m_vk)


@triton.jit
def store_columns(p_x, p_s, b_x, m_x, m_s, EXACT: tl.constexpr):
    """Write a tile ``[R, C]`` whole, or in float16 with each column divided by a power of two, and those powers."""
    if EXACT:
        tl.store(p_x, b_x, mask=m_x)
        tl.store(p_s, tl.max(tl.zeros_like(b_x), axis=0) + 1.0, mask=m_s)
    else:
        b_h, b_s = scaled_columns(b_x)
        tl.store(p_x, b_h, mask=m_x)
        tl.store(p_s, b_s, mask=m_s)


@triton.jit
def write_product(b_x, b_s, b_rows, EXACT: tl.constexpr):
    """Return ``x rows`` ``[BV, BK]`` for ``x`` ``[BV, 16]`` and rows of tokens whose scales are ``s``."""
    if EXACT:
        b_o = tl.dot(b_x, b_rows, input_precision="ieee")
    else:
        b_h, b_r = scaled_rows(b_x * b_s[None, :])
        b_o = tl.dot(b_h, b_rows) * b_r[:, None]
    return b_o


@triton.jit
def read_product(b_x, b_rows, b_s, EXACT: tl.constexpr):
    """Return ``x rows^T`` ``[BV, 16]`` for a state ``x`` ``[BV, BK]`` and rows of tokens whose scales are ``s``."""
    if EXACT:
        b_o = tl.dot(b_x, tl.trans(b_rows), input_precision="ieee")
    else:
        b_h, b_r = scaled_rows(b_x)
        b_o = tl.dot(b_h, tl.trans(b_rows)) * b_r[:, None] * b_s[None, :]
    return b_o


@triton.jit
def pair_planes(b_x, p_a, o_tt, EXACT: tl.constexpr, WHOLE: tl.constexpr):
    """Return ``x a`` ``[BV, 16]`` for a matrix of pairs written by ``store_planes``; ``o_tt`` may transpose it.

    A ``WHOLE`` ``x`` is bfloat16, so its own upper part.
    """
    b_a = tl.load(p_a + o_tt)
    if EXACT:
        b_o = tl.dot(b_x, b_a, input_precision="ieee")
    elif WHOLE:
        b_o = tl.dot(b_x, b_a, tl.dot(b_x, tl.load(p_a + STRIP * STRIP + o_tt)))
    else:
        b_h, b_l = split(b_x)
        b_o = dot_split(b_h, b_l, b_a, tl.load(p_a + STRIP * STRIP + o_tt))
    return b_o


@triton.jit(do_not_specialize=["T"])
def kda_chunk_bwd_states_kernel(
    v, k_rows, pull_rows, tokens, solve, decay, initial_state, final_state, states, state_scales, errors, error_scales,
    cu_seqlens, chunk_offsets, span_offsets,
    stride_vb, stride_vt, stride_vh, stride_vv, stride_in, stride_ig, stride_ik, stride_iv,
    stride_fn, stride_fg, stride_fk, stride_fv, T,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr, EXACT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, IDENTITY: tl.constexpr, HAS_VALUES: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_STATES: tl.constexpr,
    HAS_ERRORS: tl.constexpr,
):  # fmt: skip
    """Walk along one segment of one value head, for BV of its value channels; from the identity, without values, for its map."""
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
    o_tt = o_t[None, :] * STRIP + o_t[:, None]  # of the transpose
    o_vk = o_v[:, None] * BK + o_k[None, :]
    o_y = o_t[None, :] * (G * V) + o_v[:, None]
    o_ys = o_t * (G * NV) + i_v

    b_S = tl.zeros((BV, BK), dtype=tl.float32)
    if IDENTITY:
        b_S += tl.where(o_v[:, None] == o_k[None, :], 1.0, 0.0)
    if HAS_INITIAL:
        p_s = initial_state + i_n.to(tl.int64) * stride_in + i_g.to(tl.int64) * stride_ig
        b_S += load_state(p_s, o_v, o_k, m_vk, stride_ik, stride_iv)
    if HAS_STATES and n_c > 0:
        i_sg = s_0 * G + i_g
        store_columns(
            states + i_sg * (V * BK) + o_vk,
            state_scales + (i_sg * NV + i_v) * BK + o_k,
            b_S,
            m_v[:, None],
            o_k >= 0,
            EXACT,
        )

    p_v = v + i_b * stride_vb + i_g.to(tl.int64) * stride_vh + t_0 * stride_vt
    o_tv = o_t.to(tl.int64)[:, None] * stride_vt + o_v.to(tl.int64)[None, :] * stride_vv
    step_v = tl.full((), STRIP, tl.int64) * stride_vt
    p_token = tokens + (c_0 * G + i_g) * (TOKEN_ROWS * STRIP) + o_t
    p_decay = decay + (c_0 * G + i_g) * (2 * BK) + o_k
    # What a product does not read from shared memory is loaded one chunk ahead.
    m_next = o_t < n_t
    m_more = (o_k >= 0) & (n_c > 0)
    b_v = tl.zeros((STRIP, BV), dtype=v.dtype.element_ty)
    b_v_next = b_v
    if HAS_VALUES:
        b_v = tl.load(p_v + o_tv, mask=m_next[:, None] & m_v[None, :], other=0.0)
    b_ks = tl.load(p_token + K_SCALE * STRIP, mask=m_next, other=0.0)
    b_ps = tl.load(p_token + PULL_SCALE * STRIP, mask=m_next, other=0.0)
    b_b = tl.load(p_token + BETA * STRIP, mask=m_next, other=0.0)
    b_entry = tl.load(p_decay, mask=m_more, other=0.0)
    b_total = tl.load(p_decay + BK, mask=m_more, other=0.0)
    for i_t in range(n_c):
        i_cg = (c_0 + i_t) * G + i_g
        t_c = i_t * STRIP
        b_k = tl.load(k_rows + i_cg * (STRIP * BK) + o_tk)
        b_p = tl.load(pull_rows + i_cg * (STRIP * BK) + o_tk)
        m_t = m_next
        p_v += step_v
        p_token += G * (TOKEN_ROWS * STRIP)
        p_decay += G * (2 * BK)
        m_next = t_c + STRIP + o_t < n_t
        m_more = (o_k >= 0) & (i_t + 1 < n_c)
        if HAS_VALUES:
            b_v_next = tl.load(p_v + o_tv, mask=m_next[:, None] & m_v[None, :], other=0.0)
        b_ks_next = tl.load(p_token + K_SCALE * STRIP, mask=m_next, other=0.0)
        b_ps_next = tl.load(p_token + PULL_SCALE * STRIP, mask=m_next, other=0.0)
        b_b_next = tl.load(p_token + BETA * STRIP, mask=m_next, other=0.0)
        b_entry_next = tl.load(p_decay, mask=m_more, other=0.0)
        b_total_next = tl.load(p_decay + BK, mask=m_more, other=0.0)
        b_S = b_S * b_entry[None, :]
        b_u = tl.trans(b_v).to(tl.float32) - read_product(b_S, b_k, b_ks, EXACT)
        b_w = b_u * b_b[None, :]
        b_S = b_S * b_total[None, :]
        b_S += write_product(b_w, b_ps, b_p, EXACT)
        if HAS_ERRORS:
            b_e = b_u - pair_planes(b_w, solve + i_cg * (PLANES * STRIP * STRIP), o_tt, EXACT, WHOLE=False)
            i_tg = (t_g + t_c) * G + i_g
            store_columns(
                errors + i_tg * V + o_y, error_scales + i_tg * NV + o_ys, b_e, m_v[:, None] & m_t[None, :], m_t, EXACT
            )
        b_v, b_ks, b_ps, b_b, b_entry, b_total = b_v_next, b_ks_next, b_ps_next, b_b_next, b_entry_next, b_total_next
        if HAS_STATES and ((i_t + 1) % SPAN == 0) & (i_t + 1 < n_c):
            i_sg = (s_0 + (i_t + 1) // SPAN) * G + i_g
            store_columns(
                states + i_sg * (V * BK) + o_vk,
                state_scales + (i_sg * NV + i_v) * BK + o_k,
                b_S,
                m_v[:, None],
                o_k >= 0,
                EXACT,
            )

    if HAS_FINAL:
        p_s = final_state + i_n.to(tl.int64) * stride_fn + i_g.to(tl.int64) * stride_fg
        store_state(p_s, b_S, o_v, o_k, m_vk, stride_fk, stride_fv)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""A few tokens of many sequences whose states lie in a pool of slots: the recurrence of decoding [KL eq. 1].

With the decayed state ``D = Diag(exp g) S`` both sums over the state are taken at once, and the state is passed over once:

r = D^T k,  y = D^T q         w = beta (v - r)         S <- D + k w^T         o = scale (y + (k . q) w)

A program holds ``[K, BV]`` of one head's state in registers from the first token of its row to the last. Slots are chosen on the device:
nothing here is read by the host, so that a CUDA graph replays with other rows, lengths and slots.
"""

import triton
import triton.language as tl

from kda_optimized.activations import L2NORM_EPSILON, gate_slope, log2_decay, strength


@triton.jit
def store_state(final_state, i_s, num_slots, b_S, o_kv, m_kv, stride_fs):
    """Write a state to its slot, if there is such a slot."""
    if (i_s >= 0) & (i_s < num_slots):
        tl.store(final_state + i_s * stride_fs + o_kv, b_S.to(final_state.dtype.element_ty), mask=m_kv)


@triton.jit
def kda_decode_step_kernel(
    q, k, v, g, beta, A_log, dt_bias, state, final_state, o,
    cu_seqlens, state_indices, source_indices, num_accepted_tokens, has_initial, snapshot_indices,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_bb, stride_bt, stride_bh, stride_vb, stride_vt, stride_vh, stride_vv,
    stride_ss, stride_sg, stride_sk, stride_sv, stride_fs, stride_fg, stride_fk, stride_fv,
    stride_in, stride_iw, stride_on, stride_an, stride_hn, stride_mn, stride_mw,
    scale, lower_bound, T, N, num_read_slots, num_slots, snapshot_every, num_snapshots,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_ACCEPTED: tl.constexpr, HAS_FLAG: tl.constexpr, HAS_SNAPSHOTS: tl.constexpr,
    USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr,
):  # fmt: skip
    """Advance one row of one value head by its tokens, for BV of its value channels."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = (tl.program_id(0) // NV // G).to(tl.int64)
    i_g = (tl.program_id(0) // NV % G).to(tl.int64)
    i_h = i_g // (G // H)
    o_k = tl.arange(0, BK).to(tl.int64)
    o_v = (i_v * BV + tl.arange(0, BV)).to(tl.int64)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    b_none = tl.zeros((BV,), dtype=tl.float32).to(o.dtype.element_ty)

    if PACKED:
        # Offsets outside the tokens would reach foreign memory; a bucket may be longer than its rows.
        i_b = tl.zeros((), dtype=tl.int64)
        t_0 = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n).to(tl.int64), 0), T)
        n_t = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n + 1).to(tl.int64), t_0), T) - t_0
        if i_n == N - 1:
            for t in range(t_0 + n_t, T):
                tl.store(o + (t * G + i_g) * V + o_v, b_none, mask=m_v)
    else:
        i_b, t_0, n_t = i_n, tl.zeros((), dtype=tl.int64), T
    p_o = o + ((i_b * T + t_0) * G + i_g) * V + o_v

    i_a = tl.zeros((), dtype=tl.int64)
    if HAS_ACCEPTED:
        i_a = tl.load(num_accepted_tokens + i_n * stride_an).to(tl.int64) - 1
    m_a = (i_a >= 0) & (i_a < W)
    if HAS_SOURCE:
        i_s = tl.load(source_indices + i_n * stride_on).to(tl.int64)
    else:
        i_s = tl.load(state_indices + i_n * stride_in + i_a * stride_iw, mask=m_a, other=-1).to(tl.int64)
    if (i_s < 0) | (i_s >= num_read_slots):
        for _ in range(n_t):
            tl.store(p_o, b_none, mask=m_v)
            p_o += G * V
        return

    p_s = state + i_s * stride_ss + i_g * stride_sg + o_k[:, None] * stride_sk + o_v[None, :] * stride_sv
    m_s = m_kv
    if HAS_FLAG:
        m_s = m_s & (tl.load(has_initial + i_n * stride_hn) != 0)
    b_S = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
    o_kv = i_g * stride_fg + o_k[:, None] * stride_fk + o_v[None, :] * stride_fv
    p_i = state_indices + i_n * stride_in
    b_A, b_slope = gate_slope(A_log, i_g, HAS_A_LOG)
    b_bias = tl.zeros((BK,), dtype=tl.float32)
    if HAS_DT_BIAS:
        b_bias += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    p_q = q + i_b * stride_qb + t_0 * stride_qt + i_h * stride_qh + o_k * stride_qk
    p_k = k + i_b * stride_kb + t_0 * stride_kt + i_h * stride_kh + o_k * stride_kk
    p_g = g + i_b * stride_gb + t_0 * stride_gt + i_g * stride_gh + o_k * stride_gk
    p_v = v + i_b * stride_vb + t_0 * stride_vt + i_g * stride_vh + o_v * stride_vv
    p_b = beta + i_b * stride_bb + t_0 * stride_bt + i_g * stride_bh

    for t in range(n_t):
        b_q = tl.load(p_q, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_x = tl.load(p_g, mask=m_k, other=0.0).to(tl.float32) + b_bias
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        b_b = strength(tl.load(p_b).to(tl.float32), USE_SIGMOID, CEILING)
        if USE_L2NORM:
            b_q = b_q / tl.sqrt_rn(tl.sum(b_q * b_q, axis=0) + L2NORM_EPSILON)
            b_k = b_k / tl.sqrt_rn(tl.sum(b_k * b_k, axis=0) + L2NORM_EPSILON)
        b_S = b_S * tl.exp2(log2_decay(b_x, b_A, b_slope, lower_bound, USE_GATE, BOUNDED))[:, None]
        b_r = tl.sum(b_S * b_k[:, None], axis=0)
        b_y = tl.sum(b_S * b_q[:, None], axis=0)
        b_w = b_b * (b_v - b_r)
        b_S += b_k[:, None] * b_w[None, :]
        b_o = scale * (b_y + tl.sum(b_k * b_q, axis=0) * b_w)
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)
        if W > 1:  # noqa: SIM102 - decided when the kernel is compiled
            if n_t <= W:
                i_s = tl.load(p_i + t * stride_iw).to(tl.int64)
                store_state(final_state, i_s, num_slots, b_S, o_kv, m_kv, stride_fs)
        if HAS_SNAPSHOTS:
            i_m = t // snapshot_every
            if ((t + 1) % snapshot_every == 0) & (i_m < num_snapshots):
                i_s = tl.load(snapshot_indices + i_n * stride_mn + i_m * stride_mw).to(tl.int64)
                store_state(final_state, i_s, num_slots, b_S, o_kv, m_kv, stride_fs)
        p_q += stride_qt
        p_k += stride_kt
        p_g += stride_gt
        p_v += stride_vt
        p_b += stride_bt
        p_o += G * V

    if (W == 1) | (n_t == 0) | (n_t > W):
        store_state(final_state, tl.load(p_i).to(tl.int64), num_slots, b_S, o_kv, m_kv, stride_fs)

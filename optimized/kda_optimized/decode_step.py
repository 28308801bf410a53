# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""A few tokens of many sequences whose states lie in a pool of slots: the recurrence of decoding [KL eq. 1].

With the decayed state ``D = Diag(exp g) S`` both sums over the state are taken at once, and the state is passed over once:

r = D^T k,  y = D^T q         w = beta (v - r)         S <- D + k w^T         o = scale (y + (k . q) w)

A program holds ``[K, BV]`` of one head's state in registers from the first token of its row to the last. Slots are chosen on the device:
nothing here is read by the host, so that a CUDA graph replays with other rows, lengths and slots. A token is asked for before the slot
that the row starts from and before the token ahead of it is done, so that one row alone waits for memory twice, not once for each table.

The first token's activations stand ahead of the loop and the others' in it, so where a compiler may fuse either of two products it is told
which: calls can be cut anywhere without a change of bits.
"""

import triton
import triton.language as tl

from kda_optimized.activations import gate_slope
from kda_optimized.slot_rows import locate_row, starting_slot, store_slot
from kda_optimized.token_rows import activated, load_token


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

    i_b, t_0, n_t = locate_row(cu_seqlens, i_n, T, PACKED)
    p_o = o + ((i_b * T + t_0) * G + i_g) * V + o_v
    if PACKED:  # noqa: SIM102 - decided when the kernel is compiled
        # A bucket may be longer than its rows.
        if i_n == N - 1:
            for t in range(t_0 + n_t, T):
                tl.store(
                    o + (t * G + i_g) * V + o_v, tl.zeros((BV,), dtype=tl.float32).to(o.dtype.element_ty), mask=m_v
                )

    p_q = q + i_b * stride_qb + t_0 * stride_qt + i_h * stride_qh + o_k * stride_qk
    p_k = k + i_b * stride_kb + t_0 * stride_kt + i_h * stride_kh + o_k * stride_kk
    p_g = g + i_b * stride_gb + t_0 * stride_gt + i_g * stride_gh + o_k * stride_gk
    p_v = v + i_b * stride_vb + t_0 * stride_vt + i_g * stride_vh + o_v * stride_vv
    p_b = beta + i_b * stride_bb + t_0 * stride_bt + i_g * stride_bh
    p_i = state_indices + i_n * stride_in
    i_s = starting_slot(
        state_indices, source_indices, num_accepted_tokens, i_n, stride_in, stride_iw, stride_on, stride_an,
        W, HAS_SOURCE, HAS_ACCEPTED,
    )  # fmt: skip
    i_last = tl.load(p_i).to(tl.int64)
    b_q, b_k, b_g, b_v, b_b = load_token(p_q, p_k, p_g, p_v, p_b, m_k, m_v, n_t > 0)
    b_bias = tl.zeros((BK,), dtype=tl.float32)
    if HAS_DT_BIAS:
        b_bias += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_A, b_slope = gate_slope(A_log, i_g, HAS_A_LOG)
    # A row that is padding runs along on zeros: a branch here would make its loads wait for one another.
    there = (i_s >= 0) & (i_s < num_read_slots)
    num_slots = tl.where(there, num_slots, 0)
    p_s = state + i_s * stride_ss + i_g * stride_sg + o_k[:, None] * stride_sk + o_v[None, :] * stride_sv
    m_s = m_kv & there
    if HAS_FLAG:
        m_s = m_s & (tl.load(has_initial + i_n * stride_hn) != 0)
    b_S = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
    o_kv = i_g * stride_fg + o_k[:, None] * stride_fk + o_v[None, :] * stride_fv

    b_q, b_k, b_d, b_b = activated(
        b_q, b_k, b_g, b_b, b_bias, b_A, b_slope, lower_bound, USE_L2NORM, USE_GATE, BOUNDED, USE_SIGMOID, CEILING
    )
    for t in range(n_t):
        p_q += stride_qt
        p_k += stride_kt
        p_g += stride_gt
        p_v += stride_vt
        p_b += stride_bt
        b_qn, b_kn, b_gn, b_vn, b_bn = load_token(p_q, p_k, p_g, p_v, p_b, m_k, m_v, t + 1 < n_t)
        b_S = b_S * b_d[:, None]
        b_r = tl.sum(b_S * b_k[:, None], axis=0)
        b_y = tl.sum(b_S * b_q[:, None], axis=0)
        b_w = b_b * (b_v.to(tl.float32) - b_r)
        b_S = tl.fma(b_k[:, None], b_w[None, :], b_S)
        b_o = scale * (b_y + tl.sum(b_k * b_q, axis=0) * b_w)
        tl.store(p_o, tl.where(there, b_o, 0.0).to(o.dtype.element_ty), mask=m_v)
        if W > 1:  # noqa: SIM102 - decided when the kernel is compiled
            if n_t <= W:
                i_s = tl.load(p_i + t * stride_iw).to(tl.int64)
                store_slot(final_state, i_s, num_slots, b_S, o_kv, m_kv, stride_fs)
        if HAS_SNAPSHOTS:
            i_m = t // snapshot_every
            if ((t + 1) % snapshot_every == 0) & (i_m < num_snapshots):
                i_s = tl.load(snapshot_indices + i_n * stride_mn + i_m * stride_mw).to(tl.int64)
                store_slot(final_state, i_s, num_slots, b_S, o_kv, m_kv, stride_fs)
        p_o += G * V
        b_v = b_vn
        b_q, b_k, b_d, b_b = activated(
            b_qn, b_kn, b_gn, b_bn, b_bias, b_A, b_slope, lower_bound, USE_L2NORM, USE_GATE, BOUNDED, USE_SIGMOID, CEILING
        )  # fmt: skip

    if (W == 1) | (n_t == 0) | (n_t > W):
        store_slot(final_state, i_last, num_slots, b_S, o_kv, m_kv, stride_fs)

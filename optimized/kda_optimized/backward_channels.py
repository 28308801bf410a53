# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Fifth backward kernel: gradients of q, k and the gate, one program per span of N chunks, value head and W slabs of channels.

With S the state before a span, dS the cotangent of the state after it, and the cotangents of the scores from
:mod:`kda_optimized.backward_pairs`, token i receives what it reads, and gives what it wrote:

    dq_i = scale (D_i S dO_i + sum_j dP_ij D_ij k_j)           D_i   decay from the start of the span
    dk_i = -D_i S dV_i + sum_j dL_ij D_ij k_j                  D_ij  decay between two tokens
         + R_i dS w_i + sum_h (dP_hi scale q_h + dL_hi k_h) D_hi     R_i  decay to the end of the span

Inside a strip of 16 tokens, pairs are taken by levels (:mod:`kda_optimized.chunks`). Between strips, a factor D or R of each
strip's own, which the first kernel has applied to its rows already, meets the decays of whole strips in between.

The gradient of the log decay of token s is the sum, over everything that decays through s, of what it contributes. Each sum is formed
from its own terms, those that pass through a whole strip in ``through``; a reverse cumulative sum of ``q dq - k dk`` would be
shorter, but leaves the rounding of terms that s does not decay in a result that may be many orders smaller.
"""

import triton
import triton.language as tl

from kda_optimized.activations import gate_slope, log2_decay, log_decay_pullback
from kda_optimized.backward_pairs import load_scaled, operand_rows
from kda_optimized.backward_tiles import (
    across_strips,
    add_pairs,
    add_tokens,
    as_product,
    decays,
    decays_through,
    later_half,
    load_channels,
    neighbour_gradients,
    slab_product,
    unit_pullback,
    zero_product,
)
from kda_optimized.chunks import (
    BETA,
    K_NORM,
    K_SCALE,
    Q_NORM,
    Q_SCALE,
    REST_SCALE,
    TOKEN_ROWS,
    load_tile,
    locate_chunk,
)
from kda_optimized.strips import STRIP, STRIP_LEVELS


@triton.jit
def load_span_state(p_x, p_s, o_k, i_v, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Load ``[W, BC, BV]`` of a stored state, as stored, and the scales ``[W, BC]`` of that tile."""
    o_v = tl.arange(0, BV)
    # What does not depend on the tile apart, so that it becomes an offset in the instruction.
    p_x += i_v * (BV * BK) + (o_v[None, None, :] * BK + o_k[:, :, None])
    m_v = (i_v * BV + o_v < V) | (V % BV == 0)
    b_x = tl.load(p_x, mask=m_v[None, None, :], other=0.0)
    return b_x, tl.load(p_s + i_v * BK + o_k)


@triton.jit(do_not_specialize=["T", "first_span"])
def kda_chunk_bwd_channels_kernel(
    q, k, g, A_log, dt_bias, q_rows, k_rows, rest_rows, tokens, decay, states, state_scales, dstates, dstate_scales,
    errors, error_scales, pulled, pulled_scales, do, dscores, dq, dk, dg, dA_parts, dbias_parts, chunk_offsets, span_table,
    first_span,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_ob, stride_ot, stride_oh, stride_ov, scale, lower_bound, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    W: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr, HAS_DO: tl.constexpr, STAGED: tl.constexpr, USE_L2NORM: tl.constexpr,
    USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    HAS_DA: tl.constexpr, HAS_DBIAS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one span, value head and W slabs; where STAGED, those of the normalised q and k, for the last kernel."""
    N: tl.constexpr = BT // STRIP
    NV: tl.constexpr = (V + BV - 1) // BV
    PARTS: tl.constexpr = BK // (W * BC)
    i_w = tl.program_id(0) % PARTS
    i_p = tl.program_id(0) // PARTS // G
    i_s = first_span + i_p
    i_g = tl.program_id(0) // PARTS % G
    i_h = i_g // (G // H)
    i_b, t_0, t_g, n_t = locate_chunk(i_s, span_table, T)
    c_0 = tl.load(chunk_offsets + tl.load(span_table + 5 * i_s + 3)) + tl.load(span_table + 5 * i_s + 4) * N
    i_sg = i_s.to(tl.int64) * G + i_g
    n_s = tl.minimum(N, (n_t + STRIP - 1) // STRIP).to(tl.int32)
    o_n = tl.arange(0, N)[:, None, None]
    o_t = tl.arange(0, STRIP)
    o_k = (i_w * W + tl.arange(0, W))[:, None] * BC + tl.arange(0, BC)[None, :]  # [W, BC]
    o_x = o_t[None, None, :] * BK + o_k[:, :, None]  # [W, BC, 16]
    m_k = o_k < K
    m_before = o_t[:, None] > o_t[None, :]  # of each row, tokens before it, and so on
    m_until = o_t[:, None] >= o_t[None, :]
    m_from = o_t[:, None] <= o_t[None, :]
    m_after = o_t[:, None] < o_t[None, :]
    b_none = zero_product(W, EXACT)
    p_state = states + i_sg * (V * BK)
    p_state_scale = state_scales + i_sg * (NV * BK)
    p_dstate = dstates + i_sg * (V * BK)
    p_dstate_scale = dstate_scales + i_sg * (NV * BK)
    p_pairs = dscores + (i_p.to(tl.int64) * G + i_g) * (2 * BT * BT)
    o_later = o_t[None, :] * BT + o_t[:, None]  # of the transpose: column i, row j
    o_earlier = o_t[:, None] * BT + o_t[None, :]
    b_bias = tl.zeros((W, BC), dtype=tl.float32)
    if HAS_DT_BIAS:
        b_bias += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_A, b_slope = gate_slope(A_log, i_g, HAS_A_LOG)

    # What passes through each whole strip: first from what was written before it, or before the span, to dS.
    b_through = tl.zeros((N, W, BC), dtype=tl.float32)
    b_F = tl.zeros((W, BC), dtype=tl.float32) + 1.0
    for i_r in range(n_s - 1):
        i_a = n_s - 2 - i_r
        i_cg = (c_0 + i_a) * G + i_g
        p_decay = decay + (i_cg + G) * (2 * BK) + o_k
        b_F *= tl.load(p_decay) * tl.load(p_decay + BK)
        p_token = tokens + i_cg * (TOKEN_ROWS * STRIP) + o_t
        i_tg = (t_g + i_a * STRIP) * G + i_g
        b_dr = tl.zeros((W, BC, STRIP), dtype=tl.float32)
        for i_v in range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            b_dS, b_dSs = load_span_state(p_dstate, p_dstate_scale, o_k, i_v, V, BK, BV)
            b_e, b_es = load_scaled(errors, error_scales, i_tg, o_t, o_v, i_v, o_t < STRIP, G, V, NV)
            b_dr += slab_product(b_dS, tl.trans(b_e)) * b_dSs[:, :, None] * b_es[None, None, :]
        b_s = tl.load(p_token + BETA * STRIP) * tl.load(p_token + REST_SCALE * STRIP)
        b_kr = tl.load(rest_rows + i_cg * (STRIP * BK) + o_x).to(tl.float32)
        b_y = tl.sum(b_kr * b_dr * b_s[None, None, :], axis=2) * b_F
        b_through += tl.where(o_n > i_a, b_y[None, :, :], 0.0)
    p_decay = decay + (c_0 * G + i_g) * (2 * BK) + o_k
    b_F *= tl.load(p_decay) * tl.load(p_decay + BK)
    b_SdS = tl.zeros((W, BC, BV), dtype=tl.float32)
    for i_v in range(NV):
        b_S, b_Ss = load_span_state(p_state, p_state_scale, o_k, i_v, V, BK, BV)
        b_dS, b_dSs = load_span_state(p_dstate, p_dstate_scale, o_k, i_v, V, BK, BV)
        b_SdS += b_S.to(tl.float32) * b_dS.to(tl.float32) * (b_Ss * b_dSs)[:, :, None]
    b_through += (tl.sum(b_SdS, axis=2) * b_F)[None, :, :]

    b_end = tl.zeros((W, BC), dtype=tl.float32) + 1.0
    for i_r in range(n_s):
        i_a = n_s - 1 - i_r
        i_cg = (c_0 + i_a) * G + i_g
        t_a = t_0 + i_a * STRIP
        m_t = i_a * STRIP + o_t < n_t
        m_x = m_t[None, None, :] & m_k[:, :, None]
        p_token = tokens + i_cg * (TOKEN_ROWS * STRIP) + o_t
        b_b = tl.load(p_token + BETA * STRIP)
        i_tg = (t_g + i_a * STRIP) * G + i_g

        # Written for dS, and for later strips, nearest first; the gate is loaded ahead of what takes long.
        b_g_raw = load_channels(g, i_b, i_g, t_a, o_t, o_k, m_x, stride_gb, stride_gt, stride_gh, stride_gk)
        b_dkr = tl.zeros((W, BC, STRIP), dtype=tl.float32)
        for i_v in range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            b_dS, b_dSs = load_span_state(p_dstate, p_dstate_scale, o_k, i_v, V, BK, BV)
            b_e, b_es = load_scaled(errors, error_scales, i_tg, o_t, o_v, i_v, m_t, G, V, NV)
            b_dkr += slab_product(b_dS, tl.trans(b_e)) * b_dSs[:, :, None] * (b_es * b_b)[None, None, :]
        b_dkr *= b_end[:, :, None]
        b_F = tl.zeros((W, BC), dtype=tl.float32) + 1.0
        for i_o in range(i_a + 1, n_s):
            i_og = (c_0 + i_o) * G + i_g
            p_other = tokens + i_og * (TOKEN_ROWS * STRIP) + o_t
            p_decay = decay + i_og * (2 * BK) + o_k
            p_ij = p_pairs + (i_o * BT + i_a) * STRIP + o_earlier
            b_rows = tl.load(q_rows + i_og * (STRIP * BK) + o_x)
            b_x = across_strips(b_rows, tl.load(p_other + Q_SCALE * STRIP), tl.load(p_ij), EXACT)
            b_rows = tl.load(k_rows + i_og * (STRIP * BK) + o_x)
            b_x += across_strips(b_rows, tl.load(p_other + K_SCALE * STRIP), tl.load(p_ij + BT * BT), EXACT)
            b_F *= tl.load(p_decay)
            b_dkr += b_x * b_F[:, :, None]
            b_F *= tl.load(p_decay + BK)
        b_g = log2_decay(as_product(b_g_raw, EXACT) + b_bias[:, :, None], b_A, b_slope, lower_bound, USE_GATE, BOUNDED)
        b_g = tl.where(m_x, b_g, 0.0)
        b_dkr *= decays(b_g, m_after, b_none, EXACT)

        # Read from S, and from earlier strips, nearest first; loaded ahead, too.
        b_q_raw = load_channels(q, i_b, i_h, t_a, o_t, o_k, m_x, stride_qb, stride_qt, stride_qh, stride_qk)
        b_k_raw = load_channels(k, i_b, i_h, t_a, o_t, o_k, m_x, stride_kb, stride_kt, stride_kh, stride_kk)
        b_dq = tl.zeros((W, BC, STRIP), dtype=tl.float32)
        b_dk = tl.zeros((W, BC, STRIP), dtype=tl.float32)
        for i_v in range(NV):
            o_v = i_v * BV + tl.arange(0, BV)
            b_S, b_Ss = load_span_state(p_state, p_state_scale, o_k, i_v, V, BK, BV)
            b_Y, b_Ys = load_scaled(pulled, pulled_scales, i_tg, o_t, o_v, i_v, m_t, G, V, NV)
            b_dk -= slab_product(b_S, tl.trans(b_Y)) * b_Ss[:, :, None] * (b_Ys * b_b)[None, None, :]
            if HAS_DO:
                m_tv = m_t[:, None] & (o_v < V)[None, :]
                b_do = load_tile(do, i_b, i_g, t_a, o_t, o_v, m_tv, stride_ob, stride_ot, stride_oh, stride_ov)
                b_do, b_dos = operand_rows(b_do, EXACT)
                b_dq += slab_product(b_S, tl.trans(b_do)) * b_Ss[:, :, None] * (b_dos * scale)[None, None, :]
        b_F = tl.zeros((W, BC), dtype=tl.float32) + 1.0
        for i_e in range(i_a):
            p_decay = decay + ((c_0 + i_e) * G + i_g) * (2 * BK) + o_k
            b_F *= tl.load(p_decay) * tl.load(p_decay + BK)
        b_dq *= b_F[:, :, None]
        b_dk *= b_F[:, :, None]
        b_q = as_product(b_q_raw, EXACT)
        b_k = as_product(b_k_raw, EXACT)
        if USE_L2NORM:
            b_q *= tl.load(p_token + Q_NORM * STRIP)[None, None, :]
            b_k *= tl.load(p_token + K_NORM * STRIP)[None, None, :]
        b_D = decays(b_g, m_until, b_none, EXACT)
        b_y = tl.sum(b_D * (b_q * b_dq + b_k * b_dk), axis=2)
        b_through += tl.where(o_n < i_a, b_y[None, :, :], 0.0)
        b_F = tl.zeros((W, BC), dtype=tl.float32) + 1.0
        for i_o in range(i_a):
            i_e = i_a - 1 - i_o
            i_eg = (c_0 + i_e) * G + i_g
            p_decay = decay + i_eg * (2 * BK) + o_k
            p_ji = p_pairs + (i_a * BT + i_e) * STRIP + o_later
            b_rows = tl.load(rest_rows + i_eg * (STRIP * BK) + o_x)
            b_s = tl.load(tokens + i_eg * (TOKEN_ROWS * STRIP) + REST_SCALE * STRIP + o_t)
            b_yq = across_strips(b_rows, b_s * scale, tl.load(p_ji), EXACT) * b_F[:, :, None]
            b_yk = across_strips(b_rows, b_s, tl.load(p_ji + BT * BT), EXACT) * b_F[:, :, None]
            b_y = tl.sum(b_D * (b_q * b_yq + b_k * b_yk), axis=2)
            b_through += tl.where((o_n > i_e) & (o_n < i_a), b_y[None, :, :], 0.0)
            b_dq += b_yq
            b_dk += b_yk
            b_F *= tl.load(p_decay) * tl.load(p_decay + BK)
        b_dq *= b_D
        b_dk *= b_D
        b_dg = tl.zeros_like(b_dq) + tl.sum(tl.where(o_n == i_a, b_through, 0.0), axis=0)[:, :, None]
        b_dg = add_tokens(b_dg, b_q * b_dq + b_k * b_dk, m_from, b_none, EXACT)
        b_dg = add_tokens(b_dg, b_k * b_dkr, m_before, b_none, EXACT)
        b_dk += b_dkr

        # From the strip itself.
        p_tt = p_pairs + (i_a * BT + i_a) * STRIP
        b_diagonal = (tl.load(p_tt + o_t * (BT + 1)) * scale)[None, None, :]
        b_dq += b_diagonal * b_k
        b_dk += b_diagonal * b_q
        b_dP = tl.load(p_tt + o_earlier)[None, :, :] * scale + b_none
        b_dPT = tl.load(p_tt + o_later)[None, :, :] * scale + b_none
        b_dL = tl.load(p_tt + BT * BT + tl.where(m_before, o_earlier, o_later))[None, :, :] + b_none
        b_zero = tl.zeros((W, BC, STRIP), dtype=tl.float32)
        # The first level pairs neighbours, which lie side by side in registers.
        p_one = p_tt + BT + tl.arange(0, STRIP // 2) * (2 * BT + 2)
        b_yq, b_yk, b_y = neighbour_gradients(b_q, b_k, b_g, tl.load(p_one) * scale, tl.load(p_one + BT * BT))
        b_dq += b_yq
        b_dk += b_yk
        b_dg += b_y
        for i_l in range(1, STRIP_LEVELS):
            m_later = later_half(i_l, o_t[:, None], o_t[None, :])[None, :, :]
            m_earlier = later_half(i_l, o_t[None, :], o_t[:, None])[None, :, :]
            b_E = decays(b_g, decays_through(i_l, o_t[:, None], o_t[None, :]), b_none, EXACT)
            b_kE = b_k * b_E
            b_yq = b_E * add_pairs(b_zero, b_kE, tl.where(m_later, b_dP, 0.0), EXACT)
            # A token of this level reads, or is read, and never both, so one product serves the keys.
            b_yk = add_pairs(b_zero, b_kE, tl.where(m_later | m_earlier, b_dL, 0.0), EXACT)
            b_yk = b_E * add_pairs(b_yk, b_q * b_E, tl.where(m_earlier, b_dPT, 0.0), EXACT)
            b_dq += b_yq
            b_dk += b_yk
            m_tt = decays_through(i_l, o_t[None, :], o_t[:, None])
            b_dg = add_tokens(b_dg, b_q * b_yq + b_k * b_yk, m_tt, b_none, EXACT)

        o_y = i_tg * K + o_t[None, None, :] * (G * K) + o_k[:, :, None]
        o_z = o_y
        if STAGED:
            o_z = ((i_p.to(tl.int64) * BT + i_a * STRIP) * G + i_g) * K + o_t[None, None, :] * (G * K) + o_k[:, :, None]
        elif USE_L2NORM:
            b_dq = unit_pullback(b_dq, b_q, tl.load(p_token + Q_NORM * STRIP))
            b_dk = unit_pullback(b_dk, b_k, tl.load(p_token + K_NORM * STRIP))
        tl.store(dq + o_z, b_dq, mask=m_x)
        tl.store(dk + o_z, b_dk, mask=m_x)
        if USE_GATE:
            # Read again rather than kept: registers are what this kernel is short of.
            b_x = load_channels(g, i_b, i_g, t_a, o_t, o_k, m_x, stride_gb, stride_gt, stride_gh, stride_gk)
            b_x = as_product(b_x, EXACT) + b_bias[:, :, None]
            b_dg, b_yk = log_decay_pullback(tl.where(m_x, b_dg, 0.0), b_g, b_x, b_A, b_slope, lower_bound, BOUNDED)
            if HAS_DA:
                tl.store(dA_parts + i_cg * PARTS + i_w, tl.sum(tl.sum(tl.sum(b_yk, axis=2), axis=1), axis=0))
            if HAS_DBIAS:
                tl.store(dbias_parts + i_cg * K + o_k, tl.sum(b_dg, axis=2), mask=m_k)
        tl.store(dg + o_y, b_dg, mask=m_x)
        p_decay = decay + i_cg * (2 * BK) + o_k
        b_end *= tl.load(p_decay) * tl.load(p_decay + BK)

"""Kernel 1 of the backward: walk the chunks from the last to the first with the state's cotangent on chip.

    dV' = scores^T dO + (exp(G_C - G) K) dS           X = (I + A)^-T dV'
    dV  = Diag(beta) X                                dS <- Diag(exp(G_C)) dS + scale (exp(G) Q)^T dO - (exp(G) K)^T dV

The adjoint of the inverse needs no matrix of its own: ``dA = -X V'^T``. X and the cotangent of the state at the end of every chunk are
written for the chunk-parallel kernel.
"""

import triton
import triton.language as tl

from kda_optimized.activations import load_strength


@triton.jit
def kda_chunk_bwd_walk_kernel(
    q_decayed, k_decayed, k_rest, beta, scores, inverse, chunk_decay, do, dfinal_state, dv, x, dstates, dinitial_state,
    cu_seqlens, chunk_offsets, scale,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    STATE_STRIDE_K: tl.constexpr, STATE_STRIDE_V: tl.constexpr,
    HAS_DFINAL: tl.constexpr, STORE_DINITIAL: tl.constexpr,
    SIGMOID: tl.constexpr, CEILING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_ng = i_p % NV, i_p // NV
    i_n, i_g = i_ng // G, i_ng % G
    i_begin = tl.load(cu_seqlens + i_n).to(tl.int64)
    i_end = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    i_first = tl.load(chunk_offsets + i_n).to(tl.int64)
    num_chunks = (i_end - i_begin + BT - 1) // BT

    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_state = i_ng * K * V + o_k[:, None] * STATE_STRIDE_K + o_v[None, :] * STATE_STRIDE_V
    b_ds = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_DFINAL:
        b_ds += tl.load(dfinal_state + o_state, mask=m_kv, other=0.0)

    for i_back in range(0, num_chunks):
        i_t = num_chunks - 1 - i_back
        i_c = i_first + i_t
        o_t = i_begin + i_t * BT + o_i
        m_t = o_t < i_end
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        o_tk = o_t[:, None] * (G * K) + i_g * K + o_k[None, :]
        o_tv = o_t[:, None] * (G * V) + i_g * V + o_v[None, :]
        o_tt = o_t[:, None] * (G * BT) + i_g * BT + o_i[None, :]
        o_h = (i_c * G + i_g) * K * V + o_k[:, None] * V + o_v[None, :]
        b_operand = b_ds.to(dstates.dtype.element_ty)
        tl.store(dstates + o_h, b_operand, mask=m_kv)

        b_scores = tl.load(scores + o_tt, mask=m_t[:, None], other=0.0)
        b_do = tl.load(do + o_tv, mask=m_tv, other=0.0).to(b_scores.dtype)
        b_kr = tl.load(k_rest + o_tk, mask=m_tk, other=0.0)
        b_dnew = tl.dot(tl.trans(b_scores), b_do, input_precision=PRECISION) + tl.dot(b_kr, b_operand, input_precision=PRECISION)
        b_inverse = tl.load(inverse + o_tt, mask=m_t[:, None], other=0.0)
        b_x = tl.dot(tl.trans(b_inverse), b_dnew.to(b_inverse.dtype), input_precision=PRECISION)  # [BT, BV]
        tl.store(x + o_tv, b_x.to(x.dtype.element_ty), mask=m_tv)
        b_dv = b_x * load_strength(beta + i_g, o_t, m_t, G, SIGMOID, CEILING)[:, None]
        tl.store(dv + o_tv, b_dv.to(dv.dtype.element_ty), mask=m_tv)

        b_qd = tl.load(q_decayed + o_tk, mask=m_tk, other=0.0)
        b_kd = tl.load(k_decayed + o_tk, mask=m_tk, other=0.0)
        b_decay = tl.load(chunk_decay + (i_c * G + i_g) * K + o_k, mask=m_k, other=0.0)
        b_ds = b_ds * b_decay[:, None] + tl.dot(tl.trans(b_qd), b_do, input_precision=PRECISION) * scale
        b_ds -= tl.dot(tl.trans(b_kd), b_dv.to(b_kd.dtype), input_precision=PRECISION)

    if STORE_DINITIAL:
        tl.store(dinitial_state + o_state, b_ds, mask=m_kv)

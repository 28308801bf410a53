# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Fourth backward kernel: cotangents of the scores of a span of chunks, one program per span and value head.

With ``e`` and ``Y`` as the two walks left them, ``w = beta e`` and ``dV = beta Y``:

    dP = dO w^T              dL = -dV w^T              dbeta = rowsum(Y e)

None of them depends on where chunks begin, so a span is treated as one chunk here.
"""

import triton
import triton.language as tl

from kda_optimized.activations import strength, strength_pullback
from kda_optimized.chunks import load_column, load_tile, locate_chunk
from kda_optimized.products import scaled_rows


@triton.jit
def load_scaled(p_x, p_s, i_tg, o_t, o_v, i_v, m_t, G: tl.constexpr, V: tl.constexpr, NV: tl.constexpr):
    """Load ``[R, BV]`` of what the walks wrote token by token, as stored, and the scales ``[R]`` of that tile, from row ``i_tg`` on."""
    o_x = o_t[:, None] * (G * V) + o_v[None, :]
    b_x = tl.load(p_x + i_tg * V + o_x, mask=m_t[:, None] & (o_v < V)[None, :], other=0.0)
    return b_x, tl.load(p_s + i_tg * NV + o_t * (G * NV) + i_v, mask=m_t, other=0.0)


@triton.jit
def operand_rows(b_x, EXACT: tl.constexpr):
    """Return float32 rows in the operand dtype, and their scales."""
    b_h = b_x
    b_s = tl.max(tl.zeros_like(b_x), axis=1) + 1.0
    if not EXACT:
        b_h, b_s = scaled_rows(b_x)
    return b_h, b_s


@triton.jit(do_not_specialize=["T", "first_span"])
def kda_chunk_bwd_pairs_kernel(
    beta, errors, error_scales, pulled, pulled_scales, do, dscores, dbeta, span_table, first_span,
    stride_ob, stride_ot, stride_oh, stride_ov, stride_bb, stride_bt, stride_bh, T,
    G: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr, HAS_DO: tl.constexpr,
    USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr,
    HAS_DSCORES: tl.constexpr, HAS_DBETA: tl.constexpr,
):  # fmt: skip
    """Write ``dP`` and ``dL`` of one span and value head, unmasked, and the gradient of beta or its logit."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_s = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    i_b, t_0, t_g, n_t = locate_chunk(first_span + i_s, span_table, T)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_t
    i_tg = t_g * G + i_g
    b_x = load_column(beta, i_b, i_g, t_0, o_t, m_t, stride_bb, stride_bt, stride_bh)
    b_b = strength(b_x, USE_SIGMOID, CEILING)
    b_dP = tl.zeros((BT, BT), dtype=tl.float32)
    b_Ye = tl.zeros((BT, BT), dtype=tl.float32)
    for i_v in range(NV):
        o_v = i_v * BV + tl.arange(0, BV)
        b_e, b_es = load_scaled(errors, error_scales, i_tg, o_t, o_v, i_v, m_t, G, V, NV)
        b_Y, b_Ys = load_scaled(pulled, pulled_scales, i_tg, o_t, o_v, i_v, m_t, G, V, NV)
        b_Ye += tl.dot(b_Y, tl.trans(b_e), input_precision="ieee") * b_Ys[:, None] * b_es[None, :]
        if HAS_DO & HAS_DSCORES:
            m_tv = m_t[:, None] & (o_v < V)[None, :]
            b_do = load_tile(do, i_b, i_g, t_0, o_t, o_v, m_tv, stride_ob, stride_ot, stride_oh, stride_ov)
            b_do, b_dos = operand_rows(b_do, EXACT)
            b_dP += tl.dot(b_do, tl.trans(b_e), input_precision="ieee") * b_dos[:, None] * b_es[None, :]
    if HAS_DSCORES:
        p_tt = dscores + (i_s.to(tl.int64) * G + i_g) * (2 * BT * BT) + o_t[:, None] * BT + o_t[None, :]
        tl.store(p_tt, b_dP * b_b[None, :])
        tl.store(p_tt + BT * BT, -b_Ye * b_b[:, None] * b_b[None, :])
    if HAS_DBETA:
        b_db = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_Ye, 0.0), axis=1)
        tl.store(dbeta + i_tg + o_t * G, strength_pullback(b_db, b_x, USE_SIGMOID, CEILING), mask=m_t)

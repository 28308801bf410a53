# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Multi-query attention of one token a row over paged latents, the length split over programs.

Of each part of a row's tokens, over which ``l`` runs, and each head:

    z_l = scale q . x_l        m = max z        part = sum exp(z_l - m) c_l / sum exp(z_l - m)        lse = m + log sum exp(z_l - m)

A token's ``x`` is its latent ``c`` and the key part that all heads share; what is summed is the latent, so a token is read once for
both products and all heads. The parts are joined by ``o = sum_s w_s part_s / sum_s w_s`` with ``w_s = exp(lse_s - max lse)``. Logarithms
are to base two.
"""

import triton
import triton.language as tl

from kda_optimized.activations import LOG2_E


@triton.jit
def page_of(p_t, o_l, m_l, num_pages, stride_tw, PAGE: tl.constexpr):
    """Return the pages in which tokens of a row lie, -1 for tokens that are not, and pages out of range."""
    i_p = tl.load(p_t + (o_l // PAGE) * stride_tw, mask=m_l, other=-1).to(tl.int64)
    return tl.where(i_p < num_pages, i_p, -1)


@triton.jit
def kda_latent_part_kernel(
    q, pages, table, lengths, parts, lse, stride_qn, stride_qh, stride_qc, stride_pn, stride_pl, stride_pc, stride_tn, stride_tw, stride_ln,
    scale, num_pages, capacity, num_splits,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Attend to one part of one row's tokens with BH of its heads."""
    NH: tl.constexpr = (H + BH - 1) // BH
    i_s = tl.program_id(0) % num_splits
    o_h = tl.program_id(0) // num_splits % NH * BH + tl.arange(0, BH)
    i_n = (tl.program_id(0) // num_splits // NH).to(tl.int64)
    length = tl.minimum(tl.load(lengths + i_n * stride_ln).to(tl.int64), capacity)
    # Parts of whole tiles, as equal as can be.
    part = (length + num_splits * BL - 1) // (num_splits * BL) * BL
    first = i_s * part
    last = tl.minimum(first + part, length)
    o_p = tl.arange(0, BP)
    m_h = o_h < H
    p_q = q + i_n * stride_qn + o_h[:, None] * stride_qh
    # The two halves of the channels are two chains of products, so that one does not wait for the other.
    o_cl = tl.arange(0, BR // 2)
    o_cr = BR // 2 + o_cl
    b_ql = tl.load(p_q + o_cl[None, :] * stride_qc, mask=m_h[:, None] & (o_cl < R)[None, :], other=0.0)
    b_qr = tl.load(p_q + o_cr[None, :] * stride_qc, mask=m_h[:, None] & (o_cr < R)[None, :], other=0.0)
    b_qs = tl.load(p_q + (R + o_p)[None, :] * stride_qc, mask=m_h[:, None] & (o_p < P)[None, :], other=0.0)
    p_t = table + i_n * stride_tn
    b_m = tl.full((BH,), float("-inf"), dtype=tl.float32)
    # Summed over the tokens of a tile at the end only: a sum crosses warps.
    b_lt = tl.zeros((BH, BL), dtype=tl.float32)
    b_accl = tl.zeros((BH, BR // 2), dtype=tl.float32)
    b_accr = tl.zeros((BH, BR // 2), dtype=tl.float32)
    # A tile that lies in one page is looked up once, ahead of the loads that wait for it.
    WITHIN: tl.constexpr = PAGE % BL == 0
    o_x = tl.arange(0, BL) * stride_pl
    i_next = page_of(p_t, first, first < last, num_pages, stride_tw, PAGE)
    for t in range(first, last, BL):
        o_l = t + tl.arange(0, BL)
        m_l = o_l < last
        if WITHIN:
            i_p = i_next
            i_next = page_of(p_t, t + BL, t + BL < last, num_pages, stride_tw, PAGE)
            p_x = pages + (tl.maximum(i_p, 0) * stride_pn + t % PAGE * stride_pl) + o_x[:, None]
        else:
            i_p = page_of(p_t, o_l, m_l, num_pages, stride_tw, PAGE)
            p_x = pages + (tl.maximum(i_p, 0) * stride_pn + (o_l % PAGE) * stride_pl)[:, None]
        m_x = m_l & (i_p >= 0)
        b_cl = tl.load(p_x + o_cl[None, :] * stride_pc, mask=m_x[:, None] & (o_cl < R)[None, :], other=0.0)
        b_cr = tl.load(p_x + o_cr[None, :] * stride_pc, mask=m_x[:, None] & (o_cr < R)[None, :], other=0.0)
        b_s = tl.load(p_x + (R + o_p)[None, :] * stride_pc, mask=m_x[:, None] & (o_p < P)[None, :], other=0.0)
        # Scaled before they are added: a plain sum would be made one chain again.
        b_zl = tl.dot(b_ql, tl.trans(b_cl), input_precision="ieee") * (scale * LOG2_E)
        b_zr = tl.dot(b_qr, tl.trans(b_cr), input_precision="ieee")
        b_zr = tl.dot(b_qs, tl.trans(b_s), b_zr, input_precision="ieee") * (scale * LOG2_E)
        b_z = tl.where(m_l[None, :], b_zl + b_zr, float("-inf"))
        b_next = tl.maximum(b_m, tl.max(b_z, axis=1))
        b_decay = tl.exp2(b_m - b_next)
        b_e = tl.exp2(b_z - b_next[:, None])
        b_lt = b_lt * b_decay[:, None] + b_e
        b_e = b_e.to(b_cl.dtype)
        b_accl = tl.dot(b_e, b_cl, b_accl * b_decay[:, None], input_precision="ieee")
        b_accr = tl.dot(b_e, b_cr, b_accr * b_decay[:, None], input_precision="ieee")
        b_m = b_next
    b_l = tl.sum(b_lt, axis=1)
    i_o = (i_n * H + o_h).to(tl.int64) * num_splits + i_s
    # A part without tokens has weight zero, and its sums are never read; one that holds NaN must not look like that.
    tl.store(lse + i_o, tl.where(b_l == 0, float("-inf"), b_m + tl.log2(b_l)), mask=m_h)
    tl.store(parts + i_o[:, None] * R + o_cl[None, :], b_accl / b_l[:, None], mask=m_h[:, None] & (o_cl < R)[None, :])
    tl.store(parts + i_o[:, None] * R + o_cr[None, :], b_accr / b_l[:, None], mask=m_h[:, None] & (o_cr < R)[None, :])


@triton.jit
def kda_latent_join_kernel(
    parts, lse, o, num_splits, R: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Join the parts of one head of one row for BR of its channels."""
    NR: tl.constexpr = (R + BR - 1) // BR
    i_h = (tl.program_id(0) // NR).to(tl.int64)
    o_r = tl.program_id(0) % NR * BR + tl.arange(0, BR)
    o_s = tl.arange(0, BS)
    b_m = tl.full((), float("-inf"), dtype=tl.float32)
    for s in range(0, num_splits, BS):
        b_lse = tl.load(lse + i_h * num_splits + s + o_s, mask=s + o_s < num_splits, other=float("-inf"))
        b_m = tl.maximum(b_m, tl.max(b_lse, axis=0))
    b_l = tl.zeros((), dtype=tl.float32)
    b_o = tl.zeros((BR,), dtype=tl.float32)
    for s in range(0, num_splits, BS):
        b_lse = tl.load(lse + i_h * num_splits + s + o_s, mask=s + o_s < num_splits, other=float("-inf"))
        m_s = b_lse != float("-inf")
        b_w = tl.where(m_s, tl.exp2(b_lse - b_m), 0.0)
        p_x = parts + (i_h * num_splits + s + o_s)[:, None] * R + o_r[None, :]
        b_x = tl.load(p_x, mask=m_s[:, None] & (o_r < R)[None, :], other=0.0)
        b_o += tl.sum(b_w[:, None] * b_x, axis=0)
        b_l += tl.sum(b_w, axis=0)
    b_o = tl.where(b_l == 0, 0.0, b_o / b_l)
    tl.store(o + i_h * R + o_r, b_o.to(o.dtype.element_ty), mask=o_r < R)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The gated norm behind the operator, forward and backward [KL eq. 10].

    r = 1 / sqrt(mean(x^2) + eps)        u = r x        y = act(g) w u        act(g) = sigmoid(g), or g sigmoid(g)

    h = act(g) w dy        dx = r (h - u mean(h u))        dg = act'(g) w u dy        dw = sum over rows of act(g) u dy

A tile is a few whole rows. Backward, a program takes many tiles: the sum of the programs' rows for the weight is a kernel of its own.
"""

import triton
import triton.language as tl

from kda_optimized.activations import sigmoid, sigmoid_and_slope


@triton.jit
def load_rows(p_x, o_r, o_d, m_rd, stride_r, stride_d):
    """Load ``[BR, BD]``, zero off the mask."""
    return tl.load(p_x + o_r[:, None] * stride_r + o_d[None, :] * stride_d, mask=m_rd, other=0.0)


@triton.jit
def kda_norm_fwd_kernel(
    x, gate, weight, y, stride_xr, stride_xd, stride_gr, stride_gd, stride_wd, eps, num_rows,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, SWISH: tl.constexpr,
):  # fmt: skip
    """Normalise BR rows and multiply with their gates."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_rd = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    b_x = load_rows(x, o_r, o_d, m_rd, stride_xr, stride_xd).to(tl.float32)
    b_g = load_rows(gate, o_r, o_d, m_rd, stride_gr, stride_gd).to(tl.float32)
    b_w = tl.load(weight + o_d * stride_wd, mask=o_d < D, other=0.0).to(tl.float32)
    b_r = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) / D + eps)
    b_act = sigmoid(b_g)
    if SWISH:
        b_act = b_act * b_g
    b_y = b_act * b_w[None, :] * (b_x * b_r[:, None])
    tl.store(y + o_r[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m_rd)


@triton.jit
def kda_norm_bwd_kernel(
    x, gate, weight, dy, dx, dgate, dweight, stride_xr, stride_xd, stride_gr, stride_gd, stride_wd, stride_yr, stride_yd,
    eps, num_rows, num_programs,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, SWISH: tl.constexpr,
):  # fmt: skip
    """Pull every num_programs-th tile of BR rows back; what they add to the weight's gradient has a row of its own."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD).to(tl.int64)
    b_w = tl.load(weight + o_d * stride_wd, mask=o_d < D, other=0.0).to(tl.float32)
    b_dw = tl.zeros((BR, BD), dtype=tl.float32)
    o_r = i_p * BR + tl.arange(0, BR)
    m_rd = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    b_xn = load_rows(x, o_r, o_d, m_rd, stride_xr, stride_xd)
    b_gn = load_rows(gate, o_r, o_d, m_rd, stride_gr, stride_gd)
    b_yn = load_rows(dy, o_r, o_d, m_rd, stride_yr, stride_yd)
    for _ in range(i_p * BR, num_rows, num_programs * BR):
        b_x, b_g, b_dy = b_xn.to(tl.float32), b_gn.to(tl.float32), b_yn.to(tl.float32)
        p_rd, m_stored = o_r[:, None] * D + o_d[None, :], m_rd
        # The next tile is under way while this one is worked on.
        o_r += num_programs * BR
        m_rd = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
        b_xn = load_rows(x, o_r, o_d, m_rd, stride_xr, stride_xd)
        b_gn = load_rows(gate, o_r, o_d, m_rd, stride_gr, stride_gd)
        b_yn = load_rows(dy, o_r, o_d, m_rd, stride_yr, stride_yd)
        b_r = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) / D + eps)
        b_u = b_x * b_r[:, None]
        b_s, b_slope = sigmoid_and_slope(b_g)
        if SWISH:
            b_slope = b_s + b_g * b_slope
            b_s = b_s * b_g
        b_t = b_u * b_dy
        b_wt = b_w[None, :] * b_t
        b_mean = tl.sum(b_s * b_wt, axis=1) / D
        b_dx = b_r[:, None] * (b_s * b_w[None, :] * b_dy - b_u * b_mean[:, None])
        tl.store(dx + p_rd, b_dx.to(dx.dtype.element_ty), mask=m_stored)
        tl.store(dgate + p_rd, (b_slope * b_wt).to(dgate.dtype.element_ty), mask=m_stored)
        b_dw += b_s * b_t
    tl.store(dweight + i_p * D + o_d, tl.sum(b_dw, axis=0), mask=o_d < D)

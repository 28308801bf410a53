# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
"""The short convolution in front of the operator, forward, backward and by steps [KL fig. 3].

    a_p = sum_{j < W} w_j x_{p - W + 1 + j}        y = silu(a), or a        x at positions -(W - 1)..-1 is the tail

Backward, with ``da = dy act'(a)``, which is made again from the inputs wherever it is read:

    dx_p = sum_j w_j da_{p + W - 1 - j}            dw_j = sum_p da_p x_{p - W + 1 + j}

The last W - 1 inputs are the final tail, whose cotangent is added to those of the inputs it holds. Positions below zero are inputs of
the tail, so its gradient is the same formula.

A program walks along the tokens of a chunk with a lane's channels side by side, so that a token is loaded, converted and, backward, its
activation made once: what the next W - 1 tokens need of it stays in registers. ``AHEAD`` rows are under way while as many are worked on.
"""

import triton
import triton.language as tl

from kda_optimized.activations import silu, silu_slope
from kda_optimized.chunks import locate_chunk
from kda_optimized.slot_rows import locate_row, starting_slot, store_slot

AHEAD = tl.constexpr(4)


@triton.jit
def load_taps(weight, o_d, m_d, stride_wd, stride_ww, W: tl.constexpr, BW: tl.constexpr):
    """Return the W taps of BD channels, oldest first, each ``[BD]`` in float32.

    A channel's taps are loaded together, which takes strides that are known when the kernel is compiled.
    """
    o_w = tl.arange(0, BW)
    p_w = weight + o_d[:, None] * stride_wd + o_w[None, :] * stride_ww
    b_w = tl.load(p_w, mask=m_d[:, None] & (o_w < W)[None, :], other=0.0).to(tl.float32)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.sum(tl.where((o_w == j)[None, :], b_w, 0.0), axis=1),)
    return taps


@triton.jit
def tap_sum(taps, inputs, W: tl.constexpr):
    """Return the sum over the taps ``[BD]`` of W inputs, fused as written: a call and its steps have the same bits."""
    b_a = taps[0] * inputs[0]
    for j in tl.static_range(1, W):
        b_a = tl.fma(taps[j], inputs[j], b_a)
    return b_a


@triton.jit
def known_row(p_x, p_tail, p, n_t, m_d, stride_xt, stride_us, S: tl.constexpr, HAS_TAIL: tl.constexpr):
    """Return ``[BD]``, as it lies in memory: the input at a position of one sequence, of the tail before its beginning, zero elsewhere."""
    b_x = tl.load(p_x + p * stride_xt, mask=m_d & (p >= 0) & (p < n_t), other=0.0)
    if HAS_TAIL:  # noqa: SIM102 - decided when the kernel is compiled
        if p < 0:
            b_x = tl.load(p_tail + (p + S) * stride_us, mask=m_d & (p >= -S), other=0.0)
    return b_x


@triton.jit
def known(p_x, p_tail, o_p, n_t, m_d, stride_xt, stride_us, S: tl.constexpr, HAS_TAIL: tl.constexpr):
    """Return ``[BP, BD]``: inputs at positions of one sequence, those before its beginning from the tail, zero where there are none."""
    m_p = (o_p >= 0) & (o_p < n_t)
    b_x = tl.load(p_x + o_p[:, None] * stride_xt, mask=m_p[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    if HAS_TAIL:
        m_u = (o_p < 0) & (o_p >= -S)
        b_x += tl.load(p_tail + (o_p[:, None] + S) * stride_us, mask=m_u[:, None] & m_d[None, :], other=0.0).to(
            tl.float32
        )
    return b_x


@triton.jit
def pulled(p_x, p_tail, p_dy, p_w, o_p, n_t, m_d, stride_xt, stride_us, stride_yt, stride_ww,
           W: tl.constexpr, HAS_TAIL: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Return ``da`` ``[BP, BD]`` at positions of one sequence, zero where there is no output."""
    m_p = (o_p >= 0) & (o_p < n_t)
    b_da = tl.load(p_dy + o_p[:, None] * stride_yt, mask=m_p[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    if SILU:
        b_a = tl.zeros_like(b_da)
        for j in tl.static_range(W):
            b_w = tl.load(p_w + j * stride_ww, mask=m_d, other=0.0).to(tl.float32)
            b_a += b_w[None, :] * known(p_x, p_tail, o_p - (W - 1 - j), n_t, m_d, stride_xt, stride_us, W - 1, HAS_TAIL)
        b_da = b_da * silu_slope(b_a)
    return b_da


@triton.jit
def input_gradient(p_x, p_tail, p_dy, p_w, p_final, o_p, n_t, m_d, stride_xt, stride_us, stride_yt, stride_ww, stride_fs,
                   W: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_FINAL: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Return the gradient ``[BP, BD]`` of the inputs at positions of one sequence, those of the tail included."""
    b_dx = tl.zeros_like(o_p).to(tl.float32)[:, None] + tl.zeros_like(m_d).to(tl.float32)[None, :]
    for u in tl.static_range(W):
        b_w = tl.load(p_w + (W - 1 - u) * stride_ww, mask=m_d, other=0.0).to(tl.float32)
        b_dx += b_w[None, :] * pulled(
            p_x, p_tail, p_dy, p_w, o_p + u, n_t, m_d, stride_xt, stride_us, stride_yt, stride_ww, W, HAS_TAIL, SILU
        )
    if HAS_FINAL:
        o_s = o_p - n_t + (W - 1)
        m_s = (o_s >= 0) & (o_s < W - 1)
        b_dx += tl.load(p_final + o_s[:, None] * stride_fs, mask=m_s[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    return b_dx


@triton.jit(do_not_specialize=["T"])
def kda_convolution_fwd_kernel(
    x, weight, tail, y, chunk_table, stride_xb, stride_xt, stride_xd, stride_un, stride_us, stride_ud, T,
    stride_wd: tl.constexpr, stride_ww: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, HAS_TAIL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve one chunk of tokens of BD channels."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_c = (tl.program_id(0) // ND).to(tl.int64)
    o_d = (tl.program_id(0) % ND * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    i_b, t_0, t_g, n_rest = locate_chunk(i_c, chunk_table, T)
    i_n = tl.load(chunk_table + 5 * i_c + 3)
    t_s = tl.load(chunk_table + 5 * i_c + 4) * BT
    n_t = t_s + n_rest
    end = tl.minimum(t_s + BT, n_t)
    p_x = x + i_b * stride_xb + (t_0 - t_s) * stride_xt + o_d * stride_xd
    p_tail = tail + i_n * stride_un + o_d * stride_ud
    p_y = y + (t_g - t_s) * D + o_d
    rows = ()
    for i in tl.static_range(AHEAD):
        rows = rows + (tl.load(p_x + (t_s + i) * stride_xt, mask=m_d & (t_s + i < end), other=0.0),)
    taps = load_taps(weight, o_d, m_d, stride_wd, stride_ww, W, BW)
    past = ()
    for j in tl.static_range(W - 1):
        b_x = known_row(p_x, p_tail, t_s + j - (W - 1), n_t, m_d, stride_xt, stride_us, W - 1, HAS_TAIL)
        past = past + (b_x.to(tl.float32),)
    for t in range(t_s, end, AHEAD):
        ahead = ()
        for i in tl.static_range(AHEAD):
            p = t + AHEAD + i
            ahead = ahead + (tl.load(p_x + p * stride_xt, mask=m_d & (p < end), other=0.0),)
        for i in tl.static_range(AHEAD):
            past = past + (rows[i].to(tl.float32),)
            b_y = tap_sum(taps, past, W)
            past = past[1:]
            if SILU:
                b_y = silu(b_y)
            tl.store(p_y + (t + i) * D, b_y.to(y.dtype.element_ty), mask=m_d & (t + i < end))
        rows = ahead


@triton.jit(do_not_specialize=["T"])
def kda_convolution_tail_kernel(
    x, tail, final_tail, cu_seqlens, stride_xb, stride_xt, stride_xd, stride_un, stride_us, stride_ud, T,
    D: tl.constexpr, W: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """Copy the last W - 1 inputs of one sequence, the tail's included, for BD channels."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_n = (tl.program_id(0) // ND).to(tl.int64)
    o_d = (tl.program_id(0) % ND * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    t_g = tl.load(cu_seqlens + i_n)
    n_t = tl.load(cu_seqlens + i_n + 1) - t_g
    i_b = t_g // tl.maximum(T, 1)
    o_s = tl.arange(0, BS)
    p_x = x + i_b * stride_xb + (t_g - i_b * T) * stride_xt + o_d[None, :] * stride_xd
    p_tail = tail + i_n * stride_un + o_d[None, :] * stride_ud
    b_x = known(p_x, p_tail, n_t - (W - 1) + o_s, n_t, m_d, stride_xt, stride_us, W - 1, HAS_TAIL)
    p_f = final_tail + (i_n * (W - 1) + o_s)[:, None] * D + o_d[None, :]
    tl.store(p_f, b_x.to(final_tail.dtype.element_ty), mask=(o_s < W - 1)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["T"])
def kda_convolution_bwd_kernel(
    x, weight, tail, dy, dfinal, dx, dweight, chunk_table,
    stride_xb, stride_xt, stride_xd, stride_un, stride_us, stride_ud,
    stride_yb, stride_yt, stride_yd, stride_fn, stride_fs, stride_fd, T,
    stride_wd: tl.constexpr, stride_ww: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_FINAL: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Pull one chunk of tokens of BD channels back; what the chunk adds to the weight's gradient has a row of its own."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_c = (tl.program_id(0) // ND).to(tl.int64)
    o_d = (tl.program_id(0) % ND * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    i_b, t_0, t_g, n_rest = locate_chunk(i_c, chunk_table, T)
    i_n = tl.load(chunk_table + 5 * i_c + 3)
    t_s = tl.load(chunk_table + 5 * i_c + 4) * BT
    n_t = t_s + n_rest
    end = tl.minimum(t_s + BT, n_t)
    # An input is pulled back once the W - 1 outputs behind it are.
    last = end + (W - 1)
    p_x = x + i_b * stride_xb + (t_0 - t_s) * stride_xt + o_d * stride_xd
    p_tail = tail + i_n * stride_un + o_d * stride_ud
    p_dy = dy + i_b * stride_yb + (t_0 - t_s) * stride_yt + o_d * stride_yd
    p_final = dfinal + i_n * stride_fn + o_d * stride_fd
    p_dx = dx + (t_g - t_s) * D + o_d
    rows, cotangents = (), ()
    for i in tl.static_range(AHEAD):
        m_t = m_d & (t_s + i < tl.minimum(last, n_t))
        rows = rows + (tl.load(p_x + (t_s + i) * stride_xt, mask=m_t, other=0.0),)
        cotangents = cotangents + (tl.load(p_dy + (t_s + i) * stride_yt, mask=m_t, other=0.0),)
    taps = load_taps(weight, o_d, m_d, stride_wd, stride_ww, W, BW)
    sums, past, pulled_rows = (), (), ()
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros((BD,), dtype=tl.float32),)
    for j in tl.static_range(W - 1):
        b_x = known_row(p_x, p_tail, t_s + j - (W - 1), n_t, m_d, stride_xt, stride_us, W - 1, HAS_TAIL)
        past = past + (b_x.to(tl.float32),)
        pulled_rows = pulled_rows + (tl.zeros((BD,), dtype=tl.float32),)
    for t in range(t_s, last, AHEAD):
        ahead, cotangents_ahead = (), ()
        for i in tl.static_range(AHEAD):
            p = t + AHEAD + i
            m_t = m_d & (p < tl.minimum(last, n_t))
            ahead = ahead + (tl.load(p_x + p * stride_xt, mask=m_t, other=0.0),)
            cotangents_ahead = cotangents_ahead + (tl.load(p_dy + p * stride_yt, mask=m_t, other=0.0),)
        for i in tl.static_range(AHEAD):
            past = past + (rows[i].to(tl.float32),)
            b_da = cotangents[i].to(tl.float32)
            if SILU:
                b_da = b_da * silu_slope(tap_sum(taps, past, W))
            b_own = tl.where(t + i < end, b_da, 0.0)
            added = ()
            for j in tl.static_range(W):
                added = added + (sums[j] + b_own * past[j],)
            sums = added
            past = past[1:]
            pulled_rows = pulled_rows + (b_da,)
            b_dx = taps[W - 1] * pulled_rows[0]
            for j in tl.static_range(1, W):
                b_dx += taps[W - 1 - j] * pulled_rows[j]
            pulled_rows = pulled_rows[1:]
            p = t + i - (W - 1)
            if HAS_FINAL:  # noqa: SIM102 - decided when the kernel is compiled
                if (p >= n_t - (W - 1)) & (p < end):
                    b_dx += tl.load(p_final + (p - n_t + (W - 1)) * stride_fs, mask=m_d, other=0.0).to(tl.float32)
            tl.store(p_dx + p * D, b_dx.to(dx.dtype.element_ty), mask=m_d & (p >= t_s) & (p < end))
        rows, cotangents = ahead, cotangents_ahead
    for j in tl.static_range(W):
        tl.store(dweight + (i_c * W + j) * D + o_d, sums[j], mask=m_d)


@triton.jit(do_not_specialize=["T"])
def kda_convolution_bwd_tail_kernel(
    x, weight, tail, dy, dfinal, dtail, cu_seqlens,
    stride_xb, stride_xt, stride_xd, stride_wd, stride_ww, stride_un, stride_us, stride_ud,
    stride_yb, stride_yt, stride_yd, stride_fn, stride_fs, stride_fd, T,
    D: tl.constexpr, W: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_FINAL: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Return the gradient of one sequence's tail for BD channels."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_n = (tl.program_id(0) // ND).to(tl.int64)
    o_d = (tl.program_id(0) % ND * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    t_g = tl.load(cu_seqlens + i_n)
    n_t = tl.load(cu_seqlens + i_n + 1) - t_g
    i_b = t_g // tl.maximum(T, 1)
    t_0 = t_g - i_b * T
    o_s = tl.arange(0, BS)
    b_du = input_gradient(
        x + i_b * stride_xb + t_0 * stride_xt + o_d[None, :] * stride_xd,
        tail + i_n * stride_un + o_d[None, :] * stride_ud,
        dy + i_b * stride_yb + t_0 * stride_yt + o_d[None, :] * stride_yd,
        weight + o_d * stride_wd,
        dfinal + i_n * stride_fn + o_d[None, :] * stride_fd,
        o_s - (W - 1), n_t, m_d, stride_xt, stride_us, stride_yt, stride_ww, stride_fs, W, HAS_TAIL, HAS_FINAL, SILU,
    )  # fmt: skip
    p_du = dtail + (i_n * (W - 1) + o_s)[:, None] * D + o_d[None, :]
    tl.store(p_du, b_du.to(dtail.dtype.element_ty), mask=(o_s < W - 1)[:, None] & m_d[None, :])


@triton.jit
def leave_tail(tails, i_u, num_slots, past, o_d, m_d, stride_us, stride_ut, stride_ud, S: tl.constexpr):
    """Write the last S inputs to a slot, if there is such a slot."""
    for j in tl.static_range(S):
        store_slot(tails + j * stride_ut, i_u, num_slots, past[j], o_d * stride_ud, m_d, stride_us)


@triton.jit
def kda_convolution_step_kernel(
    x, weight, tails, y, cu_seqlens, tail_indices, source_indices, num_accepted_tokens, has_initial,
    stride_xb, stride_xt, stride_xd, stride_us, stride_ut, stride_ud,
    stride_in, stride_iw, stride_on, stride_an, stride_hn, T, N, num_slots,
    stride_wd: tl.constexpr, stride_ww: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
    HAS_SOURCE: tl.constexpr, HAS_ACCEPTED: tl.constexpr, HAS_FLAG: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve the tokens of one row for BD channels, its tail in registers, and leave tails in slots as the operator leaves states."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_n = (tl.program_id(0) // ND).to(tl.int64)
    o_d = (tl.program_id(0) % ND * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    i_b, t_0, n_t = locate_row(cu_seqlens, i_n, T, PACKED)
    if PACKED:  # noqa: SIM102 - decided when the kernel is compiled
        # A bucket may be longer than its rows.
        if i_n == N - 1:
            for t in range(t_0 + n_t, T):
                tl.store(y + t * D + o_d, tl.zeros((BD,), dtype=tl.float32).to(y.dtype.element_ty), mask=m_d)
    p_y = y + (i_b * T + t_0) * D + o_d
    i_u = starting_slot(
        tail_indices, source_indices, num_accepted_tokens, i_n, stride_in, stride_iw, stride_on, stride_an,
        M, HAS_SOURCE, HAS_ACCEPTED,
    )  # fmt: skip
    i_last = tl.load(tail_indices + i_n * stride_in).to(tl.int64)
    # A row that is padding runs along on zeros, as in the operator's step.
    there = (i_u >= 0) & (i_u < num_slots)
    num_left = tl.where(there, num_slots, 0)
    m_u = m_d & there
    if HAS_FLAG:
        m_u = m_u & (tl.load(has_initial + i_n * stride_hn) != 0)
    past = ()
    for j in tl.static_range(W - 1):
        b_u = tl.load(tails + i_u * stride_us + j * stride_ut + o_d * stride_ud, mask=m_u, other=0.0)
        past = past + (b_u.to(tl.float32),)
    taps = load_taps(weight, o_d, m_d, stride_wd, stride_ww, W, BW)
    p_x = x + i_b * stride_xb + t_0 * stride_xt + o_d * stride_xd
    for t in range(n_t):
        past = past + (tl.load(p_x, mask=m_d, other=0.0).to(tl.float32),)
        b_y = tap_sum(taps, past, W)
        if SILU:
            b_y = silu(b_y)
        tl.store(p_y, tl.where(there, b_y, 0.0).to(y.dtype.element_ty), mask=m_d)
        past = past[1:]
        if M > 1:  # noqa: SIM102 - decided when the kernel is compiled
            if n_t <= M:
                i_u = tl.load(tail_indices + i_n * stride_in + t * stride_iw).to(tl.int64)
                leave_tail(tails, i_u, num_left, past, o_d, m_d, stride_us, stride_ut, stride_ud, W - 1)
        p_x += stride_xt
        p_y += D
    if (M == 1) | (n_t == 0) | (n_t > M):
        leave_tail(tails, i_last, num_left, past, o_d, m_d, stride_us, stride_ut, stride_ud, W - 1)

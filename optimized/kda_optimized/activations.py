"""Device functions: tiles of the operator's variables, with the activations applied on the way in.

Everything is float32 in registers. Rows beyond the end of a sequence and columns beyond the head width are zero, which is the
identity token: no decay, no write, no output.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    # log1p in two operations: the quotient undoes the rounding of 1 + e.
    e = tl.exp(tl.minimum(x, 30.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 30.0, x, log1p)


@triton.jit
def load_rows(p_base, o_t, m_t, o_d, D: tl.constexpr, stride):
    """Return a tile ``[BT, BD]`` of a tensor ``[tokens, heads, D]`` whose head offset is already in ``p_base``."""
    return tl.load(p_base + o_t[:, None] * stride + o_d[None, :], mask=m_t[:, None] & (o_d[None, :] < D), other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(b_x):
    return 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) + 1e-6)


@triton.jit
def load_gate_logit(p_g, p_bias, o_t, m_t, o_k, K: tl.constexpr, stride, HAS_BIAS: tl.constexpr):
    """Return ``x + b`` ``[BT, BK]``; the bias is that of the tile's value head."""
    b_x = load_rows(p_g, o_t, m_t, o_k, K, stride)
    if HAS_BIAS:
        b_x += tl.load(p_bias + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    return b_x


@triton.jit
def log_decay(b_x, b_slope, lower_bound, m_t, o_k, K: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr):
    """Return the log decay ``[BT, BK]`` in nats of a logit tile, or the tile itself when the gate is applied outside."""
    b_g = b_x
    if USE_GATE:
        if BOUNDED:
            b_g = lower_bound * sigmoid(b_slope * b_x)
        else:
            b_g = -b_slope * softplus(b_x)
    return tl.where(m_t[:, None] & (o_k[None, :] < K), b_g, 0.0)


@triton.jit
def load_slope(p_a_log, HAS_A: tl.constexpr):
    b_slope = 1.0
    if HAS_A:
        b_slope = tl.exp(tl.load(p_a_log).to(tl.float32))
    return b_slope


@triton.jit
def load_strength(p_beta, o_t, m_t, stride, SIGMOID: tl.constexpr, CEILING: tl.constexpr):
    """Return beta ``[BT]``."""
    b_beta = tl.load(p_beta + o_t * stride, mask=m_t, other=0.0).to(tl.float32)
    if SIGMOID:
        b_beta = tl.where(m_t, CEILING * sigmoid(b_beta), 0.0)
    return b_beta

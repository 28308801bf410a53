# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device functions for what stands in front of the operator: normalised q and k, the two gates, the write strength.

    normalise      y = x / sqrt(sum x^2 + 1e-6)
    softplus gate  log_decay = -exp(A) softplus(x + bias)
    bounded gate   log_decay = lower_bound sigmoid(exp(A) (x + bias))
    strength       beta = c sigmoid(x), c = 2 with negative eigenvalues

Two limits keep saturated gates finite without changing a float32 result. A log decay below -128 counts as -128, since
``exp(-128)`` is already zero; and the slope is at most ``exp(88)``, the largest that float32 holds.
"""

import triton
import triton.language as tl

L2NORM_EPSILON = tl.constexpr(1e-6)
LOWEST_LOG_DECAY = tl.constexpr(-128.0)
LARGEST_EXPONENT = tl.constexpr(88.0)
# Below this, softplus(x) and sigmoid(x) are exp(x) to less than half a unit in the last place of float32.
EXPONENTIAL_TAIL = tl.constexpr(-17.0)
# Beyond this, sigmoid(z) (1 - sigmoid(z)) z is zero in float32.
SATURATED = tl.constexpr(128.0)


@triton.jit
def inverse_norm(b_x):
    """Return ``1 / sqrt(sum x^2 + 1e-6)`` over the last axis of ``[R, BK]``, ``[R]``."""
    return 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) + L2NORM_EPSILON)


@triton.jit
def sigmoid(b_x):
    """Return ``1 / (1 + exp(-x))`` with full relative accuracy on both sides."""
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit
def softplus(b_x):
    """Return ``log(1 + exp(x))``; the logarithm is ``2 artanh(y / (2 + y))``, because ``log`` near one is inexact on a GPU."""
    b_y = tl.exp(-tl.abs(b_x))
    b_z = b_y / (2.0 + b_y)
    b_s = b_z * b_z
    b_p = b_s * (1.0 / 17.0) + 1.0 / 15.0
    b_p = b_p * b_s + 1.0 / 13.0
    b_p = b_p * b_s + 1.0 / 11.0
    b_p = b_p * b_s + 1.0 / 9.0
    b_p = b_p * b_s + 1.0 / 7.0
    b_p = b_p * b_s + 1.0 / 5.0
    b_p = b_p * b_s + 1.0 / 3.0
    return tl.maximum(b_x, 0.0) + 2.0 * (b_z + b_z * b_s * b_p)


@triton.jit
def gate_slope(A_log, i_g, HAS_A_LOG: tl.constexpr):
    """Return ``A`` of value head ``i_g`` and its exponential, 0 and 1 where there is none."""
    b_A = 0.0
    b_slope = 1.0
    if HAS_A_LOG:
        b_A = tl.load(A_log + i_g).to(tl.float32)
        b_slope = tl.exp(tl.minimum(b_A, LARGEST_EXPONENT))
    return b_A, b_slope


@triton.jit
def log_decay(b_x, b_A, b_slope, lower_bound, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr):
    """Return the log decay of gate logits that already hold the bias; a log decay itself when there is no gate."""
    if USE_GATE:
        if BOUNDED:
            b_g = lower_bound * sigmoid(b_slope * b_x)
        else:
            b_tail = tl.exp(tl.minimum(b_A + b_x, LARGEST_EXPONENT))
            b_g = -tl.where(b_x < EXPONENTIAL_TAIL, b_tail, b_slope * softplus(b_x))
    else:
        b_g = b_x
    return tl.maximum(b_g, LOWEST_LOG_DECAY)


@triton.jit
def log_decay_pullback(b_dg, b_x, b_A, b_slope, lower_bound, BOUNDED: tl.constexpr):
    """Return the gradient of the biased logits, and each element's part of the gradient of ``A``, from that of the log decay."""
    if BOUNDED:
        b_z = b_slope * b_x
        b_dz = b_dg * (lower_bound * sigmoid(b_z) * sigmoid(-b_z))
        b_dA = b_dz * tl.minimum(tl.maximum(b_z, -SATURATED), SATURATED)
        b_dx = b_dz * b_slope
    else:
        b_tail = tl.exp(tl.minimum(b_A + b_x, LARGEST_EXPONENT))
        b_t = b_x < EXPONENTIAL_TAIL
        b_dx = -b_dg * tl.where(b_t, b_tail, b_slope * sigmoid(b_x))
        # A gate closed beyond float32 has a gradient of exactly zero, which must not meet an infinite log decay.
        b_dA = -b_dg * tl.minimum(tl.where(b_t, b_tail, b_slope * softplus(b_x)), 1e30)
    return b_dx, b_dA


@triton.jit
def strength(b_x, USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr):
    """Return the write strength."""
    if USE_SIGMOID:
        b_x = CEILING * sigmoid(b_x)
    return b_x


@triton.jit
def strength_pullback(b_db, b_x, USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr):
    """Return the gradient of the logit from that of the write strength."""
    if USE_SIGMOID:
        b_db = b_db * (CEILING * sigmoid(b_x) * sigmoid(-b_x))
    return b_db

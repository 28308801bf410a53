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

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOG_LOG2_E = tl.constexpr(0.36651292058166435)
L2NORM_EPSILON = tl.constexpr(1e-6)
LOWEST_LOG_DECAY = tl.constexpr(-128.0)
LARGEST_EXPONENT = tl.constexpr(88.0)
# Beyond this, sigmoid(z) (1 - sigmoid(z)) z is zero in float32.
SATURATED = tl.constexpr(128.0)


@triton.jit
def exp(b_x):
    """Return ``exp(x)``, zero where that is subnormal."""
    return tl.exp2(b_x * LOG2_E)


@triton.jit
def sigmoid(b_x):
    """Return ``1 / (1 + exp(-x))`` with full relative accuracy on both sides."""
    b_e = exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit
def silu(b_x):
    """Return ``x sigmoid(x)`` with full relative accuracy on both sides: an exponential that overflows stands for a result of zero."""
    return b_x / (1.0 + exp(-b_x))


@triton.jit
def silu_slope(b_x):
    """Return the derivative of ``x sigmoid(x)``."""
    b_s = 1.0 / (1.0 + exp(-b_x))
    return b_s * (1.0 + b_x * (1.0 - b_s))


@triton.jit
def sigmoid_and_slope(b_x):
    """Return ``s = sigmoid(x)`` and ``s (1 - s)``, both with full relative accuracy on both sides."""
    b_e = exp(-tl.abs(b_x))
    b_larger = 1.0 / (1.0 + b_e)
    b_smaller = b_e * b_larger
    return tl.where(b_x >= 0, b_larger, b_smaller), b_larger * b_smaller


@triton.jit
def log1p_ratio(b_y):
    """Return ``log(1 + y) / y`` on [0, 1]: the interpolating polynomial at nine Chebyshev nodes, relative error ``4e-8``.

    ``log`` near one is inexact on a GPU, and costs more.
    """
    b_p = 0.0051261018961668015
    b_p = b_p * b_y - 0.029074065387248993
    b_p = b_p * b_y + 0.0775160863995552
    b_p = b_p * b_y - 0.13602247834205627
    b_p = b_p * b_y + 0.19076880812644958
    b_p = b_p * b_y - 0.2483539879322052
    b_p = b_p * b_y + 0.3331812024116516
    b_p = b_p * b_y - 0.4999944567680359
    return b_p * b_y + 0.9999999403953552


@triton.jit
def softplus(b_x):
    """Return ``log(1 + exp(x))``, with full relative accuracy on both sides."""
    b_y = exp(-tl.abs(b_x))
    return tl.maximum(b_x, 0.0) + b_y * log1p_ratio(b_y)


@triton.jit
def gate_slope(A_log, i_g, HAS_A_LOG: tl.constexpr):
    """Return ``A`` of value head ``i_g`` and its exponential, 0 and 1 where there is none."""
    b_A = 0.0
    b_slope = 1.0
    if HAS_A_LOG:
        b_A = tl.load(A_log + i_g).to(tl.float32)
        b_slope = exp(tl.minimum(b_A, LARGEST_EXPONENT))
    return b_A, b_slope


@triton.jit
def log2_decay(b_x, b_A, b_slope, lower_bound, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr):
    """Return the base-two log decay of gate logits that already hold the bias, or of a natural log decay when there is no gate."""
    if USE_GATE:
        if BOUNDED:
            b_g = (lower_bound * LOG2_E) * sigmoid(b_slope * b_x)
        else:
            # exp(A) goes into the exponential, so that a large A still meets a small one.
            # In a sum of two products a compiler may fuse either, and takes one in a loop and the other ahead of it; so it is told which.
            b_u = tl.abs(b_x)
            b_tail = log1p_ratio(exp(-b_u)) * tl.exp2(tl.fma(-b_u, LOG2_E, (b_A + LOG_LOG2_E) * LOG2_E))
            b_g = -tl.fma(b_slope * LOG2_E, tl.maximum(b_x, 0.0), b_tail)
    else:
        b_g = b_x * LOG2_E
    return tl.maximum(b_g, LOWEST_LOG_DECAY * LOG2_E)


@triton.jit
def log_decay_pullback(b_dg, b_g, b_x, b_A, b_slope, lower_bound, BOUNDED: tl.constexpr):
    """Return the gradient of the biased logits, and each element's part of the gradient of ``A``, from that of the log decay.

    ``b_g`` is what :func:`log2_decay` makes of the logits.
    """
    if BOUNDED:
        b_z = b_slope * b_x
        b_e = exp(-tl.abs(b_z))
        b_dz = b_dg * (lower_bound * b_e / ((1.0 + b_e) * (1.0 + b_e)))
        b_dA = b_dz * tl.minimum(tl.maximum(b_z, -SATURATED), SATURATED)
        b_dx = b_dz * b_slope
    else:
        # exp(A) sigmoid(x), with one exponential above, so that a large A still meets a small sigmoid.
        b_e = exp(tl.minimum(b_A + tl.minimum(b_x, 0.0), LARGEST_EXPONENT))
        b_dx = -b_dg * (b_e / (1.0 + exp(-tl.abs(b_x))))
        # A log decay is its own derivative by A. One that was limited decays to zero, and so has a gradient of exactly zero.
        b_dA = b_dg * (b_g * LN_2)
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

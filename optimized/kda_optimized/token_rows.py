# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device functions on one token of one head: its loads, and what stands in front of the recurrence.

Loading is apart from computing, so that a kernel asks for a token long before it needs it: what a load is converted to waits for it.
"""

import triton
import triton.language as tl

from kda_optimized.activations import L2NORM_EPSILON, log2_decay, strength


@triton.jit
def load_token(p_q, p_k, p_g, p_v, p_b, m_k, m_v, there):
    """Load q, k and g ``[BK]``, v ``[BV]`` and beta as they lie in memory; zeros where the token is not there."""
    b_q = tl.load(p_q, mask=m_k & there, other=0.0)
    b_k = tl.load(p_k, mask=m_k & there, other=0.0)
    b_g = tl.load(p_g, mask=m_k & there, other=0.0)
    b_v = tl.load(p_v, mask=m_v & there, other=0.0)
    b_b = tl.load(p_b, mask=there, other=0.0)
    return b_q, b_k, b_g, b_v, b_b


@triton.jit
def activated(b_q, b_k, b_g, b_b, b_bias, b_A, b_slope, lower_bound, USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr,
              BOUNDED: tl.constexpr, USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr):  # fmt: skip
    """Return q, k, the decay ``exp g`` and beta of a loaded token in float32, with the activations that are the kernel's."""
    b_q = b_q.to(tl.float32)
    b_k = b_k.to(tl.float32)
    if USE_L2NORM:
        b_q = b_q / tl.sqrt_rn(tl.sum(b_q * b_q, axis=0) + L2NORM_EPSILON)
        b_k = b_k / tl.sqrt_rn(tl.sum(b_k * b_k, axis=0) + L2NORM_EPSILON)
    b_x = b_g.to(tl.float32) + b_bias
    b_d = tl.exp2(log2_decay(b_x, b_A, b_slope, lower_bound, USE_GATE, BOUNDED))
    return b_q, b_k, b_d, strength(b_b.to(tl.float32), USE_SIGMOID, CEILING)

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device functions on a strip: the 16 tokens of a chunk, their channels in slabs, one to a warp, ``[W, 16, BC]``.

With ``G`` the log decay accumulated from the first token of the strip, that token's own excluded [KL eqs. 2-9]:

    q_dec  = scale q exp(G)      k_dec = k exp(G)      k_rest = k exp(G_C - G)
    P_ij = scale q_i k_j exp(G_i - G_j),  i >= j       L_ij = k_i k_j exp(G_i - G_j),  i > j

What is summed over channels is summed in each slab first, so that a warp works on its own registers until the scores are complete.

The decay of the first token is applied to the state, in float32. What is left of a channel's decay is one for that token,
whatever its magnitude, so a channel that has almost forgotten the state keeps its own relative accuracy in 16 bits.
"""

import triton
import triton.language as tl

from kda_optimized.activations import L2NORM_EPSILON, gate_slope, log2_decay
from kda_optimized.chunks import level_mask, sum_decays, tokens_between
from kda_optimized.products import half_scale, pair_product, pair_product_tf32, product_split, split

STRIP = tl.constexpr(16)
STRIP_LEVELS = tl.constexpr(4)
# Binary orders of magnitude by which rows that carry a decay are raised, and normalised ones: the less is known of their length, the less.
RAISE = tl.constexpr(32.0)
RAISE_UNIT = tl.constexpr(96.0)
# Where a decay takes a raised row below this power of two, its pairs go by levels.
LEAST = tl.constexpr(-80.0)


@triton.jit
def load_strip(p_x, i_b, i_h, t_0, o_t, o_k, n_t, K: tl.constexpr, stride_b, stride_t, stride_h, stride_c):
    """Load ``[W, 16, BC]`` of a ``[B, T, heads, channels]`` tensor, zero off the sequence and the channels."""
    p_x += i_b * stride_b + i_h.to(tl.int64) * stride_h
    o_x = (t_0 + o_t)[None, :, None] * stride_t + o_k.to(tl.int64)[:, None, :] * stride_c
    return tl.load(p_x + o_x, mask=(o_t < n_t)[None, :, None] & (o_k < K)[:, None, :], other=0.0)


@triton.jit
def sum_of_both(b_x, b_y):
    """Return both tiles summed over slabs, which takes the warps one exchange."""
    return tl.split(tl.sum(tl.join(b_x, b_y), axis=0))


@triton.jit
def query_and_key(b_q, b_k, scale, USE_L2NORM: tl.constexpr):
    """Return scaled queries and keys in float32, normalised or not, and their inverse norms, one where they are not."""
    b_q = b_q.to(tl.float32)
    b_k = b_k.to(tl.float32)
    b_qn = tl.zeros((STRIP,), dtype=tl.float32) + 1.0
    b_kn = b_qn
    if USE_L2NORM:
        b_qn, b_kn = sum_of_both(tl.sum(b_q * b_q, axis=2), tl.sum(b_k * b_k, axis=2))
        b_qn = 1.0 / tl.sqrt_rn(b_qn + L2NORM_EPSILON)
        b_kn = 1.0 / tl.sqrt_rn(b_kn + L2NORM_EPSILON)
        b_k = b_k * b_kn[None, :, None]
    return b_q * (b_qn * scale)[None, :, None], b_k, b_qn, b_kn


@triton.jit
def log2_decays(
    b_x, A_log, dt_bias, i_g, o_t, o_k, n_t, lower_bound, K: tl.constexpr,
    USE_GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
):  # fmt: skip
    """Return the base-two log decays of one strip of gate logits, zero off the sequence and the channels."""
    m_k = o_k < K
    b_x = b_x.to(tl.float32)
    if HAS_DT_BIAS:
        b_x += tl.load(dt_bias + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)[:, None, :]
    b_A, b_slope = gate_slope(A_log, i_g, HAS_A_LOG)
    m_x = (o_t < n_t)[None, :, None] & m_k[:, None, :]
    return tl.where(m_x, log2_decay(b_x, b_A, b_slope, lower_bound, USE_GATE, BOUNDED), 0.0)


@triton.jit
def split_unless(b_x, EXACT: tl.constexpr):
    """Return operands of :func:`~kda_optimized.chunks.sum_decays`."""
    b_h = b_x
    b_l = b_x
    if not EXACT:
        b_h, b_l = split(b_x)
    return b_h, b_l


@triton.jit
def level_scores(b_q, b_k, b_gh, b_gl, W: tl.constexpr, EXACT: tl.constexpr):
    """Return ``P`` and ``L`` of one strip, ``[W, 16, 16]`` to be summed over slabs, each pair of tokens from the product of its level."""
    o_t = tl.arange(0, STRIP)
    b_L = tl.zeros((W, STRIP, STRIP), dtype=tl.float32)
    b_P = tl.where((o_t[:, None] == o_t[None, :])[None, :, :], tl.sum(b_q * b_k, axis=2)[:, :, None], 0.0)
    for i_l in range(STRIP_LEVELS):
        b_E = tl.exp2(sum_decays(tokens_between(i_l, STRIP), b_gh, b_gl, b_L, EXACT))
        m_l = level_mask(i_l, STRIP)[None, :, :]
        b_kE = b_k * b_E
        b_P = tl.where(m_l, pair_product(b_q * b_E, b_kE, EXACT), b_P)
        b_L = tl.where(m_l, pair_product(b_kE, b_kE, EXACT), b_L)
    return b_P, b_L


@triton.jit
def raised_scores(b_P, b_L, b_G, b_q_dec, b_k_dec, b_inv, FINE: tl.constexpr):
    """Replace rows of scores by what one product each gives, where that holds.

    The rows of ``q_dec`` and ``k_dec`` carry ``exp2(G)`` and those of ``inv`` ``exp2(-G)``, which float32 holds as long as no raised
    ``G`` is below ``LEAST``. Whether it does for a row depends on the tokens up to it alone.
    """
    o_t = tl.arange(0, STRIP)
    m_t = (tl.min(b_G, axis=2) >= LEAST)[:, :, None]
    # Pairs that no decay parts are exact products of 16-bit inputs, unless decays bring in a rounding. tf32 holds what bfloat16 does, four
    # bits finer, but no more than float16 does; a token's pair with itself takes no rounding at all.
    if FINE:
        b_PP = pair_product(b_q_dec, b_inv, EXACT=False)
        b_LL = pair_product(b_k_dec, b_inv, EXACT=False)
    else:
        b_PP = pair_product_tf32(b_q_dec, b_inv)
        b_LL = pair_product_tf32(b_k_dec, b_inv)
    b_PP = tl.where((o_t[:, None] == o_t[None, :])[None, :, :], tl.sum(b_q_dec * b_inv, axis=2)[:, :, None], b_PP)
    b_P = tl.where(m_t, b_PP, b_P)
    b_L = tl.where(m_t, b_LL, b_L)
    b_P = tl.where((o_t[:, None] >= o_t[None, :])[None, :, :], b_P, 0.0)
    return b_P, tl.where((o_t[:, None] > o_t[None, :])[None, :, :], b_L, 0.0)


@triton.jit
def decayed_strip(
    q, k, g, A_log, dt_bias, i_b, i_h, i_g, t_0, o_t, o_k, n_t,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, scale, lower_bound, K: tl.constexpr, W: tl.constexpr, RAISED: tl.constexpr,
    EXACT: tl.constexpr, USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
):  # fmt: skip
    """Return ``q_dec``, ``k_dec`` and ``k_rest``, the former two raised, ``P``, ``L``, the log decays ``[W, 16, BC]`` and inverse norms."""
    b_q = load_strip(q, i_b, i_h, t_0, o_t, o_k, n_t, K, stride_qb, stride_qt, stride_qh, stride_qk)
    b_k = load_strip(k, i_b, i_h, t_0, o_t, o_k, n_t, K, stride_kb, stride_kt, stride_kh, stride_kk)
    b_g = load_strip(g, i_b, i_g, t_0, o_t, o_k, n_t, K, stride_gb, stride_gt, stride_gh, stride_gk)
    b_g = log2_decays(
        b_g, A_log, dt_bias, i_g, o_t, o_k, n_t, lower_bound, K, USE_GATE, BOUNDED, HAS_A_LOG, HAS_DT_BIAS
    )
    b_gh, b_gl = split_unless(b_g, EXACT)
    b_P = tl.zeros((W, STRIP, STRIP), dtype=tl.float32)
    b_L = b_P
    b_like = b_P
    # One less, for sums in another order. First, because it leaves nothing in registers but its scores.
    if not EXACT and tl.min(tl.sum(tl.where((o_t > 0)[None, :, None], b_g, 0.0), axis=1)) < LEAST + 1.0 - RAISED:
        b_qs, b_ks, b_qn, b_kn = query_and_key(b_q, b_k, scale, USE_L2NORM)
        b_P, b_L = level_scores(b_qs, b_ks, b_gh, b_gl, W, EXACT)
    b_q, b_k, b_qn, b_kn = query_and_key(b_q, b_k, scale, USE_L2NORM)
    if EXACT:
        b_P, b_L = level_scores(b_q, b_k, b_gh, b_gl, W, EXACT)
    b_G = sum_decays((o_t[:, None] >= o_t[None, :]) & (o_t[None, :] > 0), b_gh, b_gl, b_like, EXACT, RAISED)
    b_rest = tl.exp2(sum_decays(o_t[:, None] < o_t[None, :], b_gh, b_gl, b_like, EXACT))
    b_dec = tl.exp2(b_G)
    b_q = b_q * b_dec
    b_kd = b_k * b_dec
    if not EXACT:
        b_P, b_L = raised_scores(b_P, b_L, b_G, b_q, b_kd, b_k * tl.exp2(-b_G), q.dtype.element_ty == tl.float16)
    b_P, b_L = sum_of_both(b_P, b_L)
    return b_q, b_kd, b_k * b_rest, b_P, b_L, b_g, b_qn, b_kn


@triton.jit
def store_decays(p_decay, b_g, o_t, BK: tl.constexpr):
    """Write the decays of a state: by the first token, and by the others; sums in float32, since a state may do nothing else for long."""
    tl.store(p_decay, tl.exp2(tl.sum(tl.where((o_t == 0)[None, :, None], b_g, 0.0), axis=1)))
    tl.store(p_decay + BK, tl.exp2(tl.sum(tl.where((o_t > 0)[None, :, None], b_g, 0.0), axis=1)))


@triton.jit
def block_product(b_a, b_x, W: tl.constexpr, EXACT: tl.constexpr):
    """Return ``a x`` of ``[16, 16]`` and every slab of ``[W, 16, BC]``."""
    return product_split(tl.broadcast_to(b_a[None, :, :], (W, STRIP, STRIP)), b_x, EXACT)


@triton.jit
def store_rows(p_x, p_s, b_x, o_x, EXACT: tl.constexpr, RAISED: tl.constexpr = 0.0):
    """Write ``[W, 16, BC]`` as operands: float32 as they are, or float16 with the scales of tokens beside them, less ``RAISED``."""
    b_m = tl.max(tl.max(tl.abs(b_x), axis=2), axis=0)
    if EXACT:
        tl.store(p_x + o_x, b_x)
        tl.store(p_s, tl.zeros_like(b_m) + 1.0)
    else:
        b_s, b_r = half_scale(b_m)
        tl.store(p_x + o_x, (b_x * b_r[None, :, None]).to(tl.float16))
        tl.store(p_s, b_s * tl.exp2(-RAISED))

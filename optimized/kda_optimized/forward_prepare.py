# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""First forward kernel: everything about a chunk that does not depend on the state, one program per chunk and value head.

With ``G`` the log decay accumulated from the first token of the chunk, that token's own excluded [KL eqs. 2-9]:

    q_dec  = scale q exp(G)      k_dec = k exp(G)      k_rest = k exp(G_C - G)
    P_ij = scale q_i k_j exp(G_i - G_j),  i >= j       L_ij = k_i k_j exp(G_i - G_j),  i > j
    Z = (I + L Diag(beta))^-1                          M = Diag(beta) Z

What the walk along the chunks needs of them, folded so that its chain of dependent products is as short as can be:

    mix    = P M                 outputs from the values of the chunk
    q_read = q_dec - mix k_dec   outputs from the state before it
    k_read = k_dec               what the state predicts
    k_write = M^T k_rest         the state after it, from what was not predicted

A chunk is one strip of 16 tokens, two for the backward, and channels lie in slabs, one to a warp: ``[W, 16, BC]``. What is summed over
channels is summed in each slab first, so that a warp works on its own registers until the scores are complete.

The decay of the first token is applied to the state, in float32. What is left of a channel's decay is one for that token,
whatever its magnitude, so a channel that has almost forgotten the state keeps its own relative accuracy in 16 bits.
"""

import triton
import triton.language as tl

from kda_optimized.activations import L2NORM_EPSILON, gate_slope, log2_decay, strength
from kda_optimized.chunks import (
    BETA,
    K_NORM,
    K_SCALE,
    Q_NORM,
    Q_SCALE,
    REST_SCALE,
    TOKEN_ROWS,
    level_mask,
    load_column,
    locate_chunk,
    sum_decays,
    tokens_between,
)
from kda_optimized.products import half_scale, pair_product, pair_product_tf32, product_split, split, store_planes

STRIP = tl.constexpr(16)
STRIP_LEVELS = tl.constexpr(4)
# Binary orders of magnitude. Rows that carry a decay are raised by the first, so that they may lose the second before their pairs go by
# levels: the more, the less may be known of their length.
SHIFT = tl.constexpr(32.0)
MOST_DECAY = tl.constexpr(112.0)
UNIT_SHIFT = tl.constexpr(96.0)
MOST_UNIT_DECAY = tl.constexpr(206.0)


@triton.jit
def inverse(b_A, BT: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """Return ``(I + A)^-1`` of a strictly lower triangular ``A`` by block elimination.

    Given the inverses ``X`` of the diagonal blocks of h tokens, those of 2h tokens are ``X - X A_h X`` with ``A_h`` the pairs of
    level h. This is forward substitution, not a power series: every intermediate is a part of the inverse itself, so
    nearly identical keys lose no accuracy.
    """
    o_t = tl.arange(0, BT)
    b_X = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0) - tl.where(level_mask(0, BT), b_A, 0.0)
    for i_l in range(1, LEVELS):
        b_a = product_split(b_X, tl.where(level_mask(i_l, BT), b_A, 0.0), EXACT)
        b_X = b_X - product_split(b_a, b_X, EXACT)
    return b_X


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
def raised_scores(b_P, b_L, b_G, b_q_dec, b_k_dec, b_inv, LEAST: tl.constexpr):
    """Replace rows of scores by what one product each gives, where that holds.

    The rows of ``q_dec`` and ``k_dec`` carry ``exp2(G)`` and those of ``inv`` ``exp2(-G)``, which float32 holds as long as no ``G`` is
    below ``LEAST``. Whether it does for a row depends on the tokens up to it alone.
    """
    o_t = tl.arange(0, STRIP)
    m_t = (tl.min(b_G, axis=2) >= LEAST)[:, :, None]
    b_P = tl.where(m_t, pair_product_tf32(b_q_dec, b_inv), b_P)
    b_L = tl.where(m_t, pair_product_tf32(b_k_dec, b_inv), b_L)
    b_P = tl.where((o_t[:, None] >= o_t[None, :])[None, :, :], b_P, 0.0)
    return b_P, tl.where((o_t[:, None] > o_t[None, :])[None, :, :], b_L, 0.0)


@triton.jit
def from_blocks(b_00, b_10, b_11):
    """Return the lower triangular ``[32, 32]`` matrix of three blocks ``[16, 16]``."""
    b_x = tl.join(tl.join(b_00, tl.zeros_like(b_00)), tl.join(b_10, b_11))
    return tl.reshape(tl.permute(b_x, (3, 0, 2, 1)), (2 * STRIP, 2 * STRIP))


@triton.jit
def block_product(b_a, b_x, W: tl.constexpr, EXACT: tl.constexpr):
    """Return ``a x`` of ``[16, 16]`` and every slab of ``[W, 16, BC]``."""
    return product_split(tl.broadcast_to(b_a[None, :, :], (W, STRIP, STRIP)), b_x, EXACT)


@triton.jit
def store_rows(p_x, p_s, b_x, o_x, EXACT: tl.constexpr, RAISED: tl.constexpr = 0.0):
    """Write ``[W, 16, BC]`` as operands: float32 as they are, or raised in float16 with the scales of tokens beside them."""
    b_m = tl.max(tl.max(tl.abs(b_x), axis=2), axis=0)
    if EXACT:
        tl.store(p_x + o_x, b_x)
        tl.store(p_s, tl.zeros_like(b_m) + 1.0)
    else:
        b_s, b_r = half_scale(b_m)
        tl.store(p_x + o_x, (b_x * b_r[None, :, None]).to(tl.float16))
        tl.store(p_s, b_s * tl.exp2(-RAISED))


@triton.jit(do_not_specialize=["T"])
def kda_chunk_fwd_prepare_kernel(
    q, k, g, beta, A_log, dt_bias, q_rows, k_rows, rest_rows, tokens, scores, solve, pull, decay, chunk_table,
    stride_qb, stride_qt, stride_qh, stride_qk, stride_kb, stride_kt, stride_kh, stride_kk,
    stride_gb, stride_gt, stride_gh, stride_gk, stride_bb, stride_bt, stride_bh, scale, lower_bound, T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr, BACKWARD: tl.constexpr, USE_L2NORM: tl.constexpr, USE_GATE: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_A_LOG: tl.constexpr, HAS_DT_BIAS: tl.constexpr, USE_SIGMOID: tl.constexpr, CEILING: tl.constexpr,
):  # fmt: skip
    """Prepare one chunk of one value head: folded for the forward walk, or in parts for the backward."""
    PLANE: tl.constexpr = BT * BT
    PLANES: tl.constexpr = 1 if EXACT else 2
    W: tl.constexpr = BK // BC
    TWO: tl.constexpr = BT > STRIP
    LEVELLED: tl.constexpr = EXACT or TWO
    RAISED: tl.constexpr = 0.0 if LEVELLED else UNIT_SHIFT if USE_L2NORM else SHIFT
    MOST: tl.constexpr = MOST_UNIT_DECAY if USE_L2NORM else MOST_DECAY
    i_c = tl.program_id(0) // G
    i_g = tl.program_id(0) % G
    i_h = i_g // (G // H)
    i_b, t_0, _, n_t = locate_chunk(i_c, chunk_table, T)
    i_cg = i_c.to(tl.int64) * G + i_g
    o_t = tl.arange(0, BT)
    o_s = tl.arange(0, STRIP)
    o_k = tl.arange(0, W)[:, None] * BC + tl.arange(0, BC)[None, :]  # [W, BC]
    o_0 = o_s[None, :, None] * BK + o_k[:, None, :]  # [W, 16, BC]
    o_tt = o_t[:, None] * BT + o_t[None, :]
    p_token = tokens + i_cg * (TOKEN_ROWS * BT)
    p_tk = i_cg * (BT * BK)
    p_tt = i_cg * (PLANES * PLANE)

    b_q0 = load_strip(q, i_b, i_h, t_0, o_s, o_k, n_t, K, stride_qb, stride_qt, stride_qh, stride_qk)
    b_k0 = load_strip(k, i_b, i_h, t_0, o_s, o_k, n_t, K, stride_kb, stride_kt, stride_kh, stride_kk)
    b_g0 = load_strip(g, i_b, i_g, t_0, o_s, o_k, n_t, K, stride_gb, stride_gt, stride_gh, stride_gk)
    m_t = o_t < n_t
    b_b = load_column(beta, i_b, i_g, t_0, o_t, m_t, stride_bb, stride_bt, stride_bh)
    b_b = tl.where(m_t, strength(b_b, USE_SIGMOID, CEILING), 0.0)  # [BT]
    b_g0 = log2_decays(
        b_g0, A_log, dt_bias, i_g, o_s, o_k, n_t, lower_bound, K, USE_GATE, BOUNDED, HAS_A_LOG, HAS_DT_BIAS
    )
    b_gh0, b_gl0 = split_unless(b_g0, EXACT)
    b_total = tl.sum(tl.where((o_s > 0)[None, :, None], b_g0, 0.0), axis=1)  # [W, BC]
    b_like = tl.zeros((W, STRIP, STRIP), dtype=tl.float32)
    b_P = b_like
    b_L = b_like
    # One less, for sums in another order. First, because it leaves nothing in registers but its scores.
    if LEVELLED or tl.min(b_total) < 1.0 - MOST:
        b_qs, b_ks, b_qn0, b_kn0 = query_and_key(b_q0, b_k0, scale, USE_L2NORM)
        b_P, b_L = level_scores(b_qs, b_ks, b_gh0, b_gl0, W, EXACT)
    b_q0, b_k0, b_qn0, b_kn0 = query_and_key(b_q0, b_k0, scale, USE_L2NORM)
    # Decays up to each token without the first one, and of those behind it; the latter of the whole chunk below.
    m_up_to = (o_s[:, None] >= o_s[None, :]) & (o_s[None, :] > 0)
    b_G = sum_decays(m_up_to, b_gh0, b_gl0, b_like, EXACT, RAISED)
    b_rest0 = tl.exp2(sum_decays(o_s[:, None] < o_s[None, :], b_gh0, b_gl0, b_like, EXACT))
    b_dec0 = tl.exp2(b_G)
    b_qd0 = b_q0 * b_dec0
    b_kd0 = b_k0 * b_dec0
    b_kr0 = b_k0 * b_rest0
    if not LEVELLED:
        b_P, b_L = raised_scores(b_P, b_L, b_G, b_qd0, b_kd0, b_k0 * tl.exp2(-b_G), RAISED - MOST)
    if TWO:
        o_1 = o_s + STRIP
        b_q1 = load_strip(q, i_b, i_h, t_0, o_1, o_k, n_t, K, stride_qb, stride_qt, stride_qh, stride_qk)
        b_k1 = load_strip(k, i_b, i_h, t_0, o_1, o_k, n_t, K, stride_kb, stride_kt, stride_kh, stride_kk)
        b_g1 = load_strip(g, i_b, i_g, t_0, o_1, o_k, n_t, K, stride_gb, stride_gt, stride_gh, stride_gk)
        b_g1 = log2_decays(
            b_g1, A_log, dt_bias, i_g, o_1, o_k, n_t, lower_bound, K, USE_GATE, BOUNDED, HAS_A_LOG, HAS_DT_BIAS
        )
        b_q1, b_k1, b_qn1, b_kn1 = query_and_key(b_q1, b_k1, scale, USE_L2NORM)
        b_gh1, b_gl1 = split_unless(b_g1, EXACT)
        b_P1, b_L1 = level_scores(b_q1, b_k1, b_gh1, b_gl1, W, EXACT)
        b_dec1 = tl.exp2(sum_decays(o_s[:, None] >= o_s[None, :], b_gh1, b_gl1, b_L1, EXACT))
        b_rest1 = tl.exp2(sum_decays(o_s[:, None] < o_s[None, :], b_gh1, b_gl1, b_L1, EXACT))
        b_q1 = b_q1 * b_dec1
        b_kd1 = b_k1 * b_dec1
        b_P = from_blocks(tl.sum(b_P, axis=0), tl.sum(pair_product(b_q1, b_kr0, EXACT), axis=0), tl.sum(b_P1, axis=0))
        b_L = from_blocks(tl.sum(b_L, axis=0), tl.sum(pair_product(b_kd1, b_kr0, EXACT), axis=0), tl.sum(b_L1, axis=0))
        b_before = tl.exp2(b_total)[:, None, :]
        b_behind = tl.sum(b_g1, axis=1)
        b_total += b_behind
        b_q1 = b_q1 * b_before
        b_kd1 = b_kd1 * b_before
        b_kr0 = b_kr0 * tl.exp2(b_behind)[:, None, :]
        b_kr1 = b_k1 * b_rest1
    else:
        b_P, b_L = sum_of_both(b_P, b_L)
    if BACKWARD and USE_L2NORM:
        tl.store(p_token + Q_NORM * BT + o_s, b_qn0)
        tl.store(p_token + K_NORM * BT + o_s, b_kn0)
        if TWO:
            tl.store(p_token + Q_NORM * BT + STRIP + o_s, b_qn1)
            tl.store(p_token + K_NORM * BT + STRIP + o_s, b_kn1)
    # The state may do nothing but decay for long, so its decays are sums in float32.
    p_decay = decay + i_cg * (2 * BK) + o_k
    tl.store(p_decay, tl.exp2(tl.sum(tl.where((o_s == 0)[None, :, None], b_g0, 0.0), axis=1)))
    tl.store(p_decay + BK, tl.exp2(b_total))
    store_rows(k_rows + p_tk, p_token + K_SCALE * BT + o_s, b_kd0, o_0, EXACT, RAISED)
    if TWO:
        store_rows(k_rows + p_tk, p_token + K_SCALE * BT + STRIP + o_s, b_kd1, o_0 + STRIP * BK, EXACT)
    if BACKWARD:
        store_rows(q_rows + p_tk, p_token + Q_SCALE * BT + o_s, b_qd0, o_0, EXACT, RAISED)
        store_rows(rest_rows + p_tk, p_token + REST_SCALE * BT + o_s, b_kr0, o_0, EXACT)
        if TWO:
            store_rows(q_rows + p_tk, p_token + Q_SCALE * BT + STRIP + o_s, b_q1, o_0 + STRIP * BK, EXACT)
            store_rows(rest_rows + p_tk, p_token + REST_SCALE * BT + STRIP + o_s, b_kr1, o_0 + STRIP * BK, EXACT)

    b_Z = inverse(b_L * b_b[None, :], BT, LEVELS, EXACT)
    if BACKWARD:
        tl.store(p_token + BETA * BT + o_t, b_b)
        store_planes(scores + p_tt, b_P, o_tt, PLANE, EXACT)
        store_planes(solve + p_tt, b_Z, o_tt, PLANE, EXACT)
        store_planes(pull + p_tt, inverse(b_L * b_b[:, None], BT, LEVELS, EXACT), o_tt, PLANE, EXACT)
    else:
        tl.static_assert(not TWO, "the forward folds one strip a chunk")
        b_mix = product_split(b_P * b_b[None, :], b_Z, EXACT)
        store_planes(scores + p_tt, b_mix, o_tt, PLANE, EXACT)
        b_qd0 -= block_product(b_mix, b_kd0, W, EXACT)
        store_rows(q_rows + p_tk, p_token + Q_SCALE * BT + o_s, b_qd0, o_0, EXACT, RAISED)
        b_M = tl.trans(b_Z * b_b[:, None])
        store_planes(rest_rows + PLANES * p_tk, block_product(b_M, b_kr0, W, EXACT), o_0, BT * BK, EXACT)

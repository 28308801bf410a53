# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device functions on one chunk: where it lies, and how its pairs of tokens are split so that no decay is ever inverted.

A score of tokens i > j needs ``exp(G_i - G_j)``, with ``G`` the log decay accumulated inside the chunk. Pairs are sorted into
levels. At level h = 1, 2, 4, ... half the chunk, tokens lie in blocks of h; a pair belongs to level h when its blocks are
the two halves of one block of 2h. With m the last token of the earlier half,

    exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j)            j <= m < i

both exponents are sums of log decays that lie between the two tokens, so both factors are at most one for any gate, and
both are functions of tokens up to i only. Every pair belongs to exactly one level; the diagonal needs no decay.
"""

import triton
import triton.language as tl

# Per-token numbers that the first kernel leaves for the others, in this order: scales of q_dec, k_dec and k_rest, beta,
# inverse norms of q and k, scale of k_pull.
Q_SCALE = tl.constexpr(0)
K_SCALE = tl.constexpr(1)
REST_SCALE = tl.constexpr(2)
BETA = tl.constexpr(3)
Q_NORM = tl.constexpr(4)
K_NORM = tl.constexpr(5)
PULL_SCALE = tl.constexpr(6)
TOKEN_ROWS = tl.constexpr(7)


@triton.jit
def locate_chunk(i_c, chunk_table, T):
    """Return batch row, first token within it, first token of the call and tokens to the end of the sequence of a chunk, all int64."""
    p_c = chunk_table + 5 * i_c
    i_b = tl.load(p_c)
    t_0 = tl.load(p_c + 1)
    return i_b, t_0, i_b * T + t_0, tl.load(p_c + 2)


@triton.jit
def locate_sequence(i_n, cu_seqlens, chunk_offsets, T, BT: tl.constexpr):
    """Return batch row, first token within it, first token of the call, number of tokens, first chunk and number of chunks."""
    t_g = tl.load(cu_seqlens + i_n)
    n_t = tl.load(cu_seqlens + i_n + 1) - t_g
    i_b = t_g // tl.maximum(T, 1)
    return i_b, t_g - i_b * T, t_g, n_t, tl.load(chunk_offsets + i_n), (n_t + BT - 1) // BT


@triton.jit
def load_tile(p_x, i_b, i_h, t_0, o_t, o_c, m_tc, stride_b, stride_t, stride_h, stride_c):
    """Load ``[BT, BC]`` of a ``[B, T, heads, channels]`` tensor in float32, zero off the mask."""
    p_x += i_b * stride_b + i_h.to(tl.int64) * stride_h
    o_x = (t_0 + o_t)[:, None] * stride_t + o_c.to(tl.int64)[None, :] * stride_c
    return tl.load(p_x + o_x, mask=m_tc, other=0.0).to(tl.float32)


@triton.jit
def load_column(p_x, i_b, i_h, t_0, o_t, m_t, stride_b, stride_t, stride_h):
    """Load ``[BT]`` of a ``[B, T, heads]`` tensor in float32, zero off the mask."""
    p_x += i_b * stride_b + i_h.to(tl.int64) * stride_h
    return tl.load(p_x + (t_0 + o_t) * stride_t, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def level_mask(i_l, BT: tl.constexpr):
    """Return ``[BT, BT]``: whether row i and column j are a pair of level ``i_l``, whose blocks have ``2^i_l`` tokens."""
    o_b = tl.arange(0, BT) >> i_l
    return (o_b[:, None] == o_b[None, :] + 1) & ((o_b[:, None] & 1) == 1)


@triton.jit
def tokens_between(i_l, BT: tl.constexpr):
    """Return ``[BT, BT]``: whether token s lies between row i and the last token m of the earlier half of its block of ``2^(i_l + 1)``.

    That is ``m < s <= i`` in the later half and ``i < s <= m`` in the earlier one: the tokens whose decays make up row i's factor.
    """
    o_t = tl.arange(0, BT)
    m_same = (o_t[:, None] >> i_l) == (o_t[None, :] >> i_l)
    m_later = ((o_t >> i_l) & 1)[:, None] == 1
    return m_same & (m_later == (o_t[:, None] >= o_t[None, :]))


@triton.jit
def sum_decays(m_ts, b_gh, b_gl, b_like, EXACT: tl.constexpr, START: tl.constexpr = 0.0):
    """Return ``[B, R, C]``: for each row of the mask ``[R, R]``, ``START`` and the log decays it selects, which are given whole or split.

    A product with zeros and ones: no difference of two large sums is ever formed. ``b_like`` ``[B, R, R]`` is any result of a
    product: the mask takes over its layout in registers, which saves it a way through shared memory; its values do not matter.
    """
    b_m = tl.where(m_ts[None, :, :], 1.0, tl.minimum(tl.abs(b_like), 0.0))
    if EXACT:
        b_x = tl.dot(b_m, b_gh, input_precision="ieee") + START
    else:
        b_m = b_m.to(tl.bfloat16)
        b_x = tl.dot(b_m, b_gh, tl.dot(b_m, b_gl, tl.zeros_like(b_gl).to(tl.float32) + START))
    return b_x

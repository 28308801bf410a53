# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Device functions on one row of a decoding call: where its tokens lie, which slot it starts from, and leaving something in a slot.

Tables may say anything: offsets outside the tokens would reach foreign memory, and an index that is no slot is padding.
"""

import triton
import triton.language as tl


@triton.jit
def locate_row(cu_seqlens, i_n, T, PACKED: tl.constexpr):
    """Return batch row, first token within it and number of tokens of a row."""
    if PACKED:
        i_b = tl.zeros((), dtype=tl.int64)
        t_0 = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n).to(tl.int64), 0), T)
        n_t = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n + 1).to(tl.int64), t_0), T) - t_0
    else:
        i_b, t_0, n_t = i_n, tl.zeros((), dtype=tl.int64), T
    return i_b, t_0, n_t


@triton.jit
def starting_slot(indices, source_indices, num_accepted_tokens, i_n, stride_in, stride_iw, stride_on, stride_an,
                  W: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_ACCEPTED: tl.constexpr):  # fmt: skip
    """Return the index that a row starts from, -1 where it accepted a number of tokens that no call can leave."""
    i_a = tl.zeros((), dtype=tl.int64)
    if HAS_ACCEPTED:
        i_a = tl.load(num_accepted_tokens + i_n * stride_an).to(tl.int64) - 1
    if HAS_SOURCE:
        i_s = tl.load(source_indices + i_n * stride_on).to(tl.int64)
    else:
        m_a = (i_a >= 0) & (i_a < W)
        i_s = tl.load(indices + i_n * stride_in + i_a * stride_iw, mask=m_a, other=-1).to(tl.int64)
    return i_s


@triton.jit
def store_slot(pool, i_s, num_slots, b_x, o_x, m_x, stride_s):
    """Write a tile to its slot, if there is such a slot."""
    if (i_s >= 0) & (i_s < num_slots):
        tl.store(pool + i_s * stride_s + o_x, b_x.to(pool.dtype.element_ty), mask=m_x)

"""Device functions: decayed score blocks and the inverse, one power of two at a time.

At level L the chunk falls into blocks of L rows. A pair (row in an odd block, column in the even block before it) is scored against the first row
of the odd block as reference: the row decays from there, the column decays up to there. Both exponents are at most zero whatever
the gate does, and the reference is never later than the row, so outputs are causal bit for bit. The levels 1, 2, 4, ... C/2 together
cover every pair below the diagonal once.

The inverse follows the same levels: if T inverts the diagonal blocks of size L of a unit lower triangular I + A, then
``T - T A_L T`` inverts those of size 2 L, where A_L is the part of A that level L covers. This is block forward substitution, not a power
series: nothing grows that does not belong to the result.
"""

import triton
import triton.language as tl


@triton.jit
def reference_decay(b_g, BT: tl.constexpr, LOG_LEVEL: tl.constexpr, PRECISION: tl.constexpr):
    """Return each row's decay from, or to, the first row of its odd block ``[BT, BK]``.

    The log decays in between are summed directly, as a product with a mask of zeros and ones. All terms have one sign, so nothing cancels, which a
    difference of cumulative sums would do behind a gate that closed hard.
    """
    LEVEL: tl.constexpr = 2**LOG_LEVEL
    o_i = tl.arange(0, BT)
    i_ref = ((o_i // (2 * LEVEL)) * (2 * LEVEL) + LEVEL)[:, None]
    i_row, i_token = o_i[:, None], o_i[None, :]
    m_after = (i_row >= i_ref) & (i_token > i_ref) & (i_token <= i_row)
    m_before = (i_row < i_ref) & (i_token > i_row) & (i_token <= i_ref)
    b_between = tl.where(m_after | m_before, 1.0, 0.0)
    return tl.exp(tl.dot(b_between, b_g, input_precision=PRECISION))


@triton.jit
def decay_to_end(b_g, BT: tl.constexpr, PRECISION: tl.constexpr):
    """Return the decay that each row's write suffers until the end of the chunk ``[BT, BK]``."""
    o_i = tl.arange(0, BT)
    b_later = tl.where(o_i[None, :] > o_i[:, None], 1.0, 0.0)
    return tl.exp(tl.dot(b_later, b_g, input_precision=PRECISION))


@triton.jit
def level_mask(BT: tl.constexpr, LOG_LEVEL: tl.constexpr):
    """Return the pairs ``[BT, BT]`` that a level covers."""
    LEVEL: tl.constexpr = 2**LOG_LEVEL
    o_i = tl.arange(0, BT)
    same = (o_i[:, None] // (2 * LEVEL)) == (o_i[None, :] // (2 * LEVEL))
    return same & (((o_i[:, None] // LEVEL) % 2) == 1) & (((o_i[None, :] // LEVEL) % 2) == 0)


@triton.jit
def merge_inverse(b_inverse, b_level, PRECISION: tl.constexpr):
    """Return ``T - T A_L T``."""
    b_inner = tl.dot(b_level, b_inverse, input_precision=PRECISION)
    return b_inverse - tl.dot(b_inverse, b_inner, input_precision=PRECISION)

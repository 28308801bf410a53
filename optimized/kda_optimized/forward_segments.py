# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Between two walks: the state at the start of every segment, one program per sequence, value head and V tile.

Where few sequences and heads leave a GPU idle, a sequence is cut into segments that are walked side by side. Over a segment the state
goes through an affine map,

    S -> A S + B

whose ``A`` a walk from the identity without values gives, and whose ``B`` a walk from zero. This kernel follows the maps of one sequence,

    S_0 = initial state          S_(j+1) = A_j S_j + B_j

and a last walk, from these states, makes the outputs.

The cotangent of the state goes back through the transpose of the same map, ``dS -> A^T dS + C``, with a ``C`` that a walk back from zero
gives, so the backward follows the maps with this kernel, too.
"""

import triton
import triton.language as tl

from kda_optimized.products import product_split


@triton.jit
def kda_chunk_fwd_segments_kernel(
    maps, shifts, initial_state, starts, final_state, first_segments, stride_in, stride_ig, stride_ik, stride_iv,
    stride_fn, stride_fg, stride_fk, stride_fv,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Write the state before each segment of one sequence of one value head, and the final state, for BV value channels.

    Where BACK, the cotangent of the state after each, and that of the initial state: the last segment comes first, maps are transposed.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_n = tl.program_id(0) // NV // G
    i_g = tl.program_id(0) // NV % G
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_kk = (o_k < K)[:, None] & (o_k < K)[None, :]
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kk = o_k[None, :] * K + o_k[:, None] if BACK else o_k[:, None] * K + o_k[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]

    b_S = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_INITIAL:
        p_s = initial_state + i_n.to(tl.int64) * stride_in + i_g.to(tl.int64) * stride_ig
        b_S += tl.load(
            p_s + o_k.to(tl.int64)[:, None] * stride_ik + o_v.to(tl.int64)[None, :] * stride_iv, mask=m_kv, other=0.0
        )
    i_0 = tl.load(first_segments + i_n)
    n_s = tl.load(first_segments + i_n + 1) - i_0
    for i_r in range(n_s):
        i_s = n_s - 1 - i_r if BACK else i_r
        i_sg = (i_0 + i_s) * G + i_g
        tl.store(starts + i_sg * (K * V) + o_kv, b_S, mask=m_kv)
        b_A = tl.load(maps + i_sg * (K * K) + o_kk, mask=m_kk, other=0.0)
        b_B = tl.load(shifts + i_sg * (K * V) + o_kv, mask=m_kv, other=0.0)
        b_S = product_split(b_A, b_S, EXACT) + b_B
    if HAS_FINAL:
        p_s = final_state + i_n.to(tl.int64) * stride_fn + i_g.to(tl.int64) * stride_fg
        tl.store(p_s + o_k.to(tl.int64)[:, None] * stride_fk + o_v.to(tl.int64)[None, :] * stride_fv, b_S, mask=m_kv)

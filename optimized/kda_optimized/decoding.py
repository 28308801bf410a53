"""Decoding through a pool of states: the public function, its checks, and its launch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.contract import KdaInputs
from kda_reference.errors import DomainError

from kda_optimized.arguments import INTEGERS, check_tensor, num_packed
from kda_optimized.checks import check_support
from kda_optimized.chunkwise import Call
from kda_optimized.decode_step import kda_decode_step_kernel
from kda_optimized.launch import Launch, strides, submit
from kda_optimized.launch_config import padded, tile
from kda_optimized.slots import slots_of, starts

if TYPE_CHECKING:
    from torch import Tensor

STATE_DTYPES = (torch.float32, torch.bfloat16)
NARROWEST_TILE = 16


def kda_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    *,
    state_indices: Tensor | None = None,
    source_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    snapshot_indices: Tensor | None = None,
    snapshot_every: int = 64,
    final_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance N rows by one or a few tokens each, their states in a pool of S slots; not differentiable.

    Rows are those of a batch, T tokens each, or, with ``cu_seqlens``, packed ones of any lengths: single tokens, drafts and whole
    prompts in any order. A row starts from the state in one slot and leaves states in others:

    * it starts from slot ``source_indices[n]``, or, without those, ``state_indices[n, a - 1]``, where a is ``num_accepted_tokens[n]``,
      or 1 without those;
    * a row of at most W tokens leaves the state after its token t in slot ``state_indices[n, t]``, so that with W = 1 its state moves on,
      and with W > 1 every draft is kept until the next call says how many of them were accepted: the states of the others are then
      overwritten, which is all that a roll-back takes;
    * a row of no tokens or of more than W leaves its last state in slot ``state_indices[n, 0]``;
    * after each ``snapshot_every`` tokens a row leaves a state in slot ``snapshot_indices[n, m]``, m = 0, 1, ...

    An index outside ``0..S-1``, such as -1, is padding: nothing is written for it. A row that starts at one is padding as a whole, and
    so is one whose number of accepted tokens is outside ``1..W``; its outputs are zero, as are those of tokens behind the last row.

    Parameters
    ----------
    q, k, v, g, beta
        As in :class:`kda_reference.contract.KdaInputs`, bfloat16, float16 or float32; K and V in 1..256, any strides.
    state
        The pool ``[S, G, K, V]``, or ``[S, G, V, K]`` with ``state_v_first``, float32 or bfloat16, any strides. Written in place unless
        ``final_state`` is given.
    state_indices
        Integer ``[N]`` or ``[N, W]``; ``None`` means that row n has slot n. No two rows may name one slot, nor one row the slot that
        another starts from; indices that are padding may repeat.
    source_indices
        Integer ``[N]``; several rows may start from one slot, such as that of a shared prefix. Excludes ``num_accepted_tokens``.
    num_accepted_tokens
        Integer ``[N]``: how many of the row's tokens in the call before were right.
    has_initial_state
        bool ``[N]``; where false the row starts from zeros, whatever its slot holds. ``None`` means true.
    snapshot_indices
        Integer ``[N, M]``; ``None`` means no snapshots.
    snapshot_every
        Tokens between snapshots, counted from the first token of a row in this call; at least 1.
    final_state
        Pool that is written instead, of the shape of ``state`` but for S, float32 or bfloat16; must not overlap it.
    cu_seqlens
        Integer ``[N + 1]`` offsets of the packed rows; B must be 1. They may end before T. Not read by the host, so not checked.

    scale, A_log, dt_bias, lower_bound, state_v_first, use_..._in_kernel, allow_neg_eigval
        As in :class:`kda_reference.contract.KdaInputs`.

    Returns
    -------
    tuple[Tensor, Tensor]
        ``o [B, T, G, V]`` in v's dtype, and the pool that was written: ``final_state``, or ``state`` itself.

    Raises
    ------
    KdaError
        If shapes, dtypes, devices or flags contradict what is said above; before the kernel is launched.

    Notes
    -----
    Everything is computed in float32 whatever the dtypes. Deterministic; a row's result depends on that row and its slot only, bit
    for bit in calls whose tiles are alike: their width follows the number of rows, their order of sums the strides of the pool.
    Numbers of rows, tokens, W and M are fixed by shapes and everything else is read on the device, so a CUDA graph replays with
    other indices, lengths and numbers of accepted tokens.

    A bfloat16 pool rounds every state that is written by at most ``2^-8`` of each element. Where ``|k| <= 1`` and beta is in ``[0, 2]`` a
    token's transition enlarges no error, so after n calls the state is off by at most
    ``2^-8 sum_j d^(n - j) |S_j|`` (Frobenius norms), with d the largest decay of a call; without decay that grows with n.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    A_log, dt_bias = (None if tensor is None else tensor.contiguous() for tensor in (A_log, dt_bias))
    inputs = KdaInputs(
        q=q, k=k, v=v, g=g, beta=beta, scale=scale, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval, state_v_first=state_v_first,
    )  # fmt: skip
    check_support(inputs)
    num_rows = q.shape[0] if cu_seqlens is None else num_packed(cu_seqlens, q.shape[0], q.device)
    target = state if final_state is None else final_state
    axes = "[S, G, V, K]" if state_v_first else "[S, G, K, V]"
    for name, pool in (("state", state), ("final_state", target)):
        check_tensor(name, pool, (None, *inputs.state_shape[1:]), axes, STATE_DTYPES, q.device)
    slots = slots_of("state_indices", state_indices, num_rows, min(state.shape[0], target.shape[0]), q.device)
    start = starts(num_rows, q.device, source_indices, num_accepted_tokens, "has_initial_state", has_initial_state)
    if snapshot_indices is not None:
        check_tensor("snapshot_indices", snapshot_indices, (num_rows, None), "[N, M]", INTEGERS, q.device)
    if snapshot_every < 1:
        message = f"snapshot_every must be positive, got {snapshot_every}; 64 is the usual choice"
        raise DomainError(message)

    call = Call(inputs, exact=q.dtype == torch.float32)
    o = torch.empty(v.shape, dtype=v.dtype, device=q.device)
    layout = "sgvk" if state_v_first else "sgkv"
    bv, programs, options = _tiles(call, num_rows)
    arguments: dict[str, Any] = {
        **call.tensors("q", "k", "v", "g", "beta"), **call.gate(), **call.strength(), **call.sizes,
        "state": state, **strides("s", layout, state), "final_state": target, **strides("f", layout, target), "o": o,
        "cu_seqlens": cu_seqlens, "PACKED": cu_seqlens is not None,
        "state_indices": slots, **strides("i", "nw", slots), "W": slots.shape[1],
        **start,
        "snapshot_indices": snapshot_indices, **strides("m", "nw", snapshot_indices), "HAS_SNAPSHOTS": snapshot_indices is not None,
        "snapshot_every": snapshot_every, "num_snapshots": 0 if snapshot_indices is None else snapshot_indices.shape[1],
        "num_read_slots": state.shape[0], "num_slots": target.shape[0], "scale": inputs.effective_scale, "T": q.shape[1], "N": num_rows,
        "BK": padded(call.sizes["K"]), "BV": bv, "USE_L2NORM": use_qk_l2norm_in_kernel,
    }  # fmt: skip
    submit(Launch(kernel=kda_decode_step_kernel, programs=programs, arguments=arguments, options=options))
    return o, target


def _tiles(call: Call, num_rows: int) -> tuple[int, int, dict[str, int]]:
    """Return the value channels of a tile, narrowed until there are programs for the whole device, their number, and launch options.

    A narrower tile has fewer warps in proportion.
    """
    config, heads, width = call.config(kda_decode_step_kernel), num_rows * call.sizes["G"], call.sizes["V"]
    bv, warps = tile(config.block_v, width), config.num_warps
    while bv > NARROWEST_TILE and heads * -(-width // bv) < config.programs:
        bv, warps = bv // 2, max(warps // 2, 1)
    return bv, heads * -(-width // bv), replace(config, num_warps=warps).options()

"""A correct step of decoding in which bugs are planted: plain torch, row by row and token by token, as a serving engine would see it.

Its text is edited by ``catalogue/decode.toml`` before it is run. Prefills are those of the chunkwise specimen, unedited.
"""

from __future__ import annotations

import torch
from kda_reference import KdaInputs
from kda_reference.activations import apply_activations

from kda_conformance.planted.specimen import chunk_kda as whole

WIDE = torch.float32


def chunk_kda(*arguments, **options):
    """Evaluate a call; see :class:`kda_reference.KdaInputs`."""
    return whole(*arguments, **options)


def step(q, k, v, g, beta, state, scale=None, *, state_indices, source_indices=None, num_accepted_tokens=None,
         has_initial_state=None, snapshot_indices=None, snapshot_every=64, cu_seqlens=None, state_v_first=False,
         **options):  # fmt: skip
    """Advance rows whose states lie in a pool; see :class:`kda_conformance.decoding.Step`."""
    inputs = KdaInputs(q=q, k=k, v=v, g=g, beta=beta, scale=scale, **options)
    x = activate(inputs)
    slots = state_indices[:, None] if state_indices.dim() == 1 else state_indices
    o = torch.zeros_like(v)
    for n in range(slots.shape[0]):
        b, start, end = place(n, q, cu_seqlens)
        accepted = 1 if num_accepted_tokens is None else int(num_accepted_tokens[n])
        source = int(slots[n, accepted - 1]) if source_indices is None else int(source_indices[n])
        if source < 0:
            continue
        S = state[source].transpose(-1, -2) if state_v_first else state[source]
        S = S.to(WIDE)
        if has_initial_state is not None and not has_initial_state[n]:
            S = torch.zeros_like(S)
        states = []
        for t in range(start, end):
            S, o[b, t] = advance(S, x, b, t, inputs.effective_scale)
            states.append(S)
        if snapshot_indices is not None:
            for m, slot in enumerate(snapshot_indices[n].tolist()):
                if (m + 1) * snapshot_every <= len(states):
                    keep(state, slot, states[(m + 1) * snapshot_every - 1], state_v_first)
        if 0 < len(states) <= slots.shape[1]:
            for t, kept in enumerate(states):
                keep(state, int(slots[n, t]), kept, state_v_first)
        else:
            keep(state, int(slots[n, 0]), S, state_v_first)
    return o


def activate(inputs):
    """Return the operator's variables."""
    return apply_activations(inputs, WIDE)


def place(n, q, cu_seqlens):
    """Return the batch row of a row, and its first and last token."""
    if cu_seqlens is None:
        return n, 0, q.shape[1]
    return 0, int(cu_seqlens[n]), int(cu_seqlens[n + 1])


def advance(S, x, b, t, scale):
    """Return the state after one token and its output."""
    k, beta = x.k[b, t], x.beta[b, t]
    S = x.log_decay[b, t].exp()[..., None] * S
    error = x.v[b, t] - torch.einsum("gkv,gk->gv", S, k)
    S = S + torch.einsum("gk,gv->gkv", k, beta[:, None] * error)
    return S, scale * torch.einsum("gkv,gk->gv", S, x.q[b, t])


def keep(state, slot, S, state_v_first):
    """Write a state to its slot."""
    if slot < 0:
        return
    state[slot] = S.transpose(-1, -2) if state_v_first else S


chunk_kda.step = step

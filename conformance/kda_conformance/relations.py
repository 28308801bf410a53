"""Transformations of a call whose effect on the result is known exactly.

Every transformation is exact in every dtype: it selects, permutes, negates, or scales by powers of two. So a difference between the
two results is the implementation's rounding, or its bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kda_conformance.claims import DTYPES
from kda_conformance.judge import unit_in_last_place
from kda_conformance.regimes import Draw

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor

    from kda_conformance.cases import Case
    from kda_conformance.subject import Call

PER_TOKEN = ("q", "k", "v", "g", "beta")
PER_VALUE_HEAD = ("v", "g", "beta")


def dtype_of(call: Call) -> torch.dtype:
    """Return the torch dtype of the call."""
    return DTYPES[call.dtype]


def split_points(case: Case, count: int) -> list[int]:
    """Return up to ``count`` places inside the call, chunk and strip boundaries and their neighbours first."""
    length = case.num_tokens
    wanted = [length - 1, 17, 64, 1, 16, 63, 33, 48, 65, 15, *range(2, length)]
    inside = [at for at in dict.fromkeys(wanted) if 0 < at < length]
    return inside[:count]


def tokens(inputs: KdaInputs, span: slice) -> KdaInputs:
    """Return the call on a span of tokens of every row."""
    return inputs.replace(**{name: getattr(inputs, name)[:, span] for name in PER_TOKEN})


def rows(inputs: KdaInputs, only: slice) -> KdaInputs:
    """Return the call on some batch rows."""
    state = inputs.initial_state
    return inputs.replace(
        **{name: getattr(inputs, name)[only] for name in PER_TOKEN},
        initial_state=None if state is None else state[only],
    )


def sequence(inputs: KdaInputs, row: int, span: slice) -> KdaInputs:
    """Return one packed sequence as a call of its own."""
    state = inputs.initial_state
    alone = tokens(inputs, span).replace(cu_seqlens=None)
    return alone.replace(initial_state=None if state is None else state[row : row + 1])


def every_token_a_sequence(inputs: KdaInputs, seed: int) -> KdaInputs:
    """Return the call with every token of its one row as a sequence of its own, from a state of its own."""
    packed = inputs.replace(cu_seqlens=torch.arange(inputs.q.shape[1] + 1, device=inputs.q.device))
    wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    return packed.replace(initial_state=Draw(seed).normal(packed.state_shape).to(inputs.q.device, wide))


def last_sequences(inputs: KdaInputs, count: int) -> KdaInputs:
    """Return the last sequences, of one token each, of a packed call."""
    state = inputs.initial_state
    return tokens(inputs, slice(-count, None)).replace(
        cu_seqlens=torch.arange(count + 1, device=inputs.q.device),
        initial_state=None if state is None else state[-count:],
    )


def other_state(inputs: KdaInputs) -> Tensor:
    """Return an initial state of the call's shape that differs from its own in every element."""
    state = inputs.initial_state
    return torch.ones(inputs.state_shape, device=inputs.v.device) if state is None else 1 - 0.5 * state


def disturb(inputs: KdaInputs, span: slice, state_rows: slice | None = None) -> KdaInputs:
    """Change every token argument on a span, and the state of some sequences, within their domains."""
    changed: dict[str, Tensor] = {}
    for name in PER_TOKEN:
        tensor = getattr(inputs, name).clone()
        part = tensor[:, span]
        if name == "g" and not inputs.use_gate_in_kernel:
            # Stays above -5 where the call promises that.
            tensor[:, span] = part * 0.5 - 2.5
        elif name == "beta" and not inputs.use_beta_sigmoid_in_kernel:
            tensor[:, span] = 1 - 0.5 * part
        else:
            tensor[:, span] = part.flip(-1) * -1.5
        changed[name] = tensor
    if state_rows is not None and inputs.initial_state is not None:
        state = inputs.initial_state.clone()
        state[state_rows] = state[state_rows] * -0.5 + 1
        changed["initial_state"] = state
    return inputs.replace(**changed)


def disturb_head(inputs: KdaInputs, head: int) -> KdaInputs:
    """Change v, g, beta and state of one value head."""
    changed: dict[str, Tensor] = {}
    other = disturb(inputs, slice(None), slice(None))
    for name in (*PER_VALUE_HEAD, "initial_state"):
        tensor = getattr(inputs, name)
        if tensor is not None:
            axis = 1 if name == "initial_state" else 2
            changed[name] = tensor.clone()
            changed[name].select(axis, head).copy_(getattr(other, name).select(axis, head))
    return inputs.replace(**changed)


def reverse_heads(inputs: KdaInputs) -> KdaInputs:
    """Reverse the order of all heads, which keeps every value head with its query/key head."""
    state, bias = inputs.initial_state, inputs.dt_bias
    heads = inputs.v.shape[2]
    return inputs.replace(
        **{name: getattr(inputs, name).flip(2) for name in PER_TOKEN},
        A_log=None if inputs.A_log is None else inputs.A_log.flip(0),
        dt_bias=None if bias is None else bias.reshape(heads, -1).flip(0).flatten(),
        initial_state=None if state is None else state.flip(1),
    )


def values_first(inputs: KdaInputs) -> KdaInputs:
    """Return the same call with states ``[N, G, V, K]``."""
    state = inputs.initial_state
    turned = None if state is None else state.transpose(-1, -2).contiguous()
    return inputs.replace(initial_state=turned, state_v_first=True)


def poison(inputs: KdaInputs, names: tuple[str, ...], at: int) -> KdaInputs:
    """Make the named arguments NaN at one token of the first batch row."""
    changed = {name: getattr(inputs, name).clone() for name in names}
    for tensor in changed.values():
        tensor[0, at] = torch.nan
    return inputs.replace(**changed)


def poison_head(inputs: KdaInputs, head: int) -> KdaInputs:
    """Make the values of one token in one value head NaN."""
    v = inputs.v.clone()
    v[:, inputs.v.shape[1] // 2, head] = torch.nan
    return inputs.replace(v=v)


def on_grid(inputs: KdaInputs) -> KdaInputs:
    """Round v and the state to multiples of 1/8 below 2, so that a dyadic rotation of them is exact in every dtype."""
    state = inputs.initial_state
    return inputs.replace(v=_grid(inputs.v), initial_state=None if state is None else _grid(state))


def _grid(x: Tensor) -> Tensor:
    return ((x.double() * 8).round().clamp(-15, 15) / 8).to(x.dtype)


def dyadic_rotation(width: int, seed: int) -> Tensor:
    """Return an orthogonal matrix of entries 0, 1 and +-1/2: Householder reflections of four axes at a time, then a permutation."""
    rotation = torch.eye(width, dtype=torch.float64)
    for first in range(0, width - 3, 4):
        rotation[first : first + 4, first : first + 4] -= 0.5
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return rotation[:, order]


def apply_last(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Return ``x`` times ``matrix`` along one axis."""
    return (x.movedim(axis, -1) @ matrix.to(x.dtype)).movedim(-1, axis)


def rotate_values(inputs: KdaInputs, rotation: Tensor) -> KdaInputs:
    """Rotate v and the value axis of the state."""
    state = inputs.initial_state
    axis = -2 if inputs.state_v_first else -1
    turned = apply_last(inputs.v.double(), rotation, -1).to(inputs.v.dtype)
    return inputs.replace(
        v=turned, initial_state=None if state is None else apply_last(state.double(), rotation, axis).to(state.dtype)
    )


def half_unit(x: Tensor) -> Tensor:
    """Return half a unit in the last place of every element."""
    return 0.5 * unit_in_last_place(x.double(), x.dtype)


def signed_permutation(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return an order and signs of the channels."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return torch.randperm(width, generator=generator), signs


def permute_state(state: Tensor, order: Tensor, signs: Tensor, *, v_first: bool) -> Tensor:
    """Apply a signed permutation to the channel axis of a state."""
    if v_first:
        return state[..., order] * signs[order].to(state.dtype)
    return state[..., order, :] * signs[order].to(state.dtype)[:, None]


def permute_channels(inputs: KdaInputs, order: Tensor, signs: Tensor) -> KdaInputs:
    """Apply a signed permutation to the channels of q, k, the gate and the state."""
    state, bias = inputs.initial_state, inputs.dt_bias
    flips = signs[order].to(inputs.q.dtype)
    heads = inputs.v.shape[2]
    return inputs.replace(
        q=inputs.q[..., order] * flips,
        k=inputs.k[..., order] * flips,
        g=inputs.g[..., order],
        dt_bias=None if bias is None else bias.reshape(heads, -1)[:, order].flatten(),
        initial_state=None if state is None else permute_state(state, order, signs, v_first=inputs.state_v_first),
    )


def negate_tokens(inputs: KdaInputs, seed: int) -> KdaInputs:
    """Negate k and v of about half of the tokens; a key shared by several value heads takes their values with it."""
    shape = (1, inputs.q.shape[1], 1, 1)
    signs = (1 - 2 * (Draw(seed).uniform(shape) < 0.5).double()).to(inputs.k)  # noqa: PLR2004 - half of them
    return inputs.replace(k=inputs.k * signs, v=inputs.v * signs)


def scale_values(inputs: KdaInputs, factor: float) -> KdaInputs:
    """Multiply v and the state by a power of two."""
    state = inputs.initial_state
    return inputs.replace(v=inputs.v * factor, initial_state=None if state is None else state * factor)


def repeat_tokens(inputs: KdaInputs, seed: int) -> tuple[KdaInputs, Tensor, Tensor]:
    """Put a copy in front of one token in five; return the call, where the old tokens are now, and where the copies are."""
    length, device = inputs.q.shape[1], inputs.q.device
    gaps = (Draw(seed).uniform((length,)) < 0.2).long()  # noqa: PLR2004 - one in five
    kept = torch.arange(length) + torch.cat([gaps, gaps.new_zeros(1)])[:-1].cumsum(0)
    total = length + int(gaps.sum())
    source = torch.searchsorted(kept, torch.arange(total)).clamp(max=length - 1).to(device)
    kept = kept.to(device)
    copied = torch.ones(total, dtype=torch.bool, device=device)
    copied[kept] = False
    # A copy behind the last token has no token of its own to stand in front of.
    copies = copied.nonzero()[:, 0]
    copies = copies[copies + 1 < total]
    end = int(kept[-1]) + 1 if length else 0
    return (
        inputs.replace(**{name: getattr(inputs, name)[:, source[:end]].clone() for name in PER_TOKEN}),
        kept,
        copies[copies < end],
    )


def insert_identity_tokens(inputs: KdaInputs, seed: int) -> tuple[KdaInputs, Tensor]:
    """Insert tokens of zero strength and zero decay, with keys and values of their own; return where the old tokens are."""
    stretched, kept, copies = repeat_tokens(inputs, seed)
    stretched.g[:, copies] = 0
    stretched.beta[:, copies] = 0
    return stretched, kept


def split_decays(inputs: KdaInputs, seed: int) -> tuple[KdaInputs, Tensor]:
    """Let some tokens decay in two steps: half in a token that writes nothing; return where the old tokens are."""
    stretched, kept, copies = repeat_tokens(inputs, seed)
    stretched.beta[:, copies] = 0
    for place in (copies, copies + 1):
        stretched.g[:, place] /= 2
    return stretched, kept


def split_writes(inputs: KdaInputs, seed: int) -> tuple[KdaInputs, KdaInputs, Tensor]:
    """Write some tokens in two steps of strength 1/2, and in one of strength 3/4; return both calls, and where the old tokens are."""
    stretched, kept, copies = repeat_tokens(inputs, seed)
    stretched.beta[:, copies] = 0.5
    stretched.beta[:, copies + 1] = 0.5
    stretched.g[:, copies + 1] = 0
    whole = inputs.beta.clone()
    whole[:, torch.isin(kept, copies + 1)] = 0.75
    return stretched, inputs.replace(beta=whole), kept


def with_unit_keys(inputs: KdaInputs) -> KdaInputs:
    """Replace every key by the unit vector of its largest channel, of length one in every dtype."""
    unit = torch.nn.functional.one_hot(inputs.k.abs().argmax(-1), inputs.k.shape[-1])
    return inputs.replace(k=unit.to(inputs.k.dtype))


def take_values(inputs: KdaInputs, *, even: bool) -> KdaInputs:
    """Keep the values of the even tokens and the state, or those of the odd tokens without it; together they are the call."""
    chosen = (torch.arange(inputs.v.shape[1], device=inputs.v.device) % 2 == 0) == even
    state = inputs.initial_state
    return inputs.replace(
        v=torch.where(chosen[None, :, None, None], inputs.v, torch.zeros_like(inputs.v)),
        initial_state=None if state is None else state * float(even),
    )


def last_reads(inputs: KdaInputs, final_state: Tensor) -> Tensor:
    """Return what the last token of each row reads from the final state, ``scale S_T^T q_T``, float64 ``[B, 1, G, V]``."""
    group = inputs.v.shape[2] // inputs.q.shape[2]
    q_BGK = _normalised(inputs, inputs.q[:, -1]).repeat_interleave(group, 1)
    state = final_state.double().transpose(-1, -2) if inputs.state_v_first else final_state.double()
    return inputs.effective_scale * torch.einsum("bgk,bgkv->bgv", q_BGK, state)[:, None]


def pure_decay(inputs: KdaInputs) -> tuple[Tensor, Tensor]:
    """Return outputs and final state of a call with beta = 0, in closed form: ``S_t = exp(G_t) S_0``, in float64."""
    group = inputs.v.shape[2] // inputs.q.shape[2]
    q_BTGK = _normalised(inputs, inputs.q).repeat_interleave(group, 2)
    decay_BTGK = inputs.g.double().cumsum(1).exp()
    state = _state(inputs)
    o = inputs.effective_scale * torch.einsum("btgk,btgk,bgkv->btgv", q_BTGK, decay_BTGK, state)
    final = decay_BTGK[:, -1, :, :, None] * state
    return o, final.transpose(-1, -2) if inputs.state_v_first else final


def delta_rule(inputs: KdaInputs) -> tuple[Tensor, Tensor]:
    """Return outputs and final state of a call with g = 0, as a product of ``I - beta k k^T``, in float64."""
    group = inputs.v.shape[2] // inputs.q.shape[2]
    q, k = (_normalised(inputs, x).repeat_interleave(group, 2) for x in (inputs.q, inputs.k))
    v, beta = inputs.v.double(), inputs.beta.double()
    state = _state(inputs)
    identity = torch.eye(k.shape[-1], dtype=torch.float64, device=k.device)
    outputs = []
    for t in range(k.shape[1]):
        erase = identity - beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None, :]
        state = erase @ state + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(inputs.effective_scale * torch.einsum("bgk,bgkv->bgv", q[:, t], state))
    return torch.stack(outputs, 1), state.transpose(-1, -2) if inputs.state_v_first else state


def _normalised(inputs: KdaInputs, x: Tensor) -> Tensor:
    wide = x.double()
    return wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt() if inputs.use_qk_l2norm_in_kernel else wide


def _state(inputs: KdaInputs) -> Tensor:
    if inputs.initial_state is None:
        batch, heads = inputs.v.shape[0], inputs.v.shape[2]
        return torch.zeros(
            batch, heads, inputs.k.shape[3], inputs.v.shape[3], dtype=torch.float64, device=inputs.q.device
        )
    state = inputs.initial_state.double()
    return state.transpose(-1, -2) if inputs.state_v_first else state

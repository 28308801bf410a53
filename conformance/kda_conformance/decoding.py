"""Decoding as the laws see it: some tokens of some rows, whose states lie in slots of a pool.

An implementation decodes if it has a method ``step``; a function that is judged has an attribute ``step``, a function that takes

    step(q, k, v, g, beta, *, state, state_indices, cu_seqlens, num_accepted_tokens, has_initial_state, source_indices,
         snapshot_indices, snapshot_every, ...the activations' arguments of the operator)

and returns ``o``, or a tuple that begins with it; the pool ``state`` is written in place. What differs from a default is passed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from kda_reference import KdaInputs
    from torch import Tensor

# Without the argument, not the claim.
CLAIM_OF_PARAMETER = {
    "num_accepted_tokens": "drafts",
    "has_initial_state": "new_rows",
    "source_indices": "snapshots",
    "snapshot_indices": "snapshots",
}
# What a step takes of a call of the operator, where it differs from the default.
ACTIVATIONS = (
    "scale", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "lower_bound",
    "A_log", "dt_bias", "state_v_first", "cu_seqlens",
)  # fmt: skip
PADDING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of decoding.

    Attributes
    ----------
    inputs
        The tokens ``[B, T, ...]`` of N = B rows, or of packed ones, and how they are activated; it has no state of its own.
    slots
        int64 ``[N]`` or ``[N, W]``. A row of at most W tokens leaves the state after its token t in slot ``slots[n, t]``, one that is
        longer or empty its last state in ``slots[n, 0]``. -1 is padding: nothing is written, and a row that starts there is no row.
    num_accepted_tokens
        int64 ``[N]``, 1 to W: a row starts from slot ``slots[n, num_accepted_tokens[n] - 1]``; ``None`` means 1.
    has_initial_state
        bool ``[N]``: false where a row starts from zeros, whatever its slot holds; ``None`` means true.
    sources
        int64 ``[N]``: slots that rows start from instead; ``None`` means none.
    snapshots, snapshot_every
        int64 ``[N, M]``: slots for the states after each so many tokens of a row; ``None`` means none.
    """

    inputs: KdaInputs
    slots: Tensor
    num_accepted_tokens: Tensor | None = None
    has_initial_state: Tensor | None = None
    sources: Tensor | None = None
    snapshots: Tensor | None = None
    snapshot_every: int = 64

    def keywords(self) -> dict[str, Any]:
        """Return the arguments of a step function, but for the pool."""
        found = {name: getattr(self.inputs, name) for name in ("q", "k", "v", "g", "beta")}
        optional = {name: getattr(self.inputs, name) for name in ACTIVATIONS} | {
            "num_accepted_tokens": self.num_accepted_tokens,
            "has_initial_state": self.has_initial_state,
            "source_indices": self.sources,
            "snapshot_indices": self.snapshots,
            "snapshot_every": None if self.snapshots is None else self.snapshot_every,
        }
        given = {name: value for name, value in optional.items() if value is not None and value is not False}
        return found | {"state_indices": self.slots} | given


@runtime_checkable
class Decoder(Protocol):
    """An implementation that decodes."""

    def step(self, call: Step, pool: Tensor) -> Tensor:
        """Advance the rows of the call, write their states to the pool ``[S, G, K, V]`` (or ``[S, G, V, K]``), and return ``o``."""
        ...


def claims_of(step: Callable[..., Any] | None) -> dict[str, bool]:
    """Return what a step function claims by its signature; nothing where there is none."""
    if step is None:
        return {}
    names = inspect.signature(step).parameters
    found = {"decode": True, **dict.fromkeys(CLAIM_OF_PARAMETER.values(), True)}
    return found | {claim: False for name, claim in CLAIM_OF_PARAMETER.items() if name not in names}


def run(step: Callable[..., Any], call: Step, pool: Tensor) -> Tensor:
    """Call a step function."""
    with torch.no_grad():
        result = step(state=pool, **call.keywords())
    o: Tensor = result[0] if isinstance(result, tuple) else result
    return o


def pool_with(states: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """Return a pool that holds states ``[N, ...]`` in slots ``[N]``, and NaN elsewhere and in the memory between its slots."""
    memory = torch.full((num_slots, 2, *states.shape[1:]), torch.nan, dtype=states.dtype, device=states.device)
    pool = memory[:, 1]
    pool[slots] = states
    return pool


def scattered(num_rows: int, device: torch.device | str) -> Tensor:
    """Return a slot for each row, in no order, none of them the first: ``2 N - 1, 2 N - 3, ..., 1`` but for the last two, which swap."""
    slots = torch.arange(2 * num_rows - 1, 0, -2, device=device)
    return torch.cat([slots[:-2], slots[-2:].flip(0)])

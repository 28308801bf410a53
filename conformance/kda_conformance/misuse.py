"""Calls that contradict the contract and must be refused, and calls that look odd but are legal."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kda_conformance.cases import Case
from kda_conformance.subject import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kda_reference import KdaInputs
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mistake:
    """One way to contradict the contract.

    Attributes
    ----------
    name
        What is wrong, in words.
    case
        The legal call it starts from.
    apply
        Turns the legal call into the wrong one.
    needs
        A claim without which the mistake cannot be made, or ``None``.
    deliberate
        Whether only a check refuses it: the arithmetic would go through.
    """

    name: str
    case: str
    apply: Callable[[KdaInputs], KdaInputs]
    needs: str | None = None
    deliberate: bool = False

    def __str__(self) -> str:
        """Return what is wrong."""
        return self.name

    def call(self, dtype: str) -> Call:
        """Return the legal call that the mistake is made in."""
        return Call(Case.parse(self.case), dtype)


PLAIN = "T=20 H=1 G=1 K=16 V=8"
PACKED = "T=7,13 H=1 G=1 K=16 V=8"


def _offsets(*values: int) -> Callable[[KdaInputs], KdaInputs]:
    return lambda x: x.replace(cu_seqlens=torch.tensor(values, device=x.q.device))


MISTAKES = (
    Mistake("k shorter than q", PLAIN, lambda x: x.replace(k=x.k[:, :-1])),
    Mistake("k narrower than q", PLAIN, lambda x: x.replace(k=x.k[..., :-1])),
    Mistake("g of another width", PLAIN, lambda x: x.replace(g=x.g[..., :-1])),
    Mistake("beta with a width axis", PLAIN, lambda x: x.replace(beta=x.beta[..., None].expand(*x.beta.shape, 8))),
    Mistake("value heads no multiple of query heads", "T=20 H=2 G=2 K=16 V=8", lambda x: x.replace(
        v=x.v.repeat(1, 1, 2, 1)[:, :, :3], g=x.g.repeat(1, 1, 2, 1)[:, :, :3], beta=x.beta.repeat(1, 1, 2)[:, :, :3], initial_state=None
    )),
    Mistake("state of the wrong shape", PLAIN, lambda x: x.replace(initial_state=x.initial_state[..., :-1]), "initial_state"),  # type: ignore[index]
    Mistake("state of a low dtype", PLAIN, lambda x: x.replace(initial_state=x.initial_state.bfloat16()), "initial_state"),  # type: ignore[union-attr]
    Mistake("one state for two sequences", PACKED, lambda x: x.replace(initial_state=x.initial_state[:1]), "initial_state"),  # type: ignore[index]
    Mistake("offsets that decrease", PACKED, _offsets(0, 13, 7, 20), "packed"),
    Mistake("offsets that stop early", PACKED, _offsets(0, 7, 19), "packed"),
    Mistake("offsets beyond the end", PACKED, _offsets(0, 7, 21), "packed"),
    Mistake("offsets that start late", PACKED, _offsets(1, 7, 20), "packed", deliberate=True),
    Mistake("packing with two batch rows", "B=2 T=20 H=1 G=1 K=16 V=8 state=0", _offsets(0, 7, 20), "packed"),
    Mistake("a lower bound below -5", "T=20 K=16 V=8 gate_form=bounded", lambda x: x.replace(lower_bound=-6.0), deliberate=True),
    Mistake("a lower bound of zero", "T=20 K=16 V=8 gate_form=bounded", lambda x: x.replace(lower_bound=0.0), deliberate=True),
    Mistake("a softplus gate without A_log", "T=20 K=16 V=8 gate_form=softplus", lambda x: x.replace(A_log=None, dt_bias=None)),
    Mistake("doubled beta without its sigmoid", PLAIN, lambda x: x.replace(allow_neg_eigval=True), "allow_neg_eigval"),
)  # fmt: skip


def arranged(inputs: KdaInputs, arrange: Callable[[Tensor], Tensor]) -> KdaInputs:
    """Return the same values with every tensor laid out anew."""
    return inputs.replace(**{name: arrange(tensor) for name, tensor in inputs.tensors().items()})


def _with_gaps(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() > 2 else tensor  # noqa: PLR2004 - A_log has no tokens


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"gaps": _with_gaps, "heads-first": _heads_first}
"""Every second column of wider tensors whose other columns are NaN; and views of ``[B, heads, T, width]``."""


def shared_by_heads(inputs: KdaInputs) -> KdaInputs:
    """Return the call with the gate, strength and state of its first value head in all of them, as views of stride zero."""
    state = inputs.initial_state
    return inputs.replace(
        g=inputs.g[:, :, :1].expand(inputs.g.shape),
        beta=inputs.beta[:, :, :1].expand(inputs.beta.shape),
        initial_state=None if state is None else state[:1, :1].expand(state.shape),
    )


GUARD_ELEMENTS = 256


def guarded(inputs: KdaInputs) -> KdaInputs:
    """Return the same values as contiguous tensors that lie between NaN in memory."""
    return arranged(inputs, _between_guards)


def _between_guards(tensor: Tensor) -> Tensor:
    size = tensor.numel()
    wide = torch.full((size + 2 * GUARD_ELEMENTS,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    inside = wide[GUARD_ELEMENTS : GUARD_ELEMENTS + size].view(tensor.shape)
    return inside.copy_(tensor)


def spread_tokens(inputs: KdaInputs, stride: int) -> KdaInputs:
    """Return the same q, k and v with tokens ``stride`` elements apart."""
    return inputs.replace(**{name: spread(getattr(inputs, name), stride) for name in ("q", "k", "v")})


def spread(tensor: Tensor, stride: int) -> Tensor:
    """Return the same ``[B, T, heads, width]`` with tokens ``stride`` elements apart."""
    batch, length, heads, width = tensor.shape
    wide = torch.empty(batch * length * stride, dtype=tensor.dtype, device=tensor.device)
    return wide.as_strided((batch, length, heads, width), (length * stride, stride, width, 1)).copy_(tensor)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Have torch fill new memory with NaN, which it does in its deterministic mode."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Of operations that have no deterministic form, which is not the question here.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(mode=before, warn_only=warns)

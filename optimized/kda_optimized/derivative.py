"""A call as one node of the derivative graph: what is kept of it, and its gradients from that.

Arguments are positional, in the order of :data:`ARGUMENTS`, as autograd and ``torch.library`` see them.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.contract import TENSOR_ARGUMENTS, KdaInputs
from torch import Tensor
from torch.autograd.function import once_differentiable

from kda_optimized.backward import chunk_backward
from kda_optimized.chunkwise import chunk_forward, recurrent_forward

if TYPE_CHECKING:
    from collections.abc import Iterable

TENSORS = (*TENSOR_ARGUMENTS, "cu_seqlens")
OPTIONS = tuple(field.name for field in fields(KdaInputs) if field.name not in TENSORS)
ARGUMENTS = (*TENSORS, *OPTIONS, "recurrent")


def arguments_of(inputs: KdaInputs, *, recurrent: bool) -> tuple[Any, ...]:
    """Return a call as positional arguments."""
    return (*[getattr(inputs, name) for name in TENSORS + OPTIONS], recurrent)


def inputs_of(arguments: Iterable[Any]) -> KdaInputs:
    """Return the call that positional arguments stand for."""
    return KdaInputs(**dict(zip(TENSORS + OPTIONS, arguments, strict=False)))


def evaluate(inputs: KdaInputs, *, recurrent: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``o`` and the final state of an admitted call, the latter ``None`` unless asked for."""
    return recurrent_forward(inputs) if recurrent else chunk_forward(inputs)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:  # noqa: ANN401
    """Keep the arguments for the backward, and nothing else."""
    del output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(TENSORS)])
    ctx.others = inputs[len(TENSORS) :]


def kept(ctx: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Return the arguments that :func:`keep` kept."""
    return (*ctx.saved_tensors, *ctx.others)


def wanted(ctx: Any) -> list[str]:  # noqa: ANN401
    """Return the names of the arguments that require gradients."""
    return list(compress(TENSOR_ARGUMENTS, ctx.needs_input_grad))


def in_place(found: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Return gradients as positional results, ``None`` for what has none."""
    return tuple([found.get(name) for name in ARGUMENTS])


class KdaNode(torch.autograd.Function):
    """An admitted call in eager mode; ``None`` where no gradient is asked for, and no work for it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        """Return ``o`` and the final state."""
        # Not split into forward and setup_context: autograd would bind the arguments anew, a tenth of a short call on the host.
        output = evaluate(inputs_of(arguments), recurrent=arguments[-1])
        keep(ctx, arguments, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients, which are not differentiable themselves."""
        if do is None and dfinal_state is None:
            return in_place({})
        return in_place(chunk_backward(inputs_of(kept(ctx)), do, dfinal_state, wanted(ctx)))

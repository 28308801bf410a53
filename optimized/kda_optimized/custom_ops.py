"""The call as operators of ``torch.library``: what ``torch.compile`` and ``torch.export`` see of it.

``kda::forward`` and ``kda::backward`` take the arguments of a call by position. An operator has no optional results, so a final state
that nobody asked for is an empty tensor. Eager calls do not come here: the dispatcher costs them more than it gives.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from kda_reference.contract import TENSOR_ARGUMENTS, KdaInputs
from torch import Tensor

from kda_optimized.backward import chunk_backward
from kda_optimized.checks import admit, check_support
from kda_optimized.derivative import ARGUMENTS, arguments_of, evaluate, in_place, inputs_of, keep, kept, wanted

SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float | None": "float?", "bool": "bool", "int": "int"}
FIELD_TYPES = {field.name: SCHEMA_TYPES[str(field.type)] for field in fields(KdaInputs)} | {"recurrent": "bool"}
CALL = ", ".join(f"{FIELD_TYPES[name]} {name}" for name in ARGUMENTS)


def call(inputs: KdaInputs, *, recurrent: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``o`` and the final state by the operator."""
    o, final_state = forward(*arguments_of(inputs, recurrent=recurrent))
    return o, final_state if inputs.output_final_state else None


@torch.library.custom_op("kda::forward", mutates_args=(), schema=f"({CALL}) -> (Tensor, Tensor)")
def forward(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Check and evaluate a call."""
    inputs = admit(inputs_of(arguments))
    o, final_state = evaluate(inputs, recurrent=arguments[-1])
    return o, inputs.v.new_empty(0, dtype=torch.float32) if final_state is None else final_state


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    inputs = inputs_of(arguments)
    check_support(inputs)
    shape = inputs.state_shape if inputs.output_final_state else (0,)
    return torch.empty_like(inputs.v, memory_format=torch.contiguous_format), inputs.v.new_empty(
        shape, dtype=torch.float32
    )


@torch.library.custom_op(
    "kda::backward",
    mutates_args=(),
    schema=f"({CALL}, Tensor? do, Tensor? dfinal_state, bool[] needed) -> Tensor[]",
)
def backward(*arguments: Any) -> list[Tensor]:  # noqa: ANN401
    """Return the gradients that are needed, in the order of the contract's tensors."""
    *values, do, dfinal_state, needed = arguments
    names = [name for name, need in zip(TENSOR_ARGUMENTS, needed, strict=True) if need]
    found = chunk_backward(admit(inputs_of(values)), do, dfinal_state, names)
    return [found[name] for name in names]


@backward.register_fake
def _(*arguments: Any) -> list[Tensor]:  # noqa: ANN401
    tensors, needed = inputs_of(arguments).tensors(), arguments[-1]
    return [
        torch.empty_like(tensors[name], memory_format=torch.contiguous_format)
        for name, need in zip(TENSOR_ARGUMENTS, needed, strict=True)
        if need
    ]


def _pull_back(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    if do is None and dfinal_state is None:
        return in_place({})
    names = wanted(ctx)
    found = backward(*kept(ctx), do, dfinal_state, [name in names for name in TENSOR_ARGUMENTS])
    return in_place(dict(zip(names, found, strict=True)))


forward.register_autograd(_pull_back, setup_context=keep)

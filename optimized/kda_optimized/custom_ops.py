"""The call as operators of ``torch.library``: what ``torch.compile``, ``torch.export`` and dispatch modes see of it.

Operators take the arguments of a call by position, ``kda::forward`` and ``kda::backward`` those of a call without ``cu_seqlens``,
``kda::packed_forward`` and ``kda::packed_backward`` those of one with, which read it on the host: Inductor leaves them out of CUDA graphs.
An operator has no optional results, so a final state that nobody asked for is an empty tensor.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.contract import TENSOR_ARGUMENTS, KdaInputs
from torch import Tensor
from torch.library import custom_op

from kda_optimized.backward import chunk_backward
from kda_optimized.checks import admit, check_support
from kda_optimized.derivative import ARGUMENTS, arguments_of, evaluate, in_place, inputs_of, keep, kept, wanted

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float | None": "float?", "bool": "bool", "int": "int"}
FIELD_TYPES = {field.name: SCHEMA_TYPES[str(field.type)] for field in fields(KdaInputs)} | {"recurrent": "bool"}
CALL = ", ".join(f"{FIELD_TYPES[name]} {name}" for name in ARGUMENTS)


def call(inputs: KdaInputs, *, recurrent: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``o`` and the final state by an operator, the latter ``None`` unless asked for."""
    operator = whole if inputs.cu_seqlens is None else packed
    o, final_state = operator(*arguments_of(inputs, recurrent=recurrent))
    return o, final_state if inputs.output_final_state else None


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Check and evaluate a call."""
    inputs = admit(inputs_of(arguments))
    o, final_state = evaluate(inputs, recurrent=arguments[-1])
    return o, o.new_empty(0, dtype=torch.float32) if final_state is None else final_state


def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Check what can be checked without values, and return results that have none."""
    inputs = inputs_of(arguments)
    check_support(inputs, read_offsets=False)
    shape = inputs.state_shape if inputs.output_final_state else (0,)
    return inputs.v.new_empty(inputs.v.shape), inputs.v.new_empty(shape, dtype=torch.float32)


def backward(*arguments: Any) -> list[Tensor]:  # noqa: ANN401
    """Return the gradients that are needed, in the order of the contract's tensors."""
    *values, do, dfinal_state, needed = arguments
    names = [name for name, need in zip(TENSOR_ARGUMENTS, needed, strict=True) if need]
    found = chunk_backward(admit(inputs_of(values)), do, dfinal_state, names)
    return [found[name] for name in names]


def fake_backward(*arguments: Any) -> list[Tensor]:  # noqa: ANN401
    """Return gradients without values."""
    tensors = zip(TENSOR_ARGUMENTS, arguments[-1], strict=True)
    inputs = inputs_of(arguments)
    return [getattr(inputs, name).new_empty(getattr(inputs, name).shape) for name, need in tensors if need]


def register(prefix: str, tags: tuple[torch.Tag, ...]) -> CustomOpDef:
    """Register a forward, its derivative and the operator that computes it, which has none itself; return the forward."""
    schema = f"({CALL}, Tensor? do, Tensor? dfinal_state, bool[] needed) -> Tensor[]"
    gradients = custom_op(f"kda::{prefix}backward", backward, mutates_args=(), schema=schema, tags=tags)
    gradients.register_fake(fake_backward)

    def pull_back(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        arguments, names = kept(ctx), wanted(ctx)
        if not inputs_of(arguments).output_final_state:
            dfinal_state = None  # of the empty tensor
        if do is None and dfinal_state is None:
            return in_place({})
        found = gradients(*arguments, do, dfinal_state, [name in names for name in TENSOR_ARGUMENTS])
        return in_place(dict(zip(names, found, strict=True)))

    operator = custom_op(
        f"kda::{prefix}forward", forward, mutates_args=(), schema=f"({CALL}) -> (Tensor, Tensor)", tags=tags
    )
    operator.register_fake(fake_forward)
    operator.register_autograd(pull_back, setup_context=keep)
    return operator


whole = register("", ())
packed = register("packed_", (torch.Tag.cudagraph_unsafe,))

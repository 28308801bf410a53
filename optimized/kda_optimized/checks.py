"""What these kernels refuse, beyond the contract, and what of a call is read on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kda_reference.contract import check_inputs
from kda_reference.errors import DomainError, DtypeError

from kda_optimized.interpreter import check_device

if TYPE_CHECKING:
    from kda_reference.contract import KdaInputs

MAX_WIDTH = 256


def check_support(inputs: KdaInputs, *, read_offsets: bool = True) -> None:
    """Refuse what contradicts the contract and what these kernels do not take; nothing but ``cu_seqlens`` is read, if that.

    Raises
    ------
    KdaError
        If the arguments contradict the contract.
    DtypeError
        If a tensor is float64.
    DomainError
        If a head is wider than 256.
    DeviceError
        If the tensors are on a device that this process cannot run kernels on.
    """
    check_inputs(inputs, read_offsets=read_offsets)
    for name, tensor in inputs.tensors().items():
        if tensor.dtype == torch.float64:
            message = f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}; convert it to float32"
            raise DtypeError(message)
    for name, tensor in (("q", inputs.q), ("v", inputs.v)):
        if tensor.shape[-1] > MAX_WIDTH:
            message = f"{name} must have a head width of at most {MAX_WIDTH}, got {tensor.shape[-1]}; split the head"
            raise DomainError(message)
    check_device(inputs.q.device)


def admit(inputs: KdaInputs) -> KdaInputs:
    """Check a call, and return it with its offsets on the host.

    Offsets are all that is read on the host, once: where they are on a GPU, it is waited for. The copy is the call's own, so that a
    later backward sees the offsets of its forward.

    Raises
    ------
    KdaError
        What :func:`check_support` raises.
    """
    if inputs.cu_seqlens is not None:
        inputs = inputs.replace(cu_seqlens=inputs.cu_seqlens.to("cpu", copy=True))
    check_support(inputs)
    return inputs

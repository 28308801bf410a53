"""A function of MLX arrays as a differentiable function of torch tensors on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}
TORCH_DTYPES = {there: here for here, there in DTYPES.items()}


def run(function: Callable[..., tuple[mx.array, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return what ``function`` makes of the tensors, exactly converted; gradients are MLX's own."""
    found: tuple[Tensor, ...] = _Bridge.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return found


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, function: Callable[..., tuple[mx.array, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401 - torch's own
        context.function = function
        context.save_for_backward(*tensors)
        return tuple(_to_torch(array) for array in function(*map(_to_mlx, tensors)))

    @staticmethod
    def backward(context: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's own
        primals = [_to_mlx(tensor) for tensor in context.saved_tensors]
        _, gradients = mx.vjp(context.function, primals, [_to_mlx(tensor) for tensor in cotangents])
        return None, *(_to_torch(array) for array in gradients)


def _to_mlx(tensor: Tensor) -> mx.array:
    # numpy has no bfloat16; float32 holds every value of both half formats.
    return mx.array(tensor.detach().float().numpy()).astype(DTYPES[tensor.dtype])


def _to_torch(array: mx.array) -> Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(TORCH_DTYPES[array.dtype])

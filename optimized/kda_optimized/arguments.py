"""What functions refuse whose arguments are not those of the operator: tensors of another shape, dtype or device, and offsets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kda_reference.errors import DeviceError, DtypeError, PackingError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    axes: str,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Refuse a tensor of another shape, dtype or device than is wanted.

    Parameters
    ----------
    shape, axes
        Size of each axis, ``None`` where any positive one will do, and their names as a person reads them, such as ``[N, W]``.
    dtypes, device
        Those allowed.

    Raises
    ------
    KdaError
        Naming the argument.
    """
    fits = tensor.dim() == len(shape) and all(
        got >= 1 if wanted is None else got == wanted for got, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        message = f"{name} must have shape {axes} = [{sizes}], got {tuple(tensor.shape)}; pass tensors of one call"
        raise ShapeError(message)
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        message = f"{name} must be {names}, got {tensor.dtype}; convert it"
        raise DtypeError(message)
    if tensor.device != device:
        message = f"{name} must be on the device of the call, {device}, got {tensor.device}; move it"
        raise DeviceError(message)


def num_packed(cu_seqlens: Tensor, num_batch_rows: int, device: torch.device) -> int:
    """Return the number of packed sequences, without reading where they begin and end.

    Raises
    ------
    KdaError
        If the offsets cannot be those of one row of packed sequences.
    """
    check_tensor("cu_seqlens", cu_seqlens, (None,), "[N + 1]", INTEGERS, device)
    if not cu_seqlens.is_contiguous():
        message = f"cu_seqlens must be contiguous, got strides {cu_seqlens.stride()}; copy it"
        raise PackingError(message)
    if num_batch_rows != 1:
        message = f"the batch must have size 1 with cu_seqlens, got {num_batch_rows}; flatten it into the token axis"
        raise PackingError(message)
    return cu_seqlens.numel() - 1

"""Rows of a decoding call and the slots they start from and leave something in: checks, and what kernels are handed of them.

Nothing here reads a table's values: they are the device's business, where an index that is out of range is padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kda_reference.errors import FlagError, ShapeError

from kda_optimized.arguments import INTEGERS, check_tensor
from kda_optimized.launch import strides

if TYPE_CHECKING:
    from torch import Tensor


def slots_of(name: str, table: Tensor | None, num_rows: int, num_slots: int, device: torch.device) -> Tensor:
    """Return the slots that rows leave something in ``[N, W]``; row n has slot n where there is no table.

    Raises
    ------
    KdaError
        If the table does not fit the rows, or there is none and there are fewer slots than rows.
    """
    if table is None:
        if num_slots < num_rows:
            message = f"{name} must be given where {num_rows} rows share {num_slots} slots, got None; say which slots"
            raise ShapeError(message)
        return torch.arange(num_rows, device=device)[:, None]
    if table.dim() == 1:
        check_tensor(name, table, (num_rows,), "[N]", INTEGERS, device)
        return table[:, None]
    check_tensor(name, table, (num_rows, None), "[N] or [N, W]", INTEGERS, device)
    return table


def starts(
    num_rows: int,
    device: torch.device,
    source_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    name_of_flags: str,
    flags: Tensor | None,
) -> dict[str, Any]:
    """Return the kernel arguments that say what each row starts from.

    Raises
    ------
    KdaError
        If a table does not fit the rows, or two contradict each other.
    """
    for name, values in (("source_indices", source_indices), ("num_accepted_tokens", num_accepted_tokens)):
        if values is not None:
            check_tensor(name, values, (num_rows,), "[N]", INTEGERS, device)
    if flags is not None:
        check_tensor(name_of_flags, flags, (num_rows,), "[N]", (torch.bool,), device)
    if source_indices is not None and num_accepted_tokens is not None:
        message = "source_indices must be None with num_accepted_tokens, got both; either says where rows start"
        raise FlagError(message)
    return {
        "source_indices": source_indices, **strides("o", "n", source_indices), "HAS_SOURCE": source_indices is not None,
        "num_accepted_tokens": num_accepted_tokens, **strides("a", "n", num_accepted_tokens),
        "HAS_ACCEPTED": num_accepted_tokens is not None,
        "has_initial": flags, **strides("h", "n", flags), "HAS_FLAG": flags is not None,
    }  # fmt: skip

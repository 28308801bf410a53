"""The short convolution in front of the operator: depthwise, causal, of a few taps, for whole sequences and by steps [KL fig. 3].

    y_t = silu(sum_{j < W} w_j x_{t - W + 1 + j})        w_{W-1} meets the current token

Dimension letters: B rows, T tokens, D channels, W taps, N sequences, S slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kda_reference.errors import DomainError, FlagError, PackingError

from kda_optimized.arguments import FLOATS, check_tensor, num_packed
from kda_optimized.convolution_kernels import (
    kda_convolution_bwd_kernel,
    kda_convolution_bwd_tail_kernel,
    kda_convolution_fwd_kernel,
    kda_convolution_step_kernel,
    kda_convolution_tail_kernel,
)
from kda_optimized.interpreter import check_device
from kda_optimized.launch import Launch, strides, submit
from kda_optimized.launch_config import LaunchConfig, config_of, tile
from kda_optimized.packing import offsets_between, schedule_of
from kda_optimized.slots import slots_of, starts

if TYPE_CHECKING:
    from torch import Tensor

    from kda_optimized.packing import Schedule

MOST_TAPS = 16
# The launch table knows head widths, of which there is none here.
WIDTH = 16
ACTIVATIONS = ("silu", None)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None = None,
    *,
    activation: str | None = "silu",
    output_final_tail: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve whole sequences, which may continue earlier ones; differentiable in x, weight and tail.

    Parameters
    ----------
    x
        Inputs ``[B, T, D]``, bfloat16, float16 or float32, any strides; T may be zero.
    weight
        Taps ``[D, W]``, oldest first, of any of these dtypes; W in 1..16. A released ``[D, 1, W]`` is ``weight[:, 0]``.
    tail
        The W - 1 inputs before each sequence ``[N, W - 1, D]``, oldest first, in x's dtype; ``None`` means zeros.
    activation
        ``"silu"``, or ``None`` for none.
    output_final_tail
        Whether the inputs that a continuation needs are returned.
    cu_seqlens
        Integer ``[N + 1]`` offsets of sequences packed into one row, which may be empty or shorter than W; read by the host. ``None``
        means one sequence a row.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        ``y [B, T, D]`` in x's dtype, and the final tail ``[N, W - 1, D]`` in x's dtype or ``None``.

    Raises
    ------
    KdaError
        If an argument contradicts what is said above; before any kernel is launched.

    Notes
    -----
    Computed in float32. Deterministic; the backward keeps the inputs only.

    References
    ----------
    [KL] Kimi Linear technical report, Fig. 3.
    """
    _check(x, weight, activation)
    num_sequences = x.shape[0]
    if cu_seqlens is not None:
        num_sequences = num_packed(cu_seqlens, x.shape[0], x.device)
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != x.shape[1] or offsets != sorted(offsets):
            message = f"cu_seqlens must rise from 0 to T = {x.shape[1]}, got {offsets}; cover every token once"
            raise PackingError(message)
    if tail is not None:
        shape = (num_sequences, weight.shape[1] - 1, x.shape[2])
        check_tensor("tail", tail, shape, "[N, W - 1, D]", (x.dtype,), x.device)
    result: tuple[Tensor, Tensor | None] = _Convolution.apply(
        x, weight, tail, activation is not None, output_final_tail, cu_seqlens
    )  # type: ignore[no-untyped-call]
    return result


def short_convolution_step(
    x: Tensor,
    weight: Tensor,
    tails: Tensor,
    *,
    activation: str | None = "silu",
    tail_indices: Tensor | None = None,
    source_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    has_initial_tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Convolve the next tokens of N rows, their tails in a pool of S slots that is written in place; not differentiable.

    Rows and slots mean what they mean in :func:`kda_optimized.kda_decode_step`, so that the same indices serve both and a draft that is
    not accepted leaves neither a state nor a tail behind.

    Parameters
    ----------
    x
        ``[B, T, D]`` with N = B, or one packed row; bfloat16, float16 or float32, any strides.
    weight, activation
        As in :func:`short_convolution`.
    tails
        The pool ``[S, W - 1, D]``, oldest input first, in x's dtype or float32, any strides.
    tail_indices
        Integer ``[N]`` or ``[N, M]``: where a row leaves the tail after each of its tokens, as ``state_indices`` says it of states.
        ``None`` means that row n has slot n.
    source_indices, num_accepted_tokens, has_initial_tail, cu_seqlens
        As there, ``has_initial_tail`` as ``has_initial_state``; read on the device only.

    Returns
    -------
    Tensor
        ``y [B, T, D]`` in x's dtype; zero for rows that are padding and behind the last row.

    Raises
    ------
    KdaError
        If an argument contradicts what is said above; before the kernel is launched.
    """
    _check(x, weight, activation)
    num_rows = x.shape[0] if cu_seqlens is None else num_packed(cu_seqlens, x.shape[0], x.device)
    taps = weight.shape[1]
    check_tensor("tails", tails, (None, taps - 1, x.shape[2]), "[S, W - 1, D]", (x.dtype, torch.float32), x.device)
    slots = slots_of("tail_indices", tail_indices, num_rows, tails.shape[0], x.device)
    start = starts(num_rows, x.device, source_indices, num_accepted_tokens, "has_initial_tail", has_initial_tail)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = {
        **_inputs(x), **_filter(weight), "tails": tails, **strides("u", "std", tails), "y": y,
        "tail_indices": slots, **strides("i", "nw", slots), "M": slots.shape[1],
        **start, "cu_seqlens": cu_seqlens,
        "N": num_rows, "num_slots": tails.shape[0], "BW": _tile_of_taps(taps), "PACKED": cu_seqlens is not None,
        "SILU": activation is not None,
    }  # fmt: skip
    _start(kda_convolution_step_kernel, x, arguments, num_rows)
    return y


class _Convolution(torch.autograd.Function):
    """The call as one node of the derivative graph."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        tail: Tensor | None,
        silu: bool,  # noqa: FBT001
        output_final_tail: bool,  # noqa: FBT001
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.silu, ctx.offsets = silu, offsets_between(cu_seqlens, *x.shape[:2])
        ctx.save_for_backward(x, weight, tail)
        return convolution_forward(x, weight, tail, ctx.offsets, silu=silu, output_final_tail=output_final_tail)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if dy is None and dfinal is None:
            return (None,) * 6
        x, weight, tail = ctx.saved_tensors
        return (*convolution_backward(x, weight, tail, dy, dfinal, ctx.offsets, silu=ctx.silu), None, None, None)


def convolution_forward(
    x: Tensor, weight: Tensor, tail: Tensor | None, offsets: tuple[int, ...], *, silu: bool, output_final_tail: bool
) -> tuple[Tensor, Tensor | None]:
    """Return outputs and the final tail of a checked call."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tables, shared = _schedule(kda_convolution_fwd_kernel, x, offsets), _inputs(x) | _past(tail, x)
    arguments = {
        **shared,
        **_filter(weight),
        "BW": _tile_of_taps(weight.shape[1]),
        "y": y,
        "chunk_table": tables.chunk_table,
        "BT": tables.chunk_len,
        "SILU": silu,
    }
    _start(kda_convolution_fwd_kernel, x, arguments, tables.num_chunks)
    if not output_final_tail:
        return y, None
    num_sequences, taps = len(offsets) - 1, weight.shape[1]
    final = torch.empty(num_sequences, taps - 1, x.shape[2], dtype=x.dtype, device=x.device)
    arguments = {**shared, "W": taps, "final_tail": final, "cu_seqlens": tables.cu_seqlens, "BS": _rows_of_tail(taps)}
    _start(kda_convolution_tail_kernel, x, arguments, num_sequences)
    return y, final


def convolution_backward(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None,
    dy: Tensor | None,
    dfinal: Tensor | None,
    offsets: tuple[int, ...],
    *,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and tail, the last ``None`` without a tail."""
    dy = torch.zeros_like(x) if dy is None else dy
    tables, taps = _schedule(kda_convolution_bwd_kernel, x, offsets), weight.shape[1]
    shared = {
        **_inputs(x), **_filter(weight), **_past(tail, x), "dy": dy, **strides("y", "btd", dy),
        "dfinal": x if dfinal is None else dfinal, **strides("f", "nsd", dfinal), "HAS_FINAL": dfinal is not None, "SILU": silu,
    }  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(tables.num_chunks, taps, x.shape[2], dtype=torch.float32, device=x.device)
    arguments = {**shared, "dx": dx, "dweight": parts, "chunk_table": tables.chunk_table, "BT": tables.chunk_len}
    arguments["BW"] = _tile_of_taps(taps)
    _start(kda_convolution_bwd_kernel, x, arguments, tables.num_chunks)
    dweight = parts.sum(0).T.to(weight.dtype)
    if tail is None:
        return dx, dweight, None
    dtail = torch.empty(tail.shape, dtype=tail.dtype, device=x.device)
    arguments = {**shared, "dtail": dtail, "cu_seqlens": tables.cu_seqlens, "BS": _rows_of_tail(taps)}
    _start(kda_convolution_bwd_tail_kernel, x, arguments, len(offsets) - 1)
    return dx, dweight, dtail


def _check(x: Tensor, weight: Tensor, activation: str | None) -> None:
    check_device(x.device)
    check_tensor("x", x, (x.shape[0], x.shape[1] if x.dim() > 1 else 0, None), "[B, T, D]", FLOATS, x.device)
    check_tensor("weight", weight, (x.shape[2], None), "[D, W]", FLOATS, x.device)
    if weight.shape[1] > MOST_TAPS:
        message = f"weight must have at most {MOST_TAPS} taps, got {weight.shape[1]}; a long filter is another operator"
        raise DomainError(message)
    if activation not in ACTIVATIONS:
        message = f"activation must be one of {ACTIVATIONS}, got {activation!r}; apply any other one outside"
        raise FlagError(message)


def _inputs(x: Tensor) -> dict[str, Any]:
    return {"x": x, **strides("x", "btd", x), "T": x.shape[1], "D": x.shape[2]}


def _filter(weight: Tensor) -> dict[str, Any]:
    return {"weight": weight, **strides("w", "dw", weight), "W": weight.shape[1]}


def _past(tail: Tensor | None, x: Tensor) -> dict[str, Any]:
    """Return the arguments of the tail; the stand-in for an absent one is never read."""
    return {"tail": x if tail is None else tail, **strides("u", "nsd", tail), "HAS_TAIL": tail is not None}


def _tile_of_taps(taps: int) -> int:
    """Return the columns of a tile that holds the taps."""
    return int(1 << (taps - 1).bit_length())


def _rows_of_tail(taps: int) -> int:
    """Return the rows of a tile that holds a tail."""
    return int(1 << max(taps - 2, 0).bit_length())


def _config(kernel: Any, x: Tensor) -> LaunchConfig:  # noqa: ANN401 - a Triton function
    return config_of(kernel.__name__, x.device, x.dtype.itemsize, WIDTH)


def _schedule(kernel: Any, x: Tensor, offsets: tuple[int, ...]) -> Schedule:  # noqa: ANN401 - a Triton function
    tokens = _config(kernel, x).block_t
    assert tokens is not None  # noqa: S101 - every launch table names it
    return schedule_of(offsets, tokens, x.shape[1], x.device)


def _start(kernel: Any, x: Tensor, arguments: dict[str, Any], programs: int) -> None:  # noqa: ANN401 - a Triton function
    """Submit a launch of so many programs for each tile of channels."""
    config = _config(kernel, x)
    channels = tile(config.block_k, x.shape[2])
    tiles = -(-x.shape[2] // channels)
    submit(
        Launch(
            kernel=kernel, programs=programs * tiles, arguments=arguments | {"BD": channels}, options=config.options()
        )
    )

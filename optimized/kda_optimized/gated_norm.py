"""The gated norm behind the operator: ``y = act(g) w x / sqrt(mean(x^2) + eps)`` over each head's channels [KL eq. 10]."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.errors import DomainError, FlagError

from kda_optimized.arguments import FLOATS, check_tensor
from kda_optimized.interpreter import check_device
from kda_optimized.launch import Launch, strides, submit
from kda_optimized.launch_config import LaunchConfig, config_of, padded
from kda_optimized.norm_kernels import kda_norm_bwd_kernel, kda_norm_fwd_kernel

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = ("sigmoid", "swish")
MOST_CHANNELS = 8192
# Elements of a tile, which has at least one row, and the most that a warp takes.
TILE_FORWARD, TILE_BACKWARD = 1024, 256
MOST_OF_A_WARP = 512
# The launch table knows head widths up to this.
WIDEST = 256


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5, *, activation: str = "sigmoid"
) -> Tensor:
    """Normalise the last axis and multiply with a gate; differentiable in x, gate and weight.

    Parameters
    ----------
    x
        Any shape ``[..., D]``, D in 1..8192; bfloat16, float16 or float32.
    gate
        Logits of the gate, shaped like x, of any of these dtypes.
    weight
        Factor per channel ``[D]``, of any of these dtypes.
    eps
        Added to the mean square; positive.
    activation
        ``"sigmoid"`` or ``"swish"``.

    Returns
    -------
    Tensor
        Shaped like x, in its dtype.

    Raises
    ------
    KdaError
        If an argument contradicts what is said above; before any kernel is launched.

    Notes
    -----
    Computed in float32. Deterministic; the backward keeps the inputs only.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (10).
    """
    check_device(x.device)
    check_tensor("x", x, (*x.shape[:-1], None), "[..., D]", FLOATS, x.device)
    check_tensor("gate", gate, tuple(x.shape), "[..., D]", FLOATS, x.device)
    check_tensor("weight", weight, (x.shape[-1],), "[D]", FLOATS, x.device)
    if x.shape[-1] > MOST_CHANNELS:
        message = f"x must have at most {MOST_CHANNELS} channels, got {x.shape[-1]}; the norm is over one head"
        raise DomainError(message)
    if not eps > 0:
        message = f"eps must be positive, got {eps}; 1e-5 is the usual choice"
        raise DomainError(message)
    if activation not in ACTIVATIONS:
        message = f"activation must be one of {ACTIVATIONS}, got {activation!r}; name one of them"
        raise FlagError(message)
    result: Tensor = _GatedNorm.apply(x, gate, weight, eps, activation == "swish")  # type: ignore[no-untyped-call]
    return result


class _GatedNorm(torch.autograd.Function):
    """The call as one node of the derivative graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, swish: bool) -> Tensor:  # noqa: ANN401, FBT001
        ctx.eps, ctx.swish = eps, swish
        ctx.save_for_backward(x, gate, weight)
        return norm_forward(x, gate, weight, eps, swish=swish)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, gate, weight = ctx.saved_tensors
        return (*norm_backward(x, gate, weight, dy, ctx.eps, swish=ctx.swish), None, None)


def norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, swish: bool) -> Tensor:
    """Return the result of a checked call."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, arguments = _arguments(TILE_FORWARD, x, gate, weight, eps, swish=swish)
    _start(kda_norm_fwd_kernel, x, tiles, arguments | {"y": y})
    return y


def norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, eps: float, *, swish: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight."""
    dx, dgate = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (x, gate))
    tiles, arguments = _arguments(TILE_BACKWARD, x, gate, weight, eps, swish=swish)
    programs = min(tiles, _config(kda_norm_bwd_kernel, x).programs)
    parts = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    rows = dy.reshape(-1, dy.shape[-1])
    arguments |= {
        "dy": rows,
        **strides("y", "rd", rows),
        "dx": dx,
        "dgate": dgate,
        "dweight": parts,
        "num_programs": programs,
    }
    _start(kda_norm_bwd_kernel, x, programs, arguments)
    return dx, dgate, parts.sum(0).to(weight.dtype)


def _arguments(
    elements: int, x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, swish: bool
) -> tuple[int, dict[str, Any]]:
    """Return the number of tiles and the arguments that both kernels take."""
    channels = x.shape[-1]
    flat_x, flat_gate = x.reshape(-1, channels), gate.reshape(-1, channels)
    rows = max(1, elements // padded(channels))
    return -(-flat_x.shape[0] // rows), {
        "x": flat_x, **strides("x", "rd", flat_x), "gate": flat_gate, **strides("g", "rd", flat_gate),
        "weight": weight, **strides("w", "d", weight), "eps": eps, "num_rows": flat_x.shape[0],
        "D": channels, "BR": rows, "BD": padded(channels), "SWISH": swish,
    }  # fmt: skip


def _config(kernel: Any, x: Tensor) -> LaunchConfig:  # noqa: ANN401 - a Triton function
    """Return how a kernel is launched; rows that are wider than a warp's share have more warps."""
    config = config_of(kernel.__name__, x.device, x.dtype.itemsize, min(padded(x.shape[-1]), WIDEST))
    return replace(config, num_warps=max(config.num_warps, padded(x.shape[-1]) // MOST_OF_A_WARP))


def _start(kernel: Any, x: Tensor, programs: int, arguments: dict[str, Any]) -> None:  # noqa: ANN401 - a Triton function
    options = _config(kernel, x).options()
    submit(Launch(kernel=kernel, programs=programs, arguments=arguments, options=options))

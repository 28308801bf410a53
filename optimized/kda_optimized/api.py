"""The public functions: argument checks, the shape of a call, and the derivative.

Reading order of the kernels: ``forward_prepare``, ``forward_walk``, ``backward_walk``, ``backward_chunk``, ``recurrent``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kda_reference.contract import KdaInputs, check_inputs
from kda_reference.errors import DeviceError, DomainError, DtypeError

from kda_optimized import launch

if TYPE_CHECKING:
    from torch import Tensor

MAX_WIDTH = 256
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def chunk_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """Evaluate Kimi Delta Attention chunk by chunk, forward and backward.

    Parameters
    ----------
    q, k
        Queries and keys ``[B, T, H, K]``, bfloat16, float16 or float32; K in 1..256.
    v
        Values ``[B, T, G, V]`` of the same dtype, G a multiple of H.
    g
        Log decay in nats ``[B, T, G, K]``, in ``(-inf, 0]``, or a gate logit with ``use_gate_in_kernel``; any of the dtypes above.
    beta
        Write strength ``[B, T, G]`` in ``[0, 2]``, or its logit with ``use_beta_sigmoid_in_kernel``; any of the dtypes above.
    scale
        Factor on the queries (dimensionless); ``None`` means ``K ** -0.5``.
    **options
        The other arguments of :class:`kda_reference.KdaInputs`, by name. ``output_final_state`` is ``False`` unless given;
        ``chunk_size`` is an upper limit of the chunk length used.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        ``o`` in v's dtype, and the final state in float32 or ``None``.

    Raises
    ------
    KdaError
        If the arguments contradict the contract or the limits above; before any kernel is launched.
    TypeError
        If an option is not part of the contract.

    Notes
    -----
    Deterministic; prefix-causal bit for bit; right for every legal gate, since decays only ever appear as exponentials of non-positive
    differences. Dots take bfloat16 operands for bfloat16 inputs and IEEE float32 otherwise, with float32 accumulation.

    References
    ----------
    [KL] Kimi Linear technical report, Eqs. (2)-(9).
    """
    inputs = _checked(q, k, v, g, beta, scale, options)
    return _apply(inputs, recurrent=False)


def fused_recurrent_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """Evaluate Kimi Delta Attention token by token in float32, as decoding does.

    Arguments, results and errors are those of :func:`chunk_kda`. The derivative is that of the chunkwise kernels.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    inputs = _checked(q, k, v, g, beta, scale, options)
    return _apply(inputs, recurrent=True)


def _checked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None, options: dict[str, Any]) -> KdaInputs:
    inputs = KdaInputs(q=q, k=k, v=v, g=g, beta=beta, scale=scale, **{"output_final_state": False, **options})
    check_inputs(inputs)
    for name, tensor in inputs.tensors().items():
        if tensor.dtype == torch.float64:
            message = f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}; the float64 form is kda_reference.recurrent_kda"
            raise DtypeError(message)
    for name, width in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if width > MAX_WIDTH:
            message = f"{name} must have a head width of at most {MAX_WIDTH}, got {width}; split the head"
            raise DomainError(message)
    if inputs.chunk_size not in (16, 32, 64):
        message = f"chunk_size must be 16, 32 or 64, got {inputs.chunk_size}; 64 is the usual choice"
        raise DomainError(message)
    if q.device.type != "cuda" and not launch.interpreted():
        message = f"q must be on a CUDA device, got {q.device}; set TRITON_INTERPRET=1 before Triton is imported to run on a CPU"
        raise DeviceError(message)
    return inputs


def _apply(inputs: KdaInputs, *, recurrent: bool) -> tuple[Tensor, Tensor | None]:
    tensors = inputs.tensors()
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())):
        return launch.recurrent_forward(inputs) if recurrent else launch.chunk_forward(inputs, save=False)[:2]
    result: tuple[Tensor, Tensor | None] = _Kda.apply(inputs, recurrent, *(tensors.get(name) for name in DIFFERENTIABLE))  # type: ignore[no-untyped-call]
    return result


class _Kda(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: KdaInputs, recurrent: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401, FBT001
        del tensors  # they are the fields of inputs; autograd has to see them as arguments
        o, final_state, saved = launch.chunk_forward(inputs, save=True)
        if recurrent:
            o, final_state = launch.recurrent_forward(inputs)
        ctx.save_for_backward(*inputs.tensors().values(), *saved)
        ctx.names = tuple(inputs.tensors())
        ctx.inputs = inputs.replace(**dict.fromkeys(ctx.names))
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        stored = ctx.saved_tensors
        count = len(ctx.names)
        inputs = ctx.inputs.replace(**dict(zip(ctx.names, stored[:count], strict=True)))
        gradients = launch.chunk_backward(inputs, launch.Saved(*stored[count:]), do, dfinal_state)
        return None, None, *(gradients.get(name) for name in DIFFERENTIABLE)

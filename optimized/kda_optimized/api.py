"""The public functions: argument checks and the derivative.

Reading order of the kernels: ``chunks``, ``products``, ``strips``; ``forward_prepare``, ``forward_walk``, ``forward_segments`` and
``recurrent``, which ``chunkwise`` launches; ``backward_prepare``, ``backward_states``, ``backward_walk``, ``backward_pairs``,
``backward_tiles``, ``backward_channels`` and ``backward_heads``, which ``backward`` launches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kda_reference.contract import KdaInputs, check_inputs
from kda_reference.errors import DomainError, DtypeError

from kda_optimized.backward import chunk_backward
from kda_optimized.chunkwise import chunk_forward, recurrent_forward
from kda_optimized.interpreter import check_device

if TYPE_CHECKING:
    from torch import Tensor

MAX_WIDTH = 256
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,  # noqa: FBT001, FBT002 - the public interface
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Evaluate Kimi Delta Attention chunk by chunk; differentiable in every tensor.

    Arguments are those of :class:`kda_reference.contract.KdaInputs`, under the same names; what is particular to this
    implementation:

    Parameters
    ----------
    q, k, v
        bfloat16, float16 or float32, all three alike; K and V in 1..256. Any strides.
    g, beta
        bfloat16, float16 or float32, whatever q is.
    output_final_state
        ``False`` unless given, as in the public interface.
    safe_gate
        Accepted and not exploited: every gate is computed safely.
    chunk_size
        Positive; an upper limit on the tokens per chunk. Kernels take 16; the backward keeps a state every 64 tokens, or every 32 or 16
        where this is less, which doubles or quadruples its memory for states.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        ``o`` ``[B, T, G, V]`` in v's dtype, and the final state in float32 or ``None``.

    Raises
    ------
    KdaError
        If the arguments contradict the contract or the limits above; before any kernel is launched.

    Notes
    -----
    Deterministic, and prefix-causal bit for bit. Every gate is safe: a decay is only ever the exponential of a sum of log decays
    between two tokens. Float32 inputs are computed in float32; for 16-bit inputs the operands of matrix products carry
    11 (float16, with the magnitude taken out) or 16 bits (two bfloat16 values), never 8, and the state is float32. Where sequences and
    heads are few, a sequence is cut into segments that are walked side by side. The backward keeps the inputs only.

    References
    ----------
    [KL] Kimi Linear technical report, Eqs. (2)-(9).
    """
    return _apply(KdaInputs(**locals()), recurrent=False)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,  # noqa: FBT001, FBT002 - the public interface
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Evaluate Kimi Delta Attention token by token in float32, as decoding does; differentiable.

    Arguments, results and errors are those of :func:`chunk_kda`. The derivative is computed by the chunkwise kernels, from the inputs,
    in the arithmetic of :func:`chunk_kda`.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    return _apply(KdaInputs(**locals()), recurrent=True)


def _apply(inputs: KdaInputs, *, recurrent: bool) -> tuple[Tensor, Tensor | None]:
    _check(inputs)
    tensors = inputs.tensors()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        result: tuple[Tensor, Tensor | None] = _Kda.apply(
            inputs, recurrent, *(tensors.get(name) for name in DIFFERENTIABLE)
        )  # type: ignore[no-untyped-call]
        return result
    return recurrent_forward(inputs) if recurrent else chunk_forward(inputs)


def _check(inputs: KdaInputs) -> None:
    check_inputs(inputs)
    for name, tensor in inputs.tensors().items():
        if tensor.dtype == torch.float64:
            message = f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}; convert it to float32"
            raise DtypeError(message)
    for name, tensor in (("q", inputs.q), ("v", inputs.v)):
        if tensor.shape[-1] > MAX_WIDTH:
            message = f"{name} must have a head width of at most {MAX_WIDTH}, got {tensor.shape[-1]}; split the head"
            raise DomainError(message)
    if inputs.chunk_size < 1:
        message = f"chunk_size must be positive, got {inputs.chunk_size}; 64 is the usual choice"
        raise DomainError(message)
    check_device(inputs.q.device)


class _Kda(torch.autograd.Function):
    """The call as one node of the derivative graph; the tensors are passed beside ``inputs`` so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, inputs: KdaInputs, recurrent: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401, FBT001
        ctx.set_materialize_grads(False)
        ctx.names = [name for name, tensor in zip(DIFFERENTIABLE, tensors, strict=True) if tensor is not None]
        ctx.inputs = inputs.replace(**dict.fromkeys(ctx.names))
        ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))
        return recurrent_forward(inputs) if recurrent else chunk_forward(inputs)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if do is None and dfinal_state is None:
            return (None,) * (2 + len(DIFFERENTIABLE))
        inputs = ctx.inputs.replace(**dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        found = chunk_backward(inputs, do, dfinal_state)
        needed = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(found.get(name) if need else None for name, need in zip(DIFFERENTIABLE, needed, strict=True)),
        )

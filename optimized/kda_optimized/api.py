"""The public functions.

What is refused is in ``checks``, the derivative in ``derivative``, what compilers see in ``custom_ops``.

Reading order of the kernels: ``chunks``, ``products``, ``strips``; ``forward_prepare``, ``forward_walk``, ``forward_segments`` and
``recurrent``, which ``chunkwise`` launches; ``backward_prepare``, ``backward_states``, ``backward_walk``, ``backward_pairs``,
``backward_tiles``, ``backward_channels`` and ``backward_heads``, which ``backward`` launches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kda_reference.contract import KdaInputs
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kda_optimized import custom_ops
from kda_optimized.checks import admit
from kda_optimized.derivative import KdaNode, arguments_of, evaluate

if TYPE_CHECKING:
    from torch import Tensor


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
    heads are few, a sequence is cut into segments that are walked side by side. The backward keeps the inputs only, and computes gradients
    of those that require them only; the gradients themselves have none.

    Autocast changes nothing: dtypes are those of the arguments. Under ``torch.compile`` the call is one operator. Where ``cu_seqlens`` is
    given, it is read on the host, once, which waits for a GPU that holds it; nothing else is read, so that calls without it, or with it on
    the CPU, can be captured in a CUDA graph once they have been made before.

    References
    ----------
    [KL] Kimi Linear technical report, Eqs. (2)-(9).
    """
    inputs = KdaInputs(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        safe_gate=safe_gate,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        A_log=A_log,
        dt_bias=dt_bias,
    )
    return _apply(inputs, recurrent=False)


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
    inputs = KdaInputs(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        safe_gate=safe_gate,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        A_log=A_log,
        dt_bias=dt_bias,
    )
    return _apply(inputs, recurrent=True)


def _apply(inputs: KdaInputs, *, recurrent: bool) -> tuple[Tensor, Tensor | None]:
    # Nobody else pays for the dispatcher: it makes the host's share of a short training call a half longer.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return custom_ops.call(inputs, recurrent=recurrent)
    inputs = admit(inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.tensors().values()):
        result: tuple[Tensor, Tensor | None] = KdaNode.apply(*arguments_of(inputs, recurrent=recurrent))  # type: ignore[no-untyped-call]
        return result
    return evaluate(inputs, recurrent=recurrent)

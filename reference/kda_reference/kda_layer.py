"""The layer around the operator [KL eq. 10, fig. 3].

    q, k, v   = SiLU(conv(W x))              then q and k to unit length
    log decay = -exp(A) softplus(W_f_b W_f_a x + b)          beta = sigmoid(W_b x)
    out       = W_o (sigmoid(W_g_b W_g_a x) RMSNorm(KDA(q, k, v, log decay, beta)))      norm per head

Dimension letters: B sequences, T tokens, D model width, H query/key heads, G value heads, K and V head widths, S = taps - 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch.nn.functional import silu

from kda_reference.contract import KdaInputs
from kda_reference.differentiable import differentiable_kda
from kda_reference.normalisation import gated_rms_norm
from kda_reference.short_convolution import short_convolution

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class KdaMemory(NamedTuple):
    """What a sequence leaves behind: the state ``[B, G, K, V]`` and three tails ``[B, S, channels]``."""

    state: Tensor
    q_tail: Tensor
    k_tail: Tensor
    v_tail: Tensor


def kda_layer(
    x_BTD: Tensor,
    weights: Mapping[str, Tensor],
    *,
    heads: tuple[int, int],
    eps: float,
    memory: KdaMemory | None = None,
) -> tuple[Tensor, KdaMemory]:
    """Apply one layer to sequences that may continue earlier ones.

    Parameters
    ----------
    x_BTD
        New tokens, normalised, float64.
    weights
        Of one layer, under the released names below ``self_attn.``.
    heads
        H and G; value head j reads query/key head ``j // (G // H)``.
    eps
        Of the norm on the operator's output.
    memory
        What the call before returned; ``None`` means a beginning.

    Returns
    -------
    tuple[Tensor, KdaMemory]
        Outputs ``[B, T, D]``, and what a call that goes on needs.
    """
    num_heads, num_value_heads = heads
    tails = (None, None, None) if memory is None else memory[1:]
    operands, new_tails = {}, []
    for name, number, tail in zip("qkv", (num_heads, num_heads, num_value_heads), tails, strict=True):
        projected = x_BTD @ weights[f"{name}_proj.weight"].T
        convolved, new_tail = short_convolution(projected, weights[f"{name}_conv1d.weight"][:, 0], tail)
        operands[name] = silu(convolved).unflatten(-1, (number, -1))
        new_tails.append(new_tail)
    o_BTGV, state = differentiable_kda(
        KdaInputs(
            **operands,
            g=(x_BTD @ weights["f_a_proj.weight"].T @ weights["f_b_proj.weight"].T).unflatten(
                -1, (num_value_heads, -1)
            ),
            beta=x_BTD @ weights["b_proj.weight"].T,
            A_log=weights["A_log"].flatten(),
            dt_bias=weights["dt_bias"],
            initial_state=None if memory is None else memory.state,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )
    )
    gate = (x_BTD @ weights["g_a_proj.weight"].T @ weights["g_b_proj.weight"].T).unflatten(-1, (num_value_heads, -1))
    y_BTGV = gated_rms_norm(o_BTGV, gate, weights["o_norm.weight"], eps)
    return y_BTGV.flatten(2) @ weights["o_proj.weight"].T, KdaMemory(state, *new_tails)

"""The layer of Kimi Delta Attention [KL eq. 10, fig. 3], and its two baselines.

    q, k, v   = SiLU(conv(W x)),  q and k to unit length          log decay = -exp(A) softplus(W_f_b W_f_a x + b)
    beta      = sigmoid(W_b x)                                    out = W_o (gate(W_g_b W_g_a x) RMSNorm(KDA(...)))

``gdn`` has one decay per head, from ``a_proj``: the same operator with a gate that is alike in every channel. ``decay`` is that
without the delta rule. It runs on the same operator too: with ``v`` multiplied and ``beta`` divided by 2^30, what is written is
unchanged and what is erased is 2^-30 of it, below the rounding of float32.

Dimension letters: B rows, T tokens, N sequences, D model width, H query/key heads, G value heads, K head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu, softplus

from kda_model.norms import GatedRMSNorm, at_least_float32
from kda_model.short_convolution import ShortConvolution

if TYPE_CHECKING:
    from torch import Tensor

    from kda_model.config import KimiLinearConfig
    from kda_model.operators import Operator
    from kda_model.packing import Packing

NO_ERASURE = 2.0**30


class KdaMemory(NamedTuple):
    """What sequences leave behind in one layer: the state ``[N, G, K, K]``, at least float32, and three tails ``[N, W - 1, channels]``.

    Without a convolution the tails have no tokens.
    """

    state: Tensor
    q_tail: Tensor
    k_tail: Tensor
    v_tail: Tensor


class KdaLayer(nn.Module):
    """One mixer of linear attention; attributes bear the released names."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.kda_head_width
        keys, values = config.kda_num_heads * width, config.num_value_heads * width
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        if config.short_convolution:
            self.q_conv1d = ShortConvolution(keys, config.conv_width)
            self.k_conv1d = ShortConvolution(keys, config.conv_width)
            self.v_conv1d = ShortConvolution(values, config.conv_width)
        self.A_log = nn.Parameter(torch.empty(1, 1, config.num_value_heads, 1))
        if config.mixer == "kda":
            self.f_a_proj = nn.Linear(hidden, width, bias=False)
            self.f_b_proj = nn.Linear(width, values, bias=False)
            self.dt_bias = nn.Parameter(torch.empty(values))
        else:
            self.a_proj = nn.Linear(hidden, config.num_value_heads, bias=False)
            self.dt_bias = nn.Parameter(torch.empty(config.num_value_heads))
        self.b_proj = nn.Linear(hidden, config.num_value_heads, bias=False)
        if config.output_gate != "none":
            self.g_a_proj = nn.Linear(hidden, width, bias=False)
            self.g_b_proj = nn.Linear(width, values, bias=False)
        self.o_norm = GatedRMSNorm(width, config.rms_norm_eps, config.output_gate)
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def forward(
        self, x_BTD: Tensor, operator: Operator, packing: Packing | None = None, memory: KdaMemory | None = None
    ) -> tuple[Tensor, KdaMemory | None]:
        """Apply the layer.

        Parameters
        ----------
        x_BTD
            Tokens, normalised; with a packing, one row of sequences.
        operator
            Who computes the recurrence.
        packing
            ``None`` means one sequence a row.
        memory
            What the call before returned; ``None`` means beginnings, whose memory is not wanted either.

        Returns
        -------
        tuple[Tensor, KdaMemory | None]
            ``[B, T, D]``, and what calls that go on need.
        """
        width, groups = self.config.kda_head_width, self.config.num_value_heads
        q, k, v, tails = self._operands(x_BTD, operator, packing, memory)
        options = {
            "initial_state": None if memory is None else memory.state,
            "output_final_state": memory is not None,
            "use_qk_l2norm_in_kernel": True,
        }
        if packing is not None:
            options["cu_seqlens"] = packing.cu_seqlens
        if self.config.mixer == "kda":
            g = self.f_b_proj(self.f_a_proj(x_BTD)).unflatten(-1, (groups, width))
            beta = self.b_proj(x_BTD)
            options |= {
                "A_log": at_least_float32(self.A_log).flatten(),
                "dt_bias": at_least_float32(self.dt_bias),
                "use_gate_in_kernel": True,
                "use_beta_sigmoid_in_kernel": True,
            }
        else:
            logit = at_least_float32(self.a_proj(x_BTD)) + at_least_float32(self.dt_bias)
            g = -at_least_float32(self.A_log).flatten().exp() * softplus(logit)
            g = g[..., None].expand(*g.shape, width)
            beta = torch.sigmoid(at_least_float32(self.b_proj(x_BTD)))
            if self.config.mixer == "decay":
                v, beta = v * NO_ERASURE, beta / NO_ERASURE
        single = x_BTD.shape[1] == 1 and packing is None and not torch.is_grad_enabled()
        o_BTGV, state = (operator.one if single else operator.many)(q, k, v, g, beta, **options)
        gate = None
        if self.config.output_gate != "none":
            gate = self.g_b_proj(self.g_a_proj(x_BTD)).unflatten(-1, (groups, width))
        out = self.o_proj(self.o_norm(o_BTGV, gate).flatten(2))
        return out, None if memory is None or state is None else KdaMemory(state, *tails)

    def _operands(
        self, x_BTD: Tensor, operator: Operator, packing: Packing | None, memory: KdaMemory | None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        found, tails = [], list[torch.Tensor]()
        dense = packing is None and memory is None and self.config.short_convolution
        for name in "qkv":
            x = getattr(self, f"{name}_proj")(x_BTD)
            tail = x[:, :0]
            if dense and operator.convolution is not None:
                x = operator.convolution(x, getattr(self, f"{name}_conv1d").weight[:, 0])[0]
            else:
                if self.config.short_convolution:
                    past = None if memory is None else getattr(memory, f"{name}_tail")
                    x, tail = getattr(self, f"{name}_conv1d")(x, packing, past)
                x = silu(x)
            found.append(x.unflatten(-1, (-1, self.config.kda_head_width)))
            tails.append(tail)
        q, k, v = found
        return q, k, v, tails

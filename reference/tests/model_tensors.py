"""A small hybrid model's configuration and random tensors, under the released names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "vocab_size": 23,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 2,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 3,
    "v_head_dim": 5,
    "num_experts": 6,
    "num_experts_per_token": 2,
    "routed_scaling_factor": 2.446,
    "moe_renormalize": True,
    "num_expert_group": 1,
    "topk_group": 1,
    "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "num_heads": 2, "head_dim": 4},
}


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Return standard normal values times a scale, float64."""
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latent_weights(width: int = 16) -> dict[str, Tensor]:
    """Return the tensors of one layer of latent attention: 2 heads, widths 4 + 3 and 5, rank 6."""
    shapes = {"q_proj": (14, width), "kv_a_proj_with_mqa": (9, width), "kv_b_proj": (18, 6), "o_proj": (width, 10)}
    weights = {
        f"{name}.weight": normal(*shape, seed=9 + i, scale=0.4) for i, (name, shape) in enumerate(shapes.items())
    }
    return {**weights, "kv_a_layernorm.weight": 1 + normal(6, seed=2, scale=0.1)}


def kda_weights(num_heads: int, num_value_heads: int, width: int = 16) -> dict[str, Tensor]:
    """Return the tensors of one layer of Kimi Delta Attention, heads of width 4."""
    q, v = 4 * num_heads, 4 * num_value_heads
    shapes = {
        "q_proj": (q, width), "k_proj": (q, width), "v_proj": (v, width), "f_a_proj": (4, width), "f_b_proj": (v, 4),
        "g_a_proj": (4, width), "g_b_proj": (v, 4), "b_proj": (num_value_heads, width), "o_proj": (width, v),
        "q_conv1d": (q, 1, 4), "k_conv1d": (q, 1, 4), "v_conv1d": (v, 1, 4),
    }  # fmt: skip
    weights = {
        f"{name}.weight": normal(*shape, seed=50 + i, scale=0.5) for i, (name, shape) in enumerate(shapes.items())
    }
    return {
        **weights,
        "A_log": normal(1, 1, num_value_heads, 1, seed=3),
        "dt_bias": normal(v, seed=4) - 2,
        "o_norm.weight": 1 + normal(4, seed=5, scale=0.1),
    }


def expert_weights(num_experts: int = 6, width: int = 16, expert_width: int = 7) -> dict[str, Tensor]:
    """Return the tensors of one layer of experts."""
    shapes = {"w1": (expert_width, width), "w3": (expert_width, width), "w2": (width, expert_width)}
    weights = {
        f"experts.{expert}.{name}.weight": normal(*shape, seed=100 + 10 * expert + i, scale=0.5)
        for expert in range(num_experts)
        for i, (name, shape) in enumerate(shapes.items())
    }
    for i, (name, shape) in enumerate({"gate": (7, width), "up": (7, width), "down": (width, 7)}.items()):
        weights[f"shared_experts.{name}_proj.weight"] = normal(*shape, seed=200 + i, scale=0.5)
    weights["gate.weight"] = normal(num_experts, width, seed=210, scale=0.5)
    weights["gate.e_score_correction_bias"] = normal(num_experts, seed=211, scale=0.2)
    return weights


def model_tensors() -> dict[str, Tensor]:
    """Return the tensors of the model of ``CONFIG``."""
    tensors = {
        "model.embed_tokens.weight": normal(23, 16, seed=1),
        "lm_head.weight": normal(23, 16, seed=2),
        "model.norm.weight": 1 + normal(16, seed=3, scale=0.1),
    }
    for layer in range(4):
        mixer = latent_weights() if layer == 3 else kda_weights(2, 2)
        dense = {f"mlp.{name}": x for name, x in _dense().items()}
        experts = {f"block_sparse_moe.{name}": x for name, x in expert_weights().items()}
        parts = {**{f"self_attn.{name}": x for name, x in mixer.items()}, **(experts if layer else dense)}
        for i, name in enumerate(("input_layernorm", "post_attention_layernorm")):
            parts[f"{name}.weight"] = 1 + normal(16, seed=300 + 2 * layer + i, scale=0.1)
        tensors |= {f"model.layers.{layer}.{name}": x for name, x in parts.items()}
    return tensors


def _dense() -> dict[str, Tensor]:
    shapes = {"gate_proj": (20, 16), "up_proj": (20, 16), "down_proj": (16, 20)}
    return {f"{name}.weight": normal(*shape, seed=400 + i, scale=0.3) for i, (name, shape) in enumerate(shapes.items())}

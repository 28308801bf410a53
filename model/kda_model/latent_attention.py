"""Multi-head latent attention (MLA) without position encoding: expanded over many tokens, absorbed for one.

A token leaves a latent and one key part that all heads share, R + P values, and nothing else is kept of it. Many tokens at once
expand the latents to keys and values of every head; a single token instead carries its query into latent space, which is
multi-query attention over the latents. :mod:`kda_reference.latent_attention` has both as equations.

Dimension letters: B rows, T tokens, L tokens of a sequence so far, N sequences, H heads, R latent width, P shared key width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kda_model.norms import RMSNorm, at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

    from kda_model.config import KimiLinearConfig
    from kda_model.packing import Packing
    from kda_model.pages import LatentView


class Query(NamedTuple):
    """Own and shared part of the queries, ``[B, T, H, *]``."""

    own: Tensor
    shared: Tensor


class LatentAttention(nn.Module):
    """One mixer of full attention; attributes bear the released names."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.config = config
        heads, key_width = config.num_heads, config.key_width + config.shared_key_width
        self.q_proj = nn.Linear(config.hidden_size, heads * key_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, config.latent_rank + config.shared_key_width, bias=False
        )
        self.kv_a_layernorm = RMSNorm(config.latent_rank, config.latent_eps)
        self.kv_b_proj = nn.Linear(config.latent_rank, heads * (config.key_width + config.value_width), bias=False)
        self.o_proj = nn.Linear(heads * config.value_width, config.hidden_size, bias=False)
        self.scale = key_width**-0.5

    def forward(
        self,
        x_BTD: Tensor,
        positions: Tensor | None = None,
        packing: Packing | None = None,
        view: LatentView | None = None,
    ) -> Tensor:
        """Attend causally, each sequence to itself.

        Parameters
        ----------
        x_BTD
            Tokens, normalised; with a packing, one row of sequences.
        positions
            Of each token in its sequence ``[B, T]``; needed, and used, only where keys are rotated.
        packing
            ``None`` means one sequence a row.
        view
            Where the latents of earlier tokens are and those of new ones go; ``None`` means that there are none.
        """
        query, latents = self._project(x_BTD, positions)
        if view is not None:
            view.write(latents)
            if packing is None and x_BTD.shape[1] == 1:
                return self._out(self._absorbed(query, *view.read_all()))
        if packing is None and view is None:
            return self._out(self._expanded(query, latents))
        parts = []
        for n, (row, tokens) in enumerate(_places(x_BTD, packing)):
            known = latents[row : row + 1, tokens] if view is None else view.read(n)[None]
            own = Query(query.own[row : row + 1, tokens], query.shared[row : row + 1, tokens])
            parts.append(self._expanded(own, known))
        o_BTHV = torch.cat(parts, 0 if packing is None else 1)
        return self._out(o_BTHV)

    def _out(self, o_BTHV: Tensor) -> Tensor:
        out: Tensor = self.o_proj(o_BTHV.flatten(2))
        return out

    def _project(self, x_BTD: Tensor, positions: Tensor | None) -> tuple[Query, Tensor]:
        config = self.config
        own, shared = (
            self.q_proj(x_BTD)
            .unflatten(-1, (config.num_heads, -1))
            .split([config.key_width, config.shared_key_width], -1)
        )
        latent, shared_key = self.kv_a_proj_with_mqa(x_BTD).split([config.latent_rank, config.shared_key_width], -1)
        if not config.use_nope:
            assert positions is not None  # noqa: S101 - the model passes them where keys are rotated
            shared = rotate(shared, positions[..., None], config.rope_theta)
            shared_key = rotate(shared_key, positions, config.rope_theta)
        return Query(own, shared), torch.cat([self.kv_a_layernorm(latent), shared_key], -1)

    def _expanded(self, query: Query, known: Tensor) -> Tensor:
        """Return ``[B, T, H, V]`` of the last T of the L tokens whose latents are given ``[B, L, R + P]``."""
        config, num_tokens, num_known = self.config, query.own.shape[1], known.shape[1]
        if not num_tokens:
            return query.own[..., : config.value_width].new_empty(*query.own.shape[:3], config.value_width)
        latent, shared_key = known.split([config.latent_rank, config.shared_key_width], -1)
        key, value = (
            self.kv_b_proj(latent)
            .unflatten(-1, (config.num_heads, -1))
            .split([config.key_width, config.value_width], -1)
        )
        key = torch.cat([key, shared_key[:, :, None].expand(-1, -1, config.num_heads, -1)], -1)
        q, k, v = (x.transpose(1, 2) for x in (torch.cat(query, -1), key, value))
        if num_tokens == num_known:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale).transpose(1, 2)
        # A mask by rule, which no kernel has to read: one of a long text would be larger than its latents.
        from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415 - loads torch's compiler, which few need

        seen = causal_lower_right(num_tokens, num_known)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale).transpose(1, 2)

    def _absorbed(self, query: Query, known: Tensor, seen: Tensor) -> Tensor:
        """Return ``[N, 1, H, V]`` of one token a sequence over padded latents ``[N, L, R + P]``, of which ``seen [N, L]`` count."""
        config = self.config
        up_key, up_value = self.kv_b_proj.weight.unflatten(0, (config.num_heads, -1)).split(
            [config.key_width, config.value_width], 1
        )
        # What lies behind the end of a page may be anything, NaN included, which a weight of zero would not silence.
        known = known.masked_fill(~seen[..., None], 0)
        q_NHR = torch.cat([torch.einsum("nhk,hkr->nhr", query.own[:, 0], up_key), query.shared[:, 0]], -1)
        scores = at_least_float32(self.scale * torch.einsum("nhr,nlr->nhl", q_NHR, known))
        attention = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(known.dtype)
        latent = torch.einsum("nhl,nlr->nhr", attention, known[..., : config.latent_rank])
        return torch.einsum("nhr,hvr->nhv", latent, up_value)[:, None]


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate the two halves of the last axis by ``position theta^(-2i / width)`` radians; the rotary embedding of the ablation."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=at_least_float32(x).dtype) / half)
    angle = positions[..., None] * frequency
    first, second = at_least_float32(x).split(half, -1)
    rotated = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    return torch.cat(rotated, -1).to(x.dtype)


def _places(x_BTD: Tensor, packing: Packing | None) -> list[tuple[int, slice]]:
    """Return row and tokens of each sequence."""
    if packing is None:
        return [(row, slice(0, x_BTD.shape[1])) for row in range(x_BTD.shape[0])]
    return [(0, tokens) for tokens in packing.slices()]

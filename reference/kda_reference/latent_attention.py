"""Multi-head latent attention (MLA) without position encoding, in its two equal forms.

A token leaves a latent ``c = RMSNorm(W_a x)`` of R values and one key part ``s`` of P values that all heads share. With a head's
own ``W_uk [N, R]`` and ``W_uv [V, R]``, the two halves of ``kv_b_proj``:

    expanded    k = [W_uk c, s],  v = W_uv c,  o = softmax(scale q k^T) v
    absorbed    q' = [W_uk^T q_n, q_s],  o = W_uv (softmax(scale q' [c, s]^T) c)

The absorbed form is multi-query attention over the latents, which are all that a cache has to hold. Dimension letters: B
sequences, T new tokens, L tokens in all, H heads, N and P the two key widths, R latent width, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kda_reference.normalisation import rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

LATENT_EPSILON = 1e-6  # of the released model, whatever its other norms take


class LatentShape(NamedTuple):
    """Widths of one head, and the number of heads."""

    num_heads: int
    key_width: int
    shared_key_width: int
    value_width: int


def latents(x_BTD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return what a cache holds of each token: the normalised latent and the shared key ``[B, T, R + P]``."""
    rank = weights["kv_a_layernorm.weight"].numel()
    compressed = x_BTD @ weights["kv_a_proj_with_mqa.weight"].T
    normalised = rms_norm(compressed[..., :rank], weights["kv_a_layernorm.weight"], LATENT_EPSILON)
    return torch.cat([normalised, compressed[..., rank:]], -1)


def latent_attention(
    x_BTD: Tensor,
    weights: Mapping[str, Tensor],
    shape: LatentShape,
    *,
    past_BLR: Tensor | None = None,
    absorbed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend causally to all tokens so far.

    Parameters
    ----------
    x_BTD
        New tokens, normalised.
    weights
        Of one layer: ``q_proj``, ``kv_a_proj_with_mqa``, ``kv_a_layernorm``, ``kv_b_proj`` and ``o_proj``, each with ``.weight``.
    shape
        Heads and widths.
    past_BLR
        Latents of earlier tokens, as returned; ``None`` means that there are none.
    absorbed
        Which of the two forms is computed.

    Returns
    -------
    tuple[Tensor, Tensor]
        Outputs ``[B, T, D]`` and the latents of all tokens so far.
    """
    known = latents(x_BTD, weights)
    if past_BLR is not None:
        known = torch.cat([past_BLR, known], 1)
    batch, num_tokens, _ = x_BTD.shape
    q_BTHN, q_BTHP = (
        (x_BTD @ weights["q_proj.weight"].T)
        .unflatten(-1, (shape.num_heads, -1))
        .split([shape.key_width, shape.shared_key_width], -1)
    )
    c_BLR, s_BLP = known.tensor_split([known.shape[-1] - shape.shared_key_width], -1)
    up_HNR, up_HVR = (
        weights["kv_b_proj.weight"].unflatten(0, (shape.num_heads, -1)).split([shape.key_width, shape.value_width], 1)
    )
    shared_BHTL = torch.einsum("bthp,blp->bhtl", q_BTHP, s_BLP)
    if absorbed:
        own_BHTL = torch.einsum("bthn,hnr,blr->bhtl", q_BTHN, up_HNR, c_BLR)
    else:
        own_BHTL = torch.einsum("bthn,blhn->bhtl", q_BTHN, torch.einsum("blr,hnr->blhn", c_BLR, up_HNR))
    scale = (shape.key_width + shape.shared_key_width) ** -0.5
    later = torch.ones(num_tokens, known.shape[1], dtype=torch.bool, device=x_BTD.device)
    later = later.triu(1 + known.shape[1] - num_tokens)
    attention_BHTL = (scale * (own_BHTL + shared_BHTL)).masked_fill(later, -torch.inf).softmax(-1)
    if absorbed:
        o_BTHV = torch.einsum("bhtl,blr,hvr->bthv", attention_BHTL, c_BLR, up_HVR)
    else:
        o_BTHV = torch.einsum("bhtl,blhv->bthv", attention_BHTL, torch.einsum("blr,hvr->blhv", c_BLR, up_HVR))
    return o_BTHV.reshape(batch, num_tokens, -1) @ weights["o_proj.weight"].T, known

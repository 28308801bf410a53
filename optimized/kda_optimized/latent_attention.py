"""Decoding of full-attention layers in absorbed form: one token a row over the latents of all its tokens, which lie in pages.

[KL fig. 3] keeps 576 values a token, of which all heads share the keys and the values: multi-query attention with 576 key and 512 value
channels. :mod:`kda_reference.latent_attention` has the equations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kda_reference.errors import DomainError

from kda_optimized.arguments import FLOATS, INTEGERS, check_tensor
from kda_optimized.interpreter import check_device
from kda_optimized.latent_kernels import kda_latent_join_kernel, kda_latent_part_kernel
from kda_optimized.launch import Launch, strides, submit
from kda_optimized.launch_config import SMALLEST_TILE, config_of, padded, tile

if TYPE_CHECKING:
    from torch import Tensor

MOST_CHANNELS = 1024
MOST_HEADS_OF_A_TILE = 32
# The launch table knows head widths up to this.
WIDEST = 256
PARTS_OF_A_TILE = 16


def latent_decode(
    q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, *, latent_width: int, scale: float
) -> Tensor:
    """Attend with one token a row to the latents of all tokens of the row so far; not differentiable.

    Parameters
    ----------
    q
        Absorbed queries ``[N, H, R + P]``: of each head ``W_uk^T q_n``, and the part that meets the shared key. bfloat16, float16 or
        float32, any strides.
    pages
        The pool ``[pages, page_len, R + P]`` in q's dtype, any strides: of each token its latent, then the shared key.
    table
        Integer ``[N, W]``: the pages of each row, in the order of its tokens. Entries behind the last page in use may be anything;
        one in use that is no page reads as zeros.
    lengths
        Integer ``[N]``: tokens of each row, the current one included, at most ``W page_len``.
    latent_width
        R, in 1..1024.
    scale
        Factor on the scores (dimensionless), ``(key width + shared key width)^-0.5`` of the layer.

    Returns
    -------
    Tensor
        ``softmax(scale q x^T) c``, ``[N, H, R]`` in q's dtype; zero for rows without tokens.

    Raises
    ------
    KdaError
        If an argument contradicts what is said above; before any kernel is launched.

    Notes
    -----
    Scores, weights and sums are float32; 16-bit inputs round the weights to q's dtype for the second product. A row's length is cut
    into equal parts, as many as the device runs at once at the table's full capacity, and the parts are joined: lengths and table are
    read on the device, so a CUDA graph replays with others. What lies in a page behind a row's last token is never read as a value.

    References
    ----------
    [KL] Kimi Linear technical report, Sec. 4.
    """
    check_device(q.device)
    check_tensor("q", q, (None, None, None), "[N, H, R + P]", FLOATS, q.device)
    rows, heads, width = q.shape
    if not 1 <= latent_width <= min(width, MOST_CHANNELS):
        message = f"latent_width must lie in 1..{min(width, MOST_CHANNELS)}, got {latent_width}; the rest of q is the shared key"
        raise DomainError(message)
    check_tensor("pages", pages, (None, None, width), "[pages, page_len, R + P]", (q.dtype,), q.device)
    check_tensor("table", table, (rows, None), "[N, W]", INTEGERS, q.device)
    check_tensor("lengths", lengths, (rows,), "[N]", INTEGERS, q.device)
    config = config_of(kda_latent_part_kernel.__name__, q.device, q.dtype.itemsize, WIDEST)
    assert config.block_t is not None  # noqa: S101 - every launch table names it
    page_len, capacity = pages.shape[1], table.shape[1] * pages.shape[1]
    block_h = min(padded(heads), MOST_HEADS_OF_A_TILE)
    groups = rows * -(-heads // block_h)
    splits = max(1, min(config.programs // groups, -(-capacity // config.block_t)))
    parts = torch.empty(rows, heads, splits, latent_width, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    arguments: dict[str, Any] = {
        "q": q, **strides("q", "nhc", q), "pages": pages, **strides("p", "nlc", pages), "table": table, **strides("t", "nw", table),
        "lengths": lengths, **strides("l", "n", lengths), "parts": parts, "lse": lse, "scale": float(scale),
        "num_pages": pages.shape[0], "capacity": capacity, "num_splits": splits, "H": heads, "R": latent_width,
        "P": width - latent_width, "PAGE": page_len, "BH": block_h, "BR": max(padded(latent_width), 2 * SMALLEST_TILE),
        "BP": padded(max(width - latent_width, 1)), "BL": config.block_t,
    }  # fmt: skip
    submit(
        Launch(kernel=kda_latent_part_kernel, programs=groups * splits, arguments=arguments, options=config.options())
    )
    o = torch.empty(rows, heads, latent_width, dtype=q.dtype, device=q.device)
    config = config_of(kda_latent_join_kernel.__name__, q.device, q.dtype.itemsize, WIDEST)
    channels = tile(config.block_k, latent_width)
    arguments = {
        "parts": parts, "lse": lse, "o": o, "num_splits": splits, "R": latent_width, "BS": PARTS_OF_A_TILE, "BR": channels,
    }  # fmt: skip
    programs = rows * heads * -(-latent_width // channels)
    submit(Launch(kernel=kda_latent_join_kernel, programs=programs, arguments=arguments, options=config.options()))
    return o

"""The kernel that decodes over paged latents computes what the model's absorbed form does."""

from __future__ import annotations

import torch
from kda_optimized import latent_decode
from model_cases import made, package

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_kernel_is_the_absorbed_form_of_the_layer() -> None:
    kda = package()
    config = kda.preset("tiny")
    layer = next(
        module for module in made(kda, config).modules() if isinstance(module, kda.latent_attention.LatentAttention)
    ).to(DEVICE)
    generator = torch.Generator().manual_seed(5)
    lengths, page_len, width = [37, 1, 20], 16, config.latent_rank + config.shared_key_width
    pages = torch.full((9, page_len, width), torch.nan)
    table = torch.randperm(9, generator=generator).view(3, 3)
    for row, length in enumerate(lengths):
        flat = torch.full((3 * page_len, width), torch.nan)
        flat[:length] = torch.randn(length, width, generator=generator)
        pages[table[row]] = flat.view(3, page_len, width)
    x = torch.randn(3, 1, config.hidden_size, generator=generator)
    pages, table, totals, x = (tensor.to(DEVICE) for tensor in (pages, table, torch.tensor(lengths), x))
    with torch.no_grad():
        query, _ = layer._project(x, torch.zeros(3, 1, dtype=torch.int64, device=DEVICE))  # noqa: SLF001 - the forms that must agree
        known = pages[table].flatten(1, 2)
        expected = layer._absorbed(query, known, torch.arange(known.shape[1], device=DEVICE) < totals[:, None])  # noqa: SLF001 - likewise
        up_key, up_value = layer.kv_b_proj.weight.unflatten(0, (config.num_heads, -1)).split(
            [config.key_width, config.value_width], 1
        )
        q = torch.cat([torch.einsum("nhk,hkr->nhr", query.own[:, 0], up_key), query.shared[:, 0]], -1)
        latent = latent_decode(q, pages, table, totals, latent_width=config.latent_rank, scale=layer.scale)
        found = torch.einsum("nhr,hvr->nhv", latent, up_value)[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

"""``python -m kda_model.cache_table``: bytes that one sequence leaves behind, over its length, beside those of full attention only.

A KDA layer keeps one state and three tails whatever the length; a full-attention layer keeps one latent a token. So the share of
layers that are linear is what long contexts save.
"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 - typer reads annotations when it runs
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from kda_model.presets import preset

if TYPE_CHECKING:
    from kda_model.config import KimiLinearConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LENGTHS = tuple(2**power for power in range(10, 21, 2))


def cache_bytes(config: KimiLinearConfig, length: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of one sequence's cache: float32 states, everything else in ``dtype``; pages are not rounded up."""
    num_full = config.layers.count("full")
    width, taps = config.kda_head_width, config.conv_width - 1 if config.short_convolution else 0
    state = config.num_value_heads * width * width * torch.promote_types(dtype, torch.float32).itemsize
    tails = taps * width * (2 * config.kda_num_heads + config.num_value_heads) * dtype.itemsize
    latent = (config.latent_rank + config.shared_key_width) * dtype.itemsize
    return (config.num_layers - num_full) * (state + tails) + num_full * latent * length


def cache_rows(config: KimiLinearConfig, name: str, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, object]]:
    """Return one row for each length: bytes of the model, of the same model with full attention only, and the share saved."""
    baseline = config.with_ratio(0)
    rows = []
    for length in lengths:
        own, full = cache_bytes(config, length), cache_bytes(baseline, length)
        rows.append(
            {
                "kind": "cache",
                "model": name,
                "length": length,
                "bytes": own,
                "full_attention_bytes": full,
                "saved": 1 - own / full,
            }
        )
    return rows


@app.command()
def table(
    model: Annotated[str, typer.Option(help="preset")] = "48b-a3b",
    out: Annotated[Path | None, typer.Option(help="file that rows are added to")] = None,
) -> None:
    """Tabulate the bytes of one sequence's cache over its length, bfloat16."""
    config = preset(model)
    rows = cache_rows(config, model)
    shown = Table(
        title=f"{model}: cache of one sequence ({config.layers.count('full')} of {config.num_layers} layers full)"
    )
    for title in ("tokens", "MB", "MB, all full attention", "saved"):
        shown.add_column(title, justify="right")
    for row in rows:
        own, full = float(str(row["bytes"])), float(str(row["full_attention_bytes"]))
        shown.add_row(str(row["length"]), f"{own / 1e6:.1f}", f"{full / 1e6:.1f}", f"{100 * (1 - own / full):.1f} %")
    Console().print(shown)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    app()

"""Launch configurations: which tile sizes, warps and pipeline stages a kernel runs with.

They come from a table written by ``python -m kda_optimized.tune``, one entry per architecture, kernel and operand width; nothing is tuned while a
user waits. An architecture without an entry takes the default one, which is conservative.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

DEFAULT = "default"
CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes
    ----------
    bv
        Columns of V per program; 0 where the kernel does not split V.
    num_warps, num_stages
        As Triton takes them.
    """

    bv: int = 0
    num_warps: int
    num_stages: int


@cache
def table() -> dict[str, Any]:
    """Return the whole table, by architecture."""
    found: dict[str, Any] = json.loads(files("kda_optimized").joinpath("launch_table.json").read_text())
    return found


@cache
def architecture(device: torch.device) -> str:
    """Return the key of a device's entries."""
    if device.type != "cuda":
        return CPU
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in table() else DEFAULT


def config_of(kernel: str, device: torch.device, operand_bytes: int, width: int) -> LaunchConfig:
    """Return the configuration of a kernel for operands of a size and a padded head width."""
    entry = _entry(kernel, device, operand_bytes, width)
    return LaunchConfig(bv=entry.get("bv", 0), num_warps=entry["num_warps"], num_stages=entry["num_stages"])


def chunk_length(wanted: int, device: torch.device, operand_bytes: int, width: int) -> int:
    """Return the chunk length kernels use: at most the one asked for, and such that tiles fit on chip."""
    return min(wanted, int(_entry("chunk", device, operand_bytes, width)["length"]))


def _entry(name: str, device: torch.device, operand_bytes: int, width: int) -> dict[str, Any]:
    """Return the first entry, in the table's order, that covers an operand size and a width."""
    for entry in table()[architecture(device)][name]:
        if operand_bytes <= entry["max_operand_bytes"] and width <= entry["max_width"]:
            found: dict[str, Any] = entry
            return found
    message = f"the launch table must cover {name} at {operand_bytes} bytes and width {width}; run python -m kda_optimized.tune"
    raise LookupError(message)

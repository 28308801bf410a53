"""The launch table: warps, pipeline stages and tile widths, one file per architecture in ``configs/``.

A file is named after an architecture, ``sm_90.json``; ``default.json`` serves every other one, and kernels that such a file does not name;
``interpreter.json`` serves the CPU. It maps a kernel's name to a list of rules, the first of which that fits is taken: it fits when the
operands of matrix products have at most ``max_operand_bytes`` bytes and the padded head widths are at most ``max_width`` channels.
Nothing is tuned while a user waits; ``python -m kda_optimized.tune`` writes a file.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

Table: TypeAlias = dict[str, list[dict[str, Any]]]
DEFAULT = "default"
INTERPRETER = "interpreter"
SMALLEST_TILE = 16
OPTIONAL = ("block_k", "block_v", "block_t", "max_registers", "programs", "least_chunks", "map_warps", "map_block_v")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes
    ----------
    num_warps, num_stages
        As Triton takes them.
    block_k, block_v, block_t
        Key and value channels and tokens per tile; ``None`` where the kernel does not split that axis.
    max_registers
        Registers a thread may have, so that more programs share a multiprocessor; ``None`` leaves it to the compiler.
    programs
        Programs below which sequences are cut into segments, or tiles made narrower, so that the device is not left idle; 0 never does.
        Where programs share equal pieces of work, how many do at most.
    least_chunks
        Chunks of the shortest segment worth a walk of its own.
    map_warps, map_block_v
        Warps and value channels of the walks that only give the map and the shift of a segment; ``None`` as in the others.
    """

    num_warps: int
    num_stages: int
    block_k: int | None = None
    block_v: int | None = None
    block_t: int | None = None
    max_registers: int | None = None
    programs: int = 0
    least_chunks: int = 1
    map_warps: int | None = None
    map_block_v: int | None = None

    def for_maps(self) -> LaunchConfig:
        """Return how the walks are launched that make no outputs."""
        return replace(self, num_warps=self.map_warps or self.num_warps, block_v=self.map_block_v or self.block_v)

    def options(self) -> dict[str, int]:
        """Return what Triton takes at launch."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


@cache
def architecture(device: torch.device) -> str:
    """Return the name of a device's architecture, ``sm_90`` for an H100."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def table(name: str) -> Table:
    """Return the rules of an architecture by kernel name, those of ``default`` where its file has none."""
    folder = files("kda_optimized").joinpath("configs")
    default, own = (folder.joinpath(f"{file}.json") for file in (DEFAULT, name))
    found: Table = json.loads(default.read_text())
    return found | json.loads(own.read_text()) if own.is_file() else found


_in_place: list[Table] = []


@contextmanager
def using(other: Table) -> Iterator[None]:
    """Take another table for every device: that of a device that is absent, or one with a candidate to be timed."""
    _in_place.append(other)
    try:
        yield
    finally:
        _in_place.pop()


def config_of(kernel: str, device: torch.device, operand_bytes: int, width: int) -> LaunchConfig:
    """Return how a kernel is launched on a device."""
    if _in_place:
        return choose(_in_place[-1][kernel], operand_bytes, width)
    return _tabulated(architecture(device), kernel, operand_bytes, width)


@cache
def _tabulated(name: str, kernel: str, operand_bytes: int, width: int) -> LaunchConfig:
    """Look a rule up; once, since a short call costs the host more than the device."""
    return choose(table(name)[kernel], operand_bytes, width)


def fits(rule: dict[str, Any], operand_bytes: int, width: int) -> bool:
    """Tell whether a rule is meant for such a call."""
    sizes = {"max_operand_bytes": operand_bytes, "max_width": width}
    return all(size <= rule.get(name, size) for name, size in sizes.items())


def choose(rules: list[dict[str, Any]], operand_bytes: int, width: int) -> LaunchConfig:
    """Return the first rule that fits; tiles are no wider than the padded head.

    Raises
    ------
    LookupError
        If no rule fits: the table is incomplete.
    """
    for rule in rules:
        if fits(rule, operand_bytes, width):
            others = {name: rule[name] for name in OPTIONAL if name in rule}
            return LaunchConfig(num_warps=rule["num_warps"], num_stages=rule["num_stages"], **others)
    message = (
        f"the launch table must cover operands of {operand_bytes} bytes at width {width}, got {rules}; "
        "run python -m kda_optimized.tune"
    )
    raise LookupError(message)


def padded(width: int) -> int:
    """Return the tile that covers ``width`` channels: a power of two, at least 16, the smallest side of a matrix product."""
    return max(SMALLEST_TILE, 1 << (width - 1).bit_length())


def tile(block: int | None, width: int) -> int:
    """Return the tile over ``width`` channels: at most ``block``, or all of them where there is no limit."""
    return padded(width) if block is None else min(block, padded(width))

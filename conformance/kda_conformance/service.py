"""The tolerance service: budgets by call, computed once and kept on disk by content.

The key is a hash of everything the budget depends on: every argument and cotangent bit for bit, the arithmetic class and the
source of the modules that compute it. A second implementation of the same claims costs almost nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kda_reference
import torch

import kda_conformance
from kda_conformance.budget import Budget, TensorBudget, compute_budget

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kda_reference import KdaInputs
    from torch import Tensor

    from kda_conformance.arithmetic import Arithmetic

SOURCES = (
    "arithmetic",
    "hashing",
    "rounding",
    "rounding_loops",
    "activations",
    "ensemble",
    "members",
    "cumulative_sum",
    "budget",
)


def cache_folder() -> Path:
    """Return where budgets are kept: ``KDA_CACHE_DIR``, or the user's cache folder."""
    if folder := os.environ.get("KDA_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kda-conformance"


def budget_of(inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None, arithmetic: Arithmetic) -> Budget:
    """Return the budget of a call, from the cache when it is there."""
    path = cache_folder() / f"{_key(inputs, do, dfinal_state, arithmetic)}.pt"
    device = inputs.q.device
    if path.is_file():
        stored = torch.load(path, map_location=device, weights_only=True)
        return {name: TensorBudget(**entry) for name, entry in stored.items()}
    budget = compute_budget(inputs, do, dfinal_state, arithmetic)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that two processes never see half a file.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save({name: _plain(entry) for name, entry in budget.items()}, file)
    Path(file.name).replace(path)
    return budget


def _plain(entry: TensorBudget) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("value", "variance", "gain_rms", "strict_variance")}


def _key(inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None, arithmetic: Arithmetic) -> str:
    digest = hashlib.sha256(_source_digest())
    digest.update(repr(arithmetic).encode())
    arguments: Iterable[tuple[str, Any]] = [*inputs.keywords().items(), ("do", do), ("dfinal_state", dfinal_state)]
    for name, value in arguments:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            # A copy, whose strides are those of its shape even where an axis of one element would allow others.
            plain = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(plain.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


@cache
def _source_digest() -> bytes:
    digest = hashlib.sha256()
    for module in SOURCES:
        digest.update((Path(kda_conformance.__file__).parent / f"{module}.py").read_bytes())
    for path in sorted(Path(kda_reference.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()

"""Choose where an implementation runs and on how many cores, and prepare a machine without a GPU for Triton kernels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from kda_conformance.claims import UsageError

if TYPE_CHECKING:
    from kda_conformance.claims import Claims


def choose_device(wanted: str | None, claims: Claims, spec: str) -> str:
    """Return the device type to run on: the one wanted, or a GPU where there is one and it is claimed.

    Raises
    ------
    UsageError
        If the device is not claimed or not there.
    """
    available = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if wanted is not None:
        if wanted not in available or wanted not in claims.devices:
            message = f"--kda-device must be available {available} and claimed by {spec} {sorted(claims.devices)}, got {wanted!r}"
            raise UsageError(message)
        return wanted
    for device in available:
        if device in claims.devices:
            return device
    message = f"--impl {spec} must run on a device of this machine {available}, got claims {sorted(claims.devices)}; run it elsewhere"
    raise UsageError(message)


def interpret_triton_without_gpu() -> None:
    """Make Triton kernels run in its interpreter where no GPU is; must run before Triton is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def num_cores() -> int:
    """Return how many cores this process may run on, which a CPU set can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

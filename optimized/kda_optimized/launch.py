"""Start kernels, or record what would be started.

Everything a launch needs is one value, so that the compile report and the tuning script see exactly the kernels, argument
types and constants of a real call.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel launch.

    Attributes
    ----------
    kernel
        The ``triton.jit`` function.
    programs
        Number of program instances, all on grid axis 0, the only axis that is not limited to 65535.
    arguments
        Arguments by name, constants included.
    options
        ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any] = field(repr=False)
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return str(self.kernel.__name__)

    def start(self) -> None:
        """Start the kernel; nothing happens where there is nothing to do."""
        if self.programs:
            with warp_products():
                self.kernel[(self.programs,)](**self.arguments, **self.options)


NO_WARPGROUP_PRODUCTS = "DISABLE_MMA_V3"


@contextmanager
def warp_products() -> Iterator[None]:
    """Compile with matrix instructions of a warp, not of a warp group (``wgmma``), which exist on Hopper alone.

    The assembler that Triton 3.6 and 3.7 use for Hopper (ptxas 12.8) miscompiles several wgmma in one kernel: wrong results and illegal
    addresses, neither of which ptxas 13.1 makes of the same PTX; docs/performance.md has the measurements. Triton takes the switch from the
    environment and from nowhere else; it is set for the duration of a launch only, so that other kernels of the process are not touched.
    """
    before = os.environ.get(NO_WARPGROUP_PRODUCTS)
    os.environ[NO_WARPGROUP_PRODUCTS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_WARPGROUP_PRODUCTS]
        else:
            os.environ[NO_WARPGROUP_PRODUCTS] = before


_recorders: list[list[Launch]] = []


def submit(launch: Launch) -> None:
    """Start a kernel, unless launches are being recorded."""
    if _recorders:
        _recorders[-1].append(launch)
    else:
        launch.start()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of starting them; what calls return meanwhile is uninitialised memory."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


_own = threading.local()


@contextmanager
def beside(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Yield a second stream, for launches that need nothing of those on the current one from here on; ``None`` off CUDA devices.

    Where neither fills the device, both run at once. The current stream waits for the second at the end, so memory may be let go
    of there as ever, and a graph that is being captured gets two branches; each thread has its own, so that no other one's launches get
    into it.
    """
    if device.type != "cuda":
        yield None
        return
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    here, second = torch.cuda.current_stream(device), streams[device]
    second.wait_stream(here)
    try:
        yield second
    finally:
        here.wait_stream(second)


def strides(letter: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Return a tensor's strides as kernel arguments, ``stride_qb`` and so on; zeros for an absent tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return dict(zip(_stride_names(letter, axes), values, strict=True))


@cache
def _stride_names(letter: str, axes: str) -> tuple[str, ...]:
    return tuple(f"stride_{letter}{axis}" for axis in axes)

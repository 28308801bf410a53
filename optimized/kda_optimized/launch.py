"""Start kernels, or record what would be started.

Everything a launch needs is one value, so that the compile report and the tuning script see exactly the kernels, argument
types and constants of a real call.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
            self.kernel[(self.programs,)](**self.arguments, **self.options)


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


def strides(letter: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Return a tensor's strides as kernel arguments, ``stride_qb`` and so on; zeros for an absent tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{letter}{axis}": value for axis, value in zip(axes, values, strict=True)}

"""What outlives a call, where CUDA graphs are captured.

The index tables of :mod:`kda_optimized.packing` are made once for many calls. A captured graph reads them by address whenever it is
replayed, so that they must neither lie in memory that is taken back after a call nor be dropped while a graph may still read them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
captured: dict[int, object] = {}


def outside_pools(make: Callable[[], T], device: torch.device) -> T:
    """Return what ``make`` returns, its tensors in ordinary memory of a device.

    While a graph is captured or, by Inductor, warmed up, memory comes from a pool that belongs to the graph, and Inductor objects to
    what is left there. A pool serves one thread, so ``make`` runs in another, on the stream of this one unless that is being captured.
    """
    if device.type != "cuda":
        return make()
    capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.default_stream(device) if capturing else torch.cuda.current_stream(device)

    def there() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as other:
        return other.submit(there).result()


def hold(tables: T, device: torch.device) -> T:
    """Return tables; never let go of those that a graph, captured at this moment, will read again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        captured[id(tables)] = tables
    return tables

"""Timing: several sides take turns in one run, so that whatever the machine does in the meantime it does to all of them.

Each round gives every side one turn, in an order that is rotated by one from round to round. A turn is a fixed number of calls between two
marks of the device's clock; nothing waits for the device within a round, so that what is timed is a stream of calls.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Repeated measurements of one time, in seconds a call.

    Attributes
    ----------
    median, mad, q1, q3, least
        Median, median absolute deviation from it, quartiles, smallest.
    samples
        All of them, in the order in which they were taken.
    """

    median: float
    mad: float
    q1: float
    q3: float
    least: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise at least two samples."""
        median = statistics.median(samples)
        q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        mad = statistics.median(abs(sample - median) for sample in samples)
        return cls(median=median, mad=mad, q1=q1, q3=q3, least=min(samples), samples=tuple(samples))


class Clock(Protocol):
    """Marks moments on a device's time line."""

    def mark(self) -> object:
        """Mark the moment at which everything asked for so far is done."""
        ...

    def seconds(self, start: object, end: object) -> float:
        """Return the time between two marks, waiting for both."""
        ...

    def wait(self) -> None:
        """Wait until the device is idle."""
        ...


class HostClock:
    """The clock of a device that has done its work when the call returns: a CPU."""

    def mark(self) -> object:
        """Return the time now."""
        return time.perf_counter()

    def seconds(self, start: object, end: object) -> float:
        """Return the difference."""
        assert isinstance(start, float)  # noqa: S101 - marks are ours
        assert isinstance(end, float)  # noqa: S101 - likewise
        return end - start

    def wait(self) -> None:
        """Do nothing: the host is idle when asked."""


class CudaClock:
    """CUDA events on the current stream."""

    def mark(self) -> object:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: object, end: object) -> float:
        """Return the time between two events; their resolution is about half a microsecond."""
        assert isinstance(start, torch.cuda.Event)  # noqa: S101 - marks are ours
        assert isinstance(end, torch.cuda.Event)  # noqa: S101 - likewise
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    """Return the clock of a device type."""
    return CudaClock() if device == "cuda" else HostClock()


def take_turns(
    sides: Mapping[str, Sequence[Callable[[], object]]], rounds: int, calls: int, clock: Clock
) -> dict[str, Spread]:
    """Time all sides, interleaved.

    Parameters
    ----------
    sides
        For each side, the same call on every input set, in the same order. Sets are used in rotation over all sides, so that none comes
        again before every other one was touched.
    rounds
        Turns of every side, at least 2.
    calls
        Calls in a turn.

    Returns
    -------
    dict[str, Spread]
        Seconds a call.
    """
    marks: dict[str, list[tuple[object, object]]] = {name: [] for name in sides}
    order, num_sets = list(sides), len(next(iter(sides.values())))
    sets = cycle(range(num_sets))
    clock.wait()
    for i in range(rounds):
        shift = i % len(order)
        for name in order[shift:] + order[:shift]:
            turn = [sides[name][number] for number in islice(sets, calls)]
            start = clock.mark()
            for call in turn:
                call()
            marks[name].append((start, clock.mark()))
    clock.wait()
    return {name: Spread.of([clock.seconds(*pair) / calls for pair in pairs]) for name, pairs in marks.items()}


def calls_in_a_turn(sides: Mapping[str, Sequence[Callable[[], object]]], clock: Clock, wanted: float, most: int) -> int:
    """Return how many calls make the fastest side's turn last ``wanted`` seconds, at most ``most``; all sides are warm."""
    spreads = take_turns(sides, 3, 1, clock)
    fastest = min(spread.median for spread in spreads.values())
    return max(1, min(most, round(wanted / max(fastest, 1e-9))))


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return the replay of one CUDA graph of all the calls, one after the other; their tensors live as long as it does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay(kept: Sequence[Callable[[], object]] = tuple(calls)) -> None:
        del kept
        graph.replay()

    return replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the machine reached in this run: no call can be faster than both allow.

    Attributes
    ----------
    copy_bytes_per_s
        Bytes read and written by a copy within the device's memory, per second.
    matmul_flop_per_s
        Operations of a square matrix product, per second.
    matmul_dtype
        Its dtype.
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: float
    matmul_dtype: str


def measure_ceilings(device: str, rounds: int) -> Ceilings:
    """Measure copy and matrix product, taking turns."""
    on_gpu = device == "cuda"
    num_bytes, side, dtype = (2**30, 8192, torch.bfloat16) if on_gpu else (2**25, 512, torch.float32)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    sides = {"copy": [lambda: target.copy_(source)], "matmul": [lambda: torch.matmul(a, b, out=product)]}
    clock = clock_of(device)
    take_turns(sides, 3, 1, clock)
    spreads = take_turns(sides, rounds, 1, clock)
    return Ceilings(
        copy_bytes_per_s=2 * num_bytes / spreads["copy"].median,
        matmul_flop_per_s=2 * side**3 / spreads["matmul"].median,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )

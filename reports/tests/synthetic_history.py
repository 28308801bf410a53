"""Made-up histories: measurements of commits six hours apart, with steps, noise and drift planted in them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from kda_reports.measurement import Measurement

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
GPU = {"gpu": "A GPU", "cpu": "A CPU", "platform": "Linux x86_64", "driver": "1.2, 1000 MHz, 700 W", "threads": 1}
NUM_COMMITS = 200


def commit(i: int) -> str:
    """Return the name of a commit; its first digits tell commits apart."""
    return f"{i * 2654435761 % 2**32:08x}{i:032x}"


def measured(i: int, value: float, **changes: Any) -> Measurement:
    """Return a timing at commit number ``i``."""
    moment = (BEGIN + timedelta(hours=6 * i)).isoformat(timespec="seconds")
    fields: dict[str, Any] = {
        "time": moment,
        "commit_time": moment,
        "commit": commit(i),
        "dirty": False,
        "source": "bench",
        "run": f"run-{i}",
        "suite_version": "0.1.0",
        "seed": 0,
        "device": "cuda",
        "implementation": "steady",
        "version": "1.2.3",
        "op": "KDA",
        "pass_name": "forward",
        "call": "forward-T2048-H16",
        "shape": {"B": 1, "T": 2048, "H": 16},
        "dtype": "bfloat16",
        "metric": "time",
        "unit": "s",
        "value": value,
        "spread": 0.01 * value,
        "n": 3,
        "samples": (0.99 * value, value, 1.01 * value),
        "machine": GPU,
        "libraries": {"torch": "2.13.0", "triton": "3.7.1"},
    }
    return Measurement(**fields | changes)


def green(i: int, passed: float = 1.0, **changes: Any) -> Measurement:
    """Return the conformance row of a commit."""
    fields: dict[str, Any] = {
        "source": "verify",
        "call": "standard effort",
        "shape": {},
        "dtype": "all",
        "metric": "conformance",
        "unit": "pass",
        "pass_name": "all",
        "spread": None,
        "samples": None,
        "n": 100,
    }
    return measured(i, passed, **fields | changes)


def timed(values: Sequence[float], **changes: Any) -> list[Measurement]:
    """Return a series of timings of an implementation that is judged right at every commit."""
    name = changes.get("implementation", "steady")
    judged = [green(i, implementation=name) for i in range(len(values))]
    return judged + [measured(i, float(value), **changes) for i, value in enumerate(values)]


def noisy(seed: int, *, step: float = 0.0, at: int = 120, noise: float = 0.01, drift: float = 0.0) -> list[float]:
    """Return times about a millisecond: relative Gaussian noise, a relative step, and a relative drift over the whole history."""
    random = np.random.default_rng(seed)
    places = np.arange(NUM_COMMITS)
    level = 1e-3 * (1 + step * (places >= at) + drift * places / (NUM_COMMITS - 1))
    return [float(value) for value in level * (1 + noise * random.standard_normal(NUM_COMMITS))]


def bimodal(seed: int, *, gap: float = 0.05, noise: float = 0.002) -> list[float]:
    """Return times of a machine that runs at one of two speeds, chosen anew at every commit."""
    random = np.random.default_rng(seed)
    slow = random.random(NUM_COMMITS) < 0.5
    return [float(value) for value in 1e-3 * (1 + gap * slow) * (1 + noise * random.standard_normal(NUM_COMMITS))]

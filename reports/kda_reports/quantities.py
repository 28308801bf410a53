"""Numbers with their units, as a person reads them."""

from __future__ import annotations

import math

SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "bytes")),
}
BARE = ("pass", "bound")


def scale_of(value: float, unit: str) -> tuple[float, str]:
    """Return what a value is divided by to be read, and the name of the unit then."""
    scales = SCALES.get(unit, ((1.0, unit),))
    return next(((size, name) for size, name in scales if abs(value) >= size), scales[-1])


def quantity(value: float, unit: str) -> str:
    """Write a value with four significant digits and its unit."""
    if not math.isfinite(value):
        return str(value)
    size, name = scale_of(value, unit)
    number = f"{value / size:.4g}"
    return number if name in BARE else f"{number} {name}"


def percent(before: float, after: float) -> str:
    """Write a change relative to the old value."""
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        return "unchanged" if before == after else "from zero" if before == 0 else "not finite"
    return f"{100 * (after / before - 1):+.1f} %"

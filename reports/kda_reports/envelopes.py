"""Envelopes: the largest error over bound at each token position, amount of accumulated decay or size, and how scores are distributed.

Every measurement carries its own profile. The envelope of an implementation is, bin by bin, the largest value of all
its measurements of one tensor, so that a peak means "some call is this far off here", never an average that hides it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.errors import gravity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kda_reports.errors import Standing
    from kda_reports.rows import Measure

    Profile = Callable[[Measure], Sequence[tuple[float, float]]]

TENSORS = ("o", "dq", "dk", "dv", "dg", "dbeta")
NUM_TOKEN_BINS = 48
DECAY_BINS_PER_DECADE = 4
SMALLEST_DECAY = 1e-3
NUM_QUANTILES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The envelope of one implementation.

    Attributes
    ----------
    name
        The implementation.
    points
        ``(position, largest error over bound)``, by position.
    num_measures
        Measurements it was taken over.
    """

    name: str
    points: Sequence[tuple[float, float]]
    num_measures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """The envelopes of one tensor."""

    tensor: str
    series: Sequence[Series]

    def rows(self) -> list[tuple[float, list[float | None]]]:
        """Return the same as a table: positions, and the value of each series there or ``None``."""
        columns = [dict(series.points) for series in self.series]
        positions = sorted({position for column in columns for position in column})
        return [(position, [column.get(position) for column in columns]) for position in positions]


def token_panels(standings: Sequence[Standing]) -> list[Panel]:
    """Return the envelopes against token position, a panel per tensor."""
    positions = [first for standing in standings for measure in standing.run.measures for first, _ in measure.by_token]
    width = max(1, math.ceil((max(positions, default=0) + 1) / NUM_TOKEN_BINS))
    return _panels(standings, lambda measure: measure.by_token, lambda token: token // width * width)


def decay_panels(standings: Sequence[Standing]) -> list[Panel]:
    """Return the envelopes against decay accumulated since the sequence began, a panel per tensor."""
    return _panels(standings, lambda measure: measure.by_decay, decay_bin)


def size_panels(standings: Sequence[Standing], letter: str) -> list[Panel]:
    """Return the largest scores against a size of the call, such as ``T``, a panel per tensor; a bin begins at each power of two."""
    return _panels(standings, lambda measure: [(float(measure.shape[letter]), measure.score)], power_of_two)


def power_of_two(size: float) -> float:
    """Return the largest power of two that is no larger than a size; 1 for a size of 0, which a logarithmic axis has no place for."""
    return float(1 << (max(int(size), 1).bit_length() - 1))


def quantile_panels(standings: Sequence[Standing]) -> list[Panel]:
    """Return the score that a share of the measurements does not exceed, a panel per tensor; the last point is the largest."""
    measured = (one.tensor for standing in standings for one in standing.run.measures)
    panels = []
    for tensor in dict.fromkeys([*TENSORS, *measured]):
        series = []
        for standing in standings:
            scores = sorted(gravity(one.score) for one in standing.run.measures if one.tensor == tensor)
            if scores:
                kept = sorted({len(scores) * i // NUM_QUANTILES for i in range(1, NUM_QUANTILES)} - {0} | {len(scores)})
                points = [(rank / len(scores), scores[rank - 1]) for rank in kept]
                series.append(Series(name=standing.name, points=points, num_measures=len(scores)))
        if series:
            panels.append(Panel(tensor=tensor, series=series))
    return panels


def decay_bin(nats: float) -> float:
    """Return the lower edge of the logarithmic bin that holds an amount of decay; the first bin holds all below it."""
    if not nats > SMALLEST_DECAY:
        return SMALLEST_DECAY
    # An edge itself belongs to the bin it opens, whatever the logarithm rounds to.
    step = math.floor(math.log10(nats) * DECAY_BINS_PER_DECADE + 1e-9)
    return float(10 ** (step / DECAY_BINS_PER_DECADE))


def _panels(standings: Sequence[Standing], profile: Profile, bin_of: Callable[[float], float]) -> list[Panel]:
    panels = []
    for tensor in TENSORS:
        series = [_series(standing, tensor, profile, bin_of) for standing in standings]
        if kept := [one for one in series if one.points]:
            panels.append(Panel(tensor=tensor, series=kept))
    return panels


def _series(standing: Standing, tensor: str, profile: Profile, bin_of: Callable[[float], float]) -> Series:
    profiles = [profile(measure) for measure in standing.run.measures if measure.tensor == tensor]
    profiles = [points for points in profiles if points]
    return Series(name=standing.name, points=_envelope(profiles, bin_of), num_measures=len(profiles))


def _envelope(
    profiles: Iterable[Sequence[tuple[float, float]]], bin_of: Callable[[float], float]
) -> list[tuple[float, float]]:
    largest: dict[float, float] = {}
    for points in profiles:
        for position, ratio in points:
            place = bin_of(position)
            largest[place] = max(largest.get(place, -1.0), gravity(ratio))
    return sorted(largest.items())

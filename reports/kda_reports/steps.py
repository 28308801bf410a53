"""Steps in a series of measurements over commits, told from noise and from drift.

Change points are found by ``ruptures`` (``KernelCPD``, linear kernel), with a penalty in units of the series' own noise:

    pen = 3 ln(n) sigma^2,    sigma = 1.4826 MAD(x[i+1] - x[i]) / sqrt(2)

so that a step is *significant* when it stands out of that noise. It is *relevant* when it is also as large as its metric says a person
should care about (``metrics.py``). A series that a straight line explains better than its steps is said to drift. A series without noise,
as what a compiler makes, steps wherever its value changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import ruptures
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reports.metrics import Metric

Floats: TypeAlias = npt.NDArray[np.float64]
# A step needs this many commits on either side; what is newer can only be suspected.
LEAST_COMMITS = 5
PENALTY = 3.0
ALPHA = 0.01
SUSPECT_SIGMAS, SUSPECT_RANGES = 4.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A change of level, significant by the way it is found.

    Attributes
    ----------
    position
        Index of the first value on the new level.
    before, after
        Medians of the two levels.
    relevant
        Whether it is large enough to matter.
    confirmed
        Whether there are enough values on the new level; a suspicion otherwise.
    """

    position: int
    before: float
    after: float
    relevant: bool
    confirmed: bool

    @property
    def ratio(self) -> float:
        """Return new over old; infinite or NaN where the old level is zero."""
        if self.before == 0:
            return math.nan if self.after == 0 else math.inf
        return self.after / self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What became of a series.

    Attributes
    ----------
    sigma
        Its noise: the standard deviation of one value about its level.
    steps
        In order.
    drift
        Change from the first value to the last along the fitted line, when the series drifts; ``None`` otherwise.
    """

    sigma: float
    steps: Sequence[Step]
    drift: float | None


def course(values: Sequence[float], metric: Metric) -> Course:
    """Find the steps of a series.

    Parameters
    ----------
    values
        One per commit, in the order of the commits, at least one; a non-finite value counts as a level of its own.
    metric
        Says what is relevant.
    """
    x = np.asarray(values, dtype=float)
    if not np.isfinite(x).all():
        # Infinity is no point on a line with the rest: its presence is a level of its own, and there is no noise.
        return Course(
            sigma=0.0, steps=_levels(x, _changes(np.where(np.isfinite(x), x, np.inf)), 0.0, metric), drift=None
        )
    sigma = noise(x)
    if sigma == 0.0:
        return Course(sigma=0.0, steps=_levels(x, _changes(x), 0.0, metric), drift=None)
    places: list[int] = []
    drift = None
    if len(x) >= 2 * LEAST_COMMITS:
        penalty = PENALTY * math.log(len(x)) * sigma**2
        detector = ruptures.KernelCPD(kernel="linear", min_size=LEAST_COMMITS).fit(x[:, None])
        places = _settled(x, [int(place) for place in detector.predict(pen=penalty)[:-1]])
        places, drift = _explained(x, _robust(x, places))
    if drift is not None:
        return Course(sigma=sigma, steps=[], drift=drift)
    if not places or len(x) - places[-1] >= LEAST_COMMITS:
        places += _suspected(x, places, sigma)
    return Course(sigma=sigma, steps=_levels(x, places, sigma, metric), drift=None)


def noise(x: Floats) -> float:
    """Return the standard deviation of one value about its level, from differences of neighbours, which a few steps do not move."""
    if len(x) < 3:  # noqa: PLR2004 - one difference says nothing of noise
        return 0.0
    return float(stats.median_abs_deviation(np.diff(x), scale="normal")) / math.sqrt(2)


def is_relevant(before: float, after: float, metric: Metric) -> bool:
    """Tell whether a change is as large, relative and absolute, as the metric asks for."""
    change = abs(after - before)
    if not math.isfinite(change):
        return not (before == after or (math.isnan(before) and math.isnan(after)))
    return change > 0 and change >= metric.absolute and change >= metric.relative * abs(before)


def verdict(before: float, after: float, metric: Metric) -> str:
    """Return ``better``, ``worse`` or, where neither way is better, ``changed``; NaN is worse than any number."""
    if metric.better == "neither":
        return "changed"
    if math.isnan(before) or math.isnan(after):
        return "worse" if math.isnan(after) else "better"
    return "better" if (after < before) == (metric.better == "lower") else "worse"


def _changes(x: Floats) -> list[int]:
    return [int(place) + 1 for place in np.flatnonzero(x[1:] != x[:-1])]


def _levels(x: Floats, places: Sequence[int], sigma: float, metric: Metric) -> list[Step]:
    bounds = [0, *places, len(x)]
    levels = [float(np.median(x[start:end])) for start, end in zip(bounds, bounds[1:], strict=False)]
    found = []
    for position, before, after in zip(places, levels, levels[1:], strict=False):
        found.append(
            Step(
                position=position,
                before=before,
                after=after,
                relevant=is_relevant(before, after, metric),
                # Without noise, one value is enough.
                confirmed=sigma == 0.0 or len(x) - position >= LEAST_COMMITS,
            )
        )
    return found


def _settled(x: Floats, places: Sequence[int]) -> list[int]:
    """Return change points moved to where two levels fit best: the detector keeps them away from each other and from the ends."""
    settled: list[int] = []
    for place, end in zip(places, [*places, len(x)][1:], strict=True):
        start = settled[-1] if settled else 0
        cost = ruptures.costs.CostL2().fit(x[start:end])
        last = len(x) - 1 if end == len(x) else end - LEAST_COMMITS
        near = range(max(start + LEAST_COMMITS, place - LEAST_COMMITS + 1), min(last + 1, place + LEAST_COMMITS))
        sums = {at: cost.sum_of_costs([at - start, end - start]) for at in near}
        settled.append(min(sums, key=sums.__getitem__, default=place))
    return settled


def _robust(x: Floats, places: list[int]) -> list[int]:
    """Return the change points whose two levels differ in rank (Mann-Whitney), not by a few far values alone."""
    kept = list(places)
    while kept:
        bounds = [0, *kept, len(x)]
        p = [
            float(stats.mannwhitneyu(x[start:place], x[place:end]).pvalue)
            for start, place, end in zip(bounds, kept, bounds[2:], strict=False)
        ]
        if max(p) < ALPHA:
            break
        del kept[p.index(max(p))]
    return kept


def _explained(x: Floats, places: list[int]) -> tuple[list[int], float | None]:
    """Return what explains the series best for its number of parameters (BIC): its steps, a line's whole change, or neither."""
    n = len(x)
    if not places:
        return [], None
    line = stats.linregress(np.arange(n), x)
    cost = ruptures.costs.CostL2().fit(x)
    straight = float(((x - line.intercept - line.slope * np.arange(n)) ** 2).sum())
    # Beside the one level that all three have, a line has its slope, and each step its place and its height.
    flat, sloped, stepped = (
        n * math.log(residual) + parameters * math.log(n)
        for residual, parameters in (
            (cost.sum_of_costs([n]), 0),
            (straight, 1),
            (cost.sum_of_costs([*places, n]), 2 * len(places)),
        )
    )
    if stepped <= min(flat, sloped):
        return places, None
    return [], float(line.slope) * (n - 1) if sloped < flat else None


def _suspected(x: Floats, places: Sequence[int], sigma: float) -> list[int]:
    """Return where the newest values may have stepped: all lie on one side of the level before them, far by its noise and quartiles."""
    start = places[-1] if places else 0
    for position in range(max(start + LEAST_COMMITS, len(x) - LEAST_COMMITS + 1), len(x)):
        q1, median, q3 = np.quantile(x[start:position], (0.25, 0.5, 0.75))
        margin = SUSPECT_RANGES * (q3 - q1)
        high, low = max(median + SUSPECT_SIGMAS * sigma, q3 + margin), min(median - SUSPECT_SIGMAS * sigma, q1 - margin)
        if (x[position:] > high).all() or (x[position:] < low).all():
            return [position]
    return []

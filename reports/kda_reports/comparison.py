"""Two commits side by side, series by series, in the words better, worse, changed, unchanged and not comparable; never across machines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from kda_reports.fields import RowError
from kda_reports.steps import LEAST_COMMITS, is_relevant, noise, verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kda_reports.measurement import Measurement
    from kda_reports.trends import Series, Trends

# Of a difference between two values whose noise is known, and of a test where it is not.
SIGMAS, ALPHA = 3.0, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One series at two commits.

    Attributes
    ----------
    series
        Which.
    before, after
        Its values; ``None`` where it has none.
    word
        ``better``, ``worse``, ``changed``, ``unchanged`` or ``not comparable``.
    significant, relevant
        Whether the difference stands out of the noise, and whether it is large enough to matter.
    why
        How significance was decided, or why the two cannot be compared.
    """

    series: Series
    before: float | None
    after: float | None
    word: str
    significant: bool
    relevant: bool
    why: str


def compare(trends: Trends, rows: Sequence[Measurement], base: str, new: str) -> list[Change]:
    """Compare two commits.

    Parameters
    ----------
    trends
        The history.
    rows
        The rows it was made from, for the samples of single runs.
    base, new
        Commits, or what they begin with.

    Raises
    ------
    RowError
        If a commit is not in the history, or what was given is the beginning of several.
    """
    commits = {point.commit for series in trends.series for point in series.points}
    old, young = (_commit(name, prefix, commits) for name, prefix in (("base", base), ("new", new)))
    samples: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.commit in (old, young) and row.samples is not None and not row.dirty:
            samples.setdefault((row.series, row.commit), []).extend(row.samples)
    changes = []
    for series in trends.series:
        values = {point.commit: point.value for point in series.points}
        if old in values or young in values:
            changes.append(_change(series, values, old, young, samples))
    return changes


def overall(words: Iterable[str]) -> str:
    """Return one word for many: ``mixed`` when some are better and some worse."""
    found = set(words)
    if {"better", "worse"} <= found:
        return "mixed"
    return next((word for word in ("worse", "better", "changed", "unchanged") if word in found), "not comparable")


def _change(
    series: Series,
    values: Mapping[str, float],
    old: str,
    young: str,
    samples: Mapping[tuple[str, str], Sequence[float]],
) -> Change:
    before, after = values.get(old), values.get(young)
    if before is None or after is None:
        lacking = old if before is None else young
        why = f"not measured (or not judged right) on this machine at {lacking[:10]}"
        return Change(
            series=series, before=before, after=after, word="not comparable", significant=False, relevant=False, why=why
        )
    pair = (samples.get((series.identifier, old), ()), samples.get((series.identifier, young), ()))
    significant, why = _significance(series, before, after, young, pair)
    relevant = is_relevant(before, after, series.metric)
    word = verdict(before, after, series.metric) if significant and relevant else "unchanged"
    if significant is None:
        word = "not comparable"
    return Change(
        series=series, before=before, after=after, word=word, significant=bool(significant), relevant=relevant, why=why
    )


def _significance(
    series: Series, before: float, after: float, young: str, samples: tuple[Sequence[float], Sequence[float]]
) -> tuple[bool | None, str]:
    """Return whether a difference is more than noise, ``None`` where nothing can tell, and what says so."""
    if not series.like.samples:
        # One value of a computation that is repeatable.
        return before != after and not (math.isnan(before) and math.isnan(after)), "repeatable: any difference counts"
    past = [point.value for point in series.points if point.commit != young]
    if len(past) >= 2 * LEAST_COMMITS and (sigma := noise(np.asarray(past))) > 0:
        limit = SIGMAS * math.sqrt(2) * sigma
        return abs(
            after - before
        ) > limit, f"noise of {len(past)} commits: differences beyond {limit:.3g} {series.like.unit} count"
    one, two = samples
    # The least p that so few values can give must be able to reach the level at all.
    if len(one) and len(two) and 2 / math.comb(len(one) + len(two), len(one)) < ALPHA:
        p = float(stats.mannwhitneyu(one, two).pvalue)
        return p < ALPHA, f"Mann-Whitney over {len(one)} and {len(two)} samples of single runs: p = {p:.2g}"
    return None, f"too few: {len(past)} commits, {len(one)} and {len(two)} samples"


def _commit(name: str, prefix: str, commits: Iterable[str]) -> str:
    found = sorted(commit for commit in commits if commit.startswith(prefix))
    if len(found) != 1:
        message = f"{name} must begin one commit of the history, got {prefix!r}, which begins {len(found)}; `kda history list` names them"
        raise RowError(message)
    return found[0]

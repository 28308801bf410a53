"""What training runs add up to: the runs that share a panel, what tells them apart, and the rows that suffice to say it again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.training import LABELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.training import Throughput, TrainingRun

MIXERS = {"kda": "KDA", "gdn": "GDN", "decay": "decay only"}
REACHED = (0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One model's runs on one task that differ in learning rate or seed only, by learning rate, and the rate that is shown."""

    data: str
    length: int
    name: str
    rates: Mapping[float, Sequence[TrainingRun]]
    chosen: float

    @property
    def accuracies(self) -> dict[float, float]:
        """Return the mean of the last accuracies at each rate."""
        return {rate: sum(run.final.accuracy for run in runs) / len(runs) for rate, runs in self.rates.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Runs on one task or text at one length: ``entries`` are pairs of a curve's name and a run; seeds share a name."""

    data: str
    length: int
    entries: Sequence[tuple[str, TrainingRun]]

    @property
    def title(self) -> str:
        """Return how the page calls it."""
        return f"{self.data}, {self.length} tokens"

    def least_steps(self, accuracy: float) -> int | None:
        """Return the first step at which any run had at least this accuracy; ``None`` if none had."""
        points = [run.reached(accuracy) for _, run in self.entries]
        return min((point.step for point in points if point), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Panels, the names of all curves in the order of their colours, and the settings that all runs share."""

    panels: Sequence[Panel]
    names: Sequence[str]
    shared: Mapping[str, object]

    @property
    def runs(self) -> list[TrainingRun]:
        """Return all runs."""
        return [run for panel in self.panels for _, run in panel.entries]

    def runs_of(self, name: str) -> list[TrainingRun]:
        """Return the runs of a curve's name."""
        return [run for panel in self.panels for own, run in panel.entries if own == name]


def best_rates(runs: Sequence[TrainingRun]) -> tuple[list[TrainingRun], list[Tried]]:
    """Choose, among runs that differ in learning rate and seed only, the rate that did best.

    As in the report, the rate is part of what is tried for each model and task, and the best is what is compared [KL section 5.1].
    Best is the least mean share of wrong guesses, by the last accuracy of each seed; of equals, the rate that reached ``REACHED`` in fewer
    steps. A rate that fewer seeds ran is not better for it: seeds that were not run count as nothing learned.

    Returns
    -------
    tuple[list[TrainingRun], list[Tried]]
        The runs at the chosen rates, in their order, and what they were chosen from: one entry where more than one rate was tried.
    """
    groups: dict[tuple[str, int, str, str], dict[float, list[TrainingRun]]] = {}
    for run in runs:
        key = (run.data, run.length, run.mixer, json.dumps(_settings(run), sort_keys=True))
        groups.setdefault(key, {}).setdefault(run.learning_rate, []).append(run)
    tried, kept = [], set[int]()
    for (data, length, mixer, _), rates in sorted(groups.items()):
        num_seeds = len({run.seed for some in rates.values() for run in some})
        chosen = min(rates, key=lambda rate: _shortfall(rates[rate], num_seeds))
        kept |= {id(run) for run in rates[chosen]}
        if len(rates) > 1:
            name = MIXERS.get(mixer, mixer)
            tried.append(Tried(data=data, length=length, name=name, rates=dict(sorted(rates.items())), chosen=chosen))
    return [run for run in runs if id(run) in kept], tried


def _shortfall(runs: Sequence[TrainingRun], num_seeds: int) -> tuple[float, ...]:
    """Return what the best rate has least of: wrong guesses in the end, then steps to each level, the highest first."""
    wrong = sum(1 - run.final.accuracy for run in runs) + num_seeds - len(runs)
    steps = [[point.step if (point := run.reached(level)) else math.inf for run in runs] for level in reversed(REACHED)]
    return (wrong / num_seeds, *(sum(some) / len(some) for some in steps))


def compare(runs: Sequence[TrainingRun]) -> Comparison:
    """Put runs of one task and length side by side; a name is the mixer and whatever differs among the runs beside learning rates."""
    settings = [_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    differing = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    panels: dict[tuple[str, int], list[tuple[str, TrainingRun]]] = {}
    order = {mixer: i for i, mixer in enumerate(MIXERS)}
    for run, own in sorted(zip(runs, settings, strict=True), key=lambda pair: order.get(pair[0].mixer, len(order))):
        words = [f"{key} {own.get(key)}" for key in differing]
        name = ", ".join([MIXERS.get(run.mixer, run.mixer), *words])
        panels.setdefault((run.data, run.length), []).append((name, run))
    ordered = [Panel(data=data, length=length, entries=entries) for (data, length), entries in sorted(panels.items())]
    names = sorted(
        {name: run for panel in ordered for name, run in panel.entries}.items(),
        key=lambda pair: (order.get(pair[1].mixer, len(order)), pair[0]),
    )
    shared = {key: settings[0][key] for key in keys if key not in differing}
    return Comparison(panels=ordered, names=[name for name, _ in names], shared=shared)


def condensed(runs: Sequence[TrainingRun], throughputs: Sequence[Throughput], every: int) -> str:
    """Return rows that are fewer and say the same.

    Kept are the points at multiples of ``every`` steps, the first and the last, and those that the table names, so that a page of
    these rows has the same table, and only its curves are coarser.
    """
    kept: list[Mapping[str, object]] = []
    for run in runs:
        named = {point.step for level in REACHED if (point := run.reached(level))}
        # The first point keeps the rhythm by which old rows tell how the run ended.
        named |= {run.points[0].step, run.final.step, run.best.step, run.steepest.step}
        rows = [point.row for point in run.points if point.step in named or point.step % every == 0]
        kept += [run.opening, *rows]
    kept += [row for throughput in throughputs for row in throughput.rows]
    return "".join(json.dumps(row) + "\n" for row in kept)


def _settings(run: TrainingRun) -> dict[str, object]:
    """Return what a run was made with, beside the labels that it is filed under and its learning rate."""
    filed = (*LABELS, "learning_rate")
    recipe = {key.replace("_", " "): value for key, value in run.recipe.items() if key not in filed}
    return recipe | {"device": run.device, "torch": run.torch, "operator": run.operator}

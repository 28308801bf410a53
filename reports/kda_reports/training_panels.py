"""What training runs add up to: the runs that share a panel, what tells them apart, and the rows that suffice to say it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.training import LABELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kda_reports.training import Throughput, TrainingRun

MIXERS = {"kda": "KDA", "gdn": "GDN", "decay": "decay only"}
REACHED = (0.9, 0.99)


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


def compare(runs: Sequence[TrainingRun]) -> Comparison:
    """Put runs of one task and length side by side; a name is the mixer and whatever else differs among the runs."""
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
    """Return what a run was made with, beside the labels that it is filed under."""
    recipe = {key.replace("_", " "): value for key, value in run.recipe.items() if key not in LABELS}
    return recipe | {"device": run.device, "torch": run.torch, "operator": run.operator}

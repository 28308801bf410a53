"""Training runs: the rows of ``kda_model.train`` and ``kda_model.throughput``, read strictly.

A row of kind ``run`` opens a run and says its recipe; each row of kind ``train`` behind it is one step. Rows of kind
``throughput`` are the components of a training step, the whole step first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kda_reports.fields import Fields, RowError, each_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

COMMANDS = "python -m kda_model.train"
ROWS = "rows.jsonl"
KINDS = ("run", "train", "throughput")
ENDINGS = ("steps", "accuracy")
WHOLE = "step"
# What a run is told apart by on the page beside its recipe's settings.
LABELS = ("data", "length", "mixer", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One logged step: mean loss in nats and share of right guesses, of that step's batch alone; ``row`` is the whole row."""

    step: int
    loss: float
    accuracy: float
    gradient_norm: float
    seconds: float
    row: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """One run of a recipe.

    Attributes
    ----------
    data, length, mixer, seed
        The task or the name of the text, tokens of a sequence, what mixes tokens, seed of parameters and data.
    learning_rate
        Of the recipe, at its highest.
    steps
        How many the recipe asks for.
    recipe, torch, device, operator
        All settings; where and with what they were run.
    points
        In the order of their steps, at least one.
    opening
        The row that opened the run, as it was read.
    """

    data: str
    length: int
    mixer: str
    seed: int
    learning_rate: float
    steps: int
    recipe: Mapping[str, object]
    torch: str
    device: str
    operator: str
    points: Sequence[Point]
    opening: Mapping[str, object]

    @property
    def ended(self) -> str | None:
        """Return what ended the run, one of ``ENDINGS``; ``None`` if it was stopped before its end.

        Rows written before they said so end off the rhythm of logging where the accuracy asked for was reached.
        """
        last = self.points[-1]
        if said := last.row.get("ended"):
            return str(said)
        if last.step == self.steps:
            return "steps"
        return "accuracy" if last.step % self.points[0].step else None

    @property
    def final(self) -> Point:
        """Return the last point."""
        return self.points[-1]

    @property
    def best(self) -> Point:
        """Return the first point of the highest accuracy."""
        return max(self.points, key=lambda point: point.accuracy)

    @property
    def steepest(self) -> Point:
        """Return the first point of the largest gradient norm."""
        return max(self.points, key=lambda point: point.gradient_norm)

    def reached(self, accuracy: float) -> Point | None:
        """Return the first point of at least this accuracy, or ``None``."""
        return next((point for point in self.points if point.accuracy >= accuracy), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One kind of component: how many a step has, their milliseconds together, and their share of it, which may be negative."""

    name: str
    number: int
    ms: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """One measurement of a training step.

    Attributes
    ----------
    settings
        Model, mixer, sizes, optimiser, precision, device and versions.
    ms, spread_ms, tokens_per_second, peak_bytes
        Of the whole step: median, largest less least, and what follows.
    components
        Each timed alone, and what their sum leaves over.
    rows
        As they were read.
    """

    settings: Mapping[str, object]
    ms: float
    spread_ms: float
    tokens_per_second: float
    peak_bytes: int
    components: Sequence[Component]
    rows: Sequence[Mapping[str, object]]


def read_training(paths: Iterable[Path]) -> tuple[list[TrainingRun], list[Throughput]]:
    """Read rows of training.

    Parameters
    ----------
    paths
        Rows files; of a folder, every ``rows.jsonl`` and ``throughput.jsonl`` in it at any depth.

    Returns
    -------
    tuple[list[TrainingRun], list[Throughput]]
        Runs, by task, length, mixer, learning rate and seed; throughputs in the order of their rows.

    Raises
    ------
    RowError
        If a file cannot be read, a line is no row of training, a row stands where it belongs to nothing, steps go back, or there
        is nothing.
    """
    runs: list[TrainingRun] = []
    throughputs: list[Throughput] = []
    for path in files_of(paths):
        groups: list[list[Fields]] = []
        for row in each_row([path], COMMANDS):
            _place(row, groups)
        for opening, *rows in groups:
            if opening.fields["kind"] == "run":
                runs.append(_run(opening, rows))
            else:
                throughputs.append(_throughput(opening, rows))
    if not runs and not throughputs:
        message = f"rows must hold at least one run or throughput, got none; run `{COMMANDS}` to make one"
        raise RowError(message)
    return sorted(runs, key=lambda run: (run.data, run.length, run.mixer, run.learning_rate, run.seed)), throughputs


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Return the rows files: a file as it is, for a folder what it holds."""
    found: list[Path] = []
    for path in paths:
        names = (ROWS, "throughput.jsonl")
        found += sorted(file for name in names for file in path.rglob(name)) if path.is_dir() else [path]
    return found


def _place(row: Fields, groups: list[list[Fields]]) -> None:
    """Add a row to the group that it belongs to, or begin one with it."""
    kind = row.one_of("kind", KINDS)
    if kind == "run" or (kind == "throughput" and row.get("component", str) == WHOLE):
        groups.append([row])
    elif groups and (groups[-1][0].fields["kind"] == "run") == (kind == "train"):
        groups[-1].append(row)
    else:
        first = "a row of kind run" if kind == "train" else f"the component {WHOLE}"
        raise row.error("kind", f"follow {first}", repr(kind))


def _run(opening: Fields, rows: Sequence[Fields]) -> TrainingRun:
    if not rows:
        raise opening.error("kind", "be followed by at least one row of kind train", "none")
    recipe = opening.inner("recipe")
    mixer = rows[0].get("mixer", str)
    points: list[Point] = []
    for row in rows:
        for name, wanted in (
            ("length", recipe.get("length", int)),
            ("seed", recipe.get("seed", int)),
            ("mixer", mixer),
        ):
            if row.get(name, object) != wanted:
                raise row.error(name, f"be that of its run, {wanted!r}", repr(row.fields[name]))
        points.append(_point(row, points[-1].step if points else 0))
    return TrainingRun(
        data=rows[0].get("data", str),
        length=recipe.get("length", int),
        mixer=mixer,
        seed=recipe.get("seed", int),
        learning_rate=recipe.number("learning_rate"),
        steps=recipe.get("steps", int),
        recipe=recipe.fields,
        torch=opening.get("torch", str),
        device=opening.get("device", str),
        operator=opening.get("operator", str),
        points=points,
        opening=opening.fields,
    )


def _point(row: Fields, before: int) -> Point:
    step, accuracy = row.get("step", int), row.number("accuracy")
    if step <= before:
        raise row.error("step", f"be greater than the one before, {before}", str(step))
    if not 0 <= accuracy <= 1:
        raise row.error("accuracy", "be a share from 0 to 1", str(accuracy))
    if "ended" in row.fields:
        row.one_of("ended", ENDINGS)
    return Point(
        step=step,
        loss=row.number("loss"),
        accuracy=accuracy,
        gradient_norm=row.number("gradient_norm"),
        seconds=row.number("seconds"),
        row=row.fields,
    )


def _throughput(whole: Fields, rows: Sequence[Fields]) -> Throughput:
    own = ("kind", "component", "number", "ms", "share", "spread_ms", "tokens_per_second", "peak_bytes")
    return Throughput(
        settings={key: value for key, value in whole.fields.items() if key not in own},
        ms=whole.number("ms"),
        spread_ms=whole.number("spread_ms"),
        tokens_per_second=whole.number("tokens_per_second"),
        peak_bytes=whole.get("peak_bytes", int),
        components=[
            Component(
                name=row.get("component", str),
                number=row.get("number", int),
                ms=row.number("ms"),
                share=row.number("share"),
            )
            for row in rows
        ],
        rows=[whole.fields, *(row.fields for row in rows)],
    )

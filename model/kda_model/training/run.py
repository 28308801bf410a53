"""A training run: steps, rows, and a state on disk from which it goes on as if it had never stopped.

The folder of a run holds ``rows.jsonl``, ``state.pt`` and, at the end, the model as a checkpoint in released names. A state is written
beside the old one and then takes its place, so that a kill at any moment leaves one that is whole; rows behind it are dropped.

Steps are started a stretch at a time, up to the next row or state, and only then waited for.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from kda_reference.errors import DomainError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kda_model import checkpoint
from kda_model.model import KimiLinear, initialise
from kda_model.operators import find_operator
from kda_model.training.optimiser import Optimiser
from kda_model.training.recipe import PRECISIONS
from kda_model.training.step import StepGraph, TrainingStep

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from kda_model.training.batches import Batch
    from kda_model.training.recipe import Recipe

ROWS, STATE = "rows.jsonl", "state.pt"
SMOOTHED = 20
STEPS_BEFORE_GRAPH = 3


class Pace(NamedTuple):
    """How often a run writes its state and a row; what has to be waited for, and where it may end early."""

    save_every: int = 500
    log_every: int = 10


class Run:
    """One run of a recipe in a folder; a folder with a state of the same recipe is taken up.

    Parameters
    ----------
    recipe
        What to do.
    folder
        Where rows, state and model go.
    device
        ``cpu`` or a CUDA device, on which the run has a stream of its own.
    graph
        Whether steps are replayed from a CUDA graph where ``obstacle`` is ``None``; the first few of a process never are.

    Raises
    ------
    DomainError
        If the folder holds a run of another recipe.
    """

    def __init__(
        self, recipe: Recipe, folder: Path | str, device: torch.device | str = "cpu", *, graph: bool = False
    ) -> None:
        self.recipe, self.folder, self.device = recipe, Path(folder), torch.device(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = recipe.source()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self._on_stream():
            with self.device:
                model = KimiLinear(recipe.config(), find_operator(recipe.operator, self.device))
            # Drawn in float32, whatever follows, so that precisions start alike.
            self.model = initialise(model, recipe.seed).cast(PRECISIONS[recipe.precision]).train()
            self.model.recompute = recipe.recompute
            self.optimiser = Optimiser(self.model, recipe.optimiser, recipe.weight_decay)
            self._one_step = TrainingStep(self.model, self.optimiser, recipe.max_norm, recipe.balance_rate)
            self._wants_graph, self._made = graph, 0
            self._graph: StepGraph | None = None
            self.step, self.seconds = 0, 0.0
            self._started: list[Tensor] = []
            self._accuracies: deque[float] = deque(maxlen=SMOOTHED)
            if (self.folder / STATE).exists():
                self._resume()
            else:
                (self.folder / ROWS).write_text(json.dumps(self._first_row()) + "\n", encoding="utf-8")

    def train(
        self, *, save_every: int = 500, log_every: int = 10, progress: bool = False, until: int | None = None
    ) -> float:
        """Train to the end of the recipe, or up to step ``until``; return the last mean accuracy.

        Raises
        ------
        DomainError
            If the loss is no longer finite; the last state is kept.
        """
        pace, last = Pace(save_every, log_every), self.recipe.steps if until is None else min(until, self.recipe.steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns) if progress else None
        with bar or nullcontext():
            task = bar.add_task(self.recipe.data, total=last, completed=self.step) if bar else None
            while self.step < last and not self.converged:
                self.start(pace, last)
                row = self.finish(pace, last)
                if bar is not None and task is not None:
                    name = f"{self.recipe.data} loss {row['loss']:.3f} accuracy {row['accuracy']:.3f}"
                    bar.update(task, completed=self.step, description=name)
        return self.accuracy

    def start(self, pace: Pace, last: int | None = None) -> None:
        """Start the steps up to the next row or state, and wait for none of them."""
        self._began = time.perf_counter()
        end = min(every * (self.step // every + 1) for every in pace)
        steps = range(self.step, min(end, self.recipe.steps if last is None else last))
        with self._on_stream():
            for step, rate in zip(steps, self.optimiser.rates([self.recipe.rate(step) for step in steps]), strict=True):
                batch = self.source.batch(step, self.device)
                self._tokens = batch.tokens.numel()
                self._started.append(self._take(batch, rate))

    def finish(self, pace: Pace, last: int | None = None) -> dict[str, Any]:
        """Wait for the steps that were started, write what is due, and return the row of the last of them.

        Raises
        ------
        DomainError
            If a loss is not finite; the last state is kept.
        """
        with self._on_stream():
            found = torch.stack(self._started).tolist()
            self._started.clear()
            self.seconds += time.perf_counter() - self._began
            for loss, accuracy, _ in found:
                if not math.isfinite(loss):
                    message = f"loss must be finite, got {loss} at step={self.step}; lower the learning rate and take up the last state"
                    raise DomainError(message)
                self.step += 1
                self._accuracies.append(accuracy)
            loss, accuracy, norm = found[-1]
            row = {
                "kind": "train", "step": self.step, "loss": loss, "accuracy": accuracy, "gradient_norm": norm,
                "tokens": self._tokens, "seconds": self.seconds, **self._labels(),
            }  # fmt: skip
            if self.step % pace.log_every == 0 or self.step == last or self.ended is not None:
                self._append(row if self.ended is None else {**row, "ended": self.ended})
            if self.step % pace.save_every == 0 or self.ended is not None:
                self.save()
            if self.ended is not None:
                checkpoint.save(self.model, self.folder)
        return row

    @property
    def accuracy(self) -> float:
        """Return the mean accuracy of the last steps."""
        return sum(self._accuracies) / max(1, len(self._accuracies))

    @property
    def converged(self) -> bool:
        """Return whether the accuracy asked for has been reached, as far as steps were waited for."""
        full = len(self._accuracies) == SMOOTHED
        return self.recipe.stop_at is not None and full and self.accuracy >= self.recipe.stop_at

    @property
    def ended(self) -> str | None:
        """Return what ended the run, ``accuracy`` or ``steps``; ``None`` while there is more to do, as after a kill."""
        if self.converged:
            return "accuracy"
        return "steps" if self.step == self.recipe.steps else None

    @property
    def obstacle(self) -> str | None:
        """Return why this run's steps cannot be replayed from a CUDA graph, or ``None``."""
        return self._one_step.obstacle(self.source.batch(0, self.device))

    @property
    def recorded(self) -> bool:
        """Return whether steps are replayed from a graph by now."""
        return self._graph is not None

    def _take(self, batch: Batch, rate: float | Tensor) -> Tensor:
        """Start a step, from the graph once there is one."""
        if self._wants_graph and self._graph is None and self._made == STEPS_BEFORE_GRAPH:
            self._wants_graph = self._one_step.obstacle(batch) is None
            if self._wants_graph and isinstance(rate, torch.Tensor):
                self._graph = StepGraph(self._one_step, batch, rate)
        self._made += 1
        if self._graph is not None and isinstance(rate, torch.Tensor):
            return self._graph(batch, rate)
        return self._one_step(batch, rate)

    def _on_stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _labels(self) -> dict[str, Any]:
        return {
            "data": Path(self.recipe.data).name,
            "mixer": self.model.config.mixer,
            "length": self.recipe.length,
            "seed": self.recipe.seed,
        }

    def _first_row(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        operator = find_operator(self.recipe.operator, self.device).name
        return {
            "kind": "run",
            "recipe": self.recipe.to_row(),
            "torch": torch.__version__,
            "device": device,
            "operator": operator,
        }

    def _append(self, row: dict[str, Any]) -> None:
        with (self.folder / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the state."""
        state = {
            "recipe": self.recipe.to_row(), "step": self.step, "seconds": self.seconds, "accuracies": list(self._accuracies),
            "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
        }  # fmt: skip
        new = self.folder / f"{STATE}.new"
        torch.save(state, new)
        new.replace(self.folder / STATE)

    def _resume(self) -> None:
        state = torch.load(self.folder / STATE, map_location=self.device, weights_only=True)
        if state["recipe"] != self.recipe.to_row():
            differing = sorted(key for key, value in self.recipe.to_row().items() if state["recipe"].get(key) != value)
            message = f"folder must hold a run of this recipe, got one with another {', '.join(differing)}; choose another folder"
            raise DomainError(message)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._accuracies.extend(state["accuracies"])
        rows = [
            json.loads(line)
            for line in (self.folder / ROWS).read_text(encoding="utf-8").splitlines()
            if line.endswith("}")
        ]
        kept = [row for row in rows if row.get("step", 0) <= self.step]
        (self.folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

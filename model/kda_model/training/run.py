"""A training run: steps, rows, and a state on disk from which it goes on as if it had never stopped.

The folder of a run holds ``rows.jsonl``, ``state.pt`` and, at the end, the model as a checkpoint in released names. A state is written
beside the old one and then takes its place, so that a kill at any moment leaves one that is whole; rows behind it are dropped.
"""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.errors import DomainError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy, linear

from kda_model import checkpoint
from kda_model.model import KimiLinear, initialise
from kda_model.norms import at_least_float32
from kda_model.operators import find_operator
from kda_model.training.optimiser import Optimiser
from kda_model.training.recipe import PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor

    from kda_model.training.batches import Batch
    from kda_model.training.recipe import Recipe

ROWS, STATE = "rows.jsonl", "state.pt"
SMOOTHED = 20


class Run:
    """One run of a recipe in a folder; a folder with a state of the same recipe is taken up.

    Parameters
    ----------
    recipe
        What to do.
    folder
        Where rows, state and model go.
    device
        ``cpu`` or a CUDA device.

    Raises
    ------
    DomainError
        If the folder holds a run of another recipe.
    """

    def __init__(self, recipe: Recipe, folder: Path | str, device: torch.device | str = "cpu") -> None:
        self.recipe, self.folder, self.device = recipe, Path(folder), torch.device(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = recipe.source()
        with self.device:
            model = KimiLinear(recipe.config(), find_operator(recipe.operator, self.device))
        # Drawn in float32, whatever follows, so that precisions start alike.
        self.model = initialise(model, recipe.seed).cast(PRECISIONS[recipe.precision]).train()
        self.model.recompute = recipe.recompute
        self.optimiser = Optimiser(self.model, recipe.optimiser, recipe.weight_decay)
        self.step, self.seconds = 0, 0.0
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
        last = self.recipe.steps if until is None else min(until, self.recipe.steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns) if progress else None
        with bar or nullcontext():
            task = bar.add_task(self.recipe.data, total=last, completed=self.step) if bar else None
            while self.step < last and not self.converged:
                row = self._one_step()
                if self.step % log_every == 0 or self.step == last or self.converged:
                    self._append(row if self.ended is None else {**row, "ended": self.ended})
                if self.step % save_every == 0:
                    self.save()
                if bar is not None and task is not None:
                    name = f"{self.recipe.data} loss {row['loss']:.3f} accuracy {row['accuracy']:.3f}"
                    bar.update(task, completed=self.step, description=name)
        if self.ended is not None:
            self.save()
            checkpoint.save(self.model, self.folder)
        return sum(self._accuracies) / max(1, len(self._accuracies))

    @property
    def converged(self) -> bool:
        """Return whether the accuracy asked for has been reached."""
        full = len(self._accuracies) == SMOOTHED
        return self.recipe.stop_at is not None and full and sum(self._accuracies) / SMOOTHED >= self.recipe.stop_at

    @property
    def ended(self) -> str | None:
        """Return what ended the run, ``accuracy`` or ``steps``; ``None`` while there is more to do, as after a kill."""
        if self.converged:
            return "accuracy"
        return "steps" if self.step == self.recipe.steps else None

    def _one_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        batch = self.source.batch(self.step, self.device)
        loss, accuracy = loss_and_accuracy(self.model, batch)
        loss.backward()
        norm = self.optimiser.step(self.recipe.rate(self.step), self.recipe.max_norm)
        self.model.balance_routers(self.recipe.balance_rate)
        value, share = loss.item(), accuracy.item()
        if not torch.isfinite(loss):
            message = f"loss must be finite, got {value} at step={self.step}; lower the learning rate and take up the last state"
            raise DomainError(message)
        self.step += 1
        self.seconds += time.perf_counter() - start
        self._accuracies.append(share)
        return {
            "kind": "train", "step": self.step, "loss": value, "accuracy": share, "gradient_norm": norm,
            "tokens": batch.tokens.numel(), "seconds": self.seconds, **self._labels(),
        }  # fmt: skip

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


def loss_and_accuracy(model: KimiLinear, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean negative log likelihood (nats) and the share of right guesses at the places that are asked."""
    asked = batch.targets >= 0
    logits = at_least_float32(linear(model.hidden(batch.tokens, batch.packing)[asked], model.head))
    targets = batch.targets[asked]
    return cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()

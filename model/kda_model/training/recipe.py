"""What a training run does, as data: two runs of one recipe give the same rows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.errors import DomainError

from kda_model.presets import preset
from kda_model.training.tasks import TASKS, SyntheticTask
from kda_model.training.text import ByteText, read_documents

if TYPE_CHECKING:
    from kda_model.config import KimiLinearConfig
    from kda_model.training.batches import Source

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of one run.

    Attributes
    ----------
    data
        ``palindrome``, ``recall``, ``stacks``, or the path of a text.
    length
        Tokens of a sequence; of the longest document of a text.
    rows
        Sequences of a step; a text packs ``rows * length`` tokens.
    model
        A preset; its vocabulary becomes that of the data.
    mixer
        ``kda``, ``gdn`` or ``decay``, in place of the preset's; ``None`` keeps it.
    operator
        Who computes the recurrence; ``None`` means the device's own.
    steps, learning_rate, warmup, weight_decay, max_norm, optimiser
        Of the optimiser; the rate rises for ``warmup`` steps and then falls to a tenth along a cosine.
    precision
        Of the parameters; masters are float32.
    balance_rate
        By which the routers' biases move after a step.
    recompute
        Whether activations are computed again for the gradient.
    seed
        Of parameters and data.
    stop_at
        Accuracy at which a run ends early, when it has been reached by the mean of 20 steps; ``None`` means never.
    """

    data: str
    length: int = 256
    rows: int = 32
    model: str = "synthetic"
    mixer: str | None = None
    operator: str | None = None
    steps: int = 1000
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    max_norm: float = 1.0
    optimiser: str = "adamw"
    precision: str = "float32"
    balance_rate: float = 1e-3
    recompute: bool = False
    seed: int = 0
    stop_at: float | None = None

    def __post_init__(self) -> None:
        """Check what is not checked where it is used."""
        if self.precision not in PRECISIONS:
            message = f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}; choose one"
            raise DomainError(message)
        for name in ("steps", "rows"):
            if getattr(self, name) < 1:
                message = f"{name} must be at least 1, got {getattr(self, name)}; nothing would be trained"
                raise DomainError(message)

    def source(self) -> Source:
        """Return the data."""
        if self.data in TASKS:
            return SyntheticTask(self.data, self.length, self.rows, self.seed)
        path = Path(self.data)
        if not path.is_file():
            message = f"data must be one of {', '.join(TASKS)} or the path of a text, got {self.data!r}; correct it"
            raise DomainError(message)
        return ByteText(read_documents(path), self.rows * self.length, self.length, self.seed)

    def config(self) -> KimiLinearConfig:
        """Return the model's configuration."""
        found = preset(self.model).replace(vocab_size=self.source().vocab_size, bos_id=None, eos_id=None, pad_id=None)
        return found if self.mixer is None else found.replace(mixer=self.mixer)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))

    def to_row(self) -> dict[str, Any]:
        """Return the settings as a row holds them."""
        return asdict(self)

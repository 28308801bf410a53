"""One step of training as work of the device: nothing in it is read on the host, so that a CUDA graph can repeat it.

A small model's step is a thousand short kernels, and a GPU waits for their launches. Recorded once, they are launched together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, linear

from kda_model.norms import at_least_float32
from kda_model.training.batches import NO_TARGET, Batch

if TYPE_CHECKING:
    from torch import Tensor

    from kda_model.model import KimiLinear
    from kda_model.training.optimiser import Optimiser


@dataclass(frozen=True)
class TrainingStep:
    """Gradient, clipping, optimiser and routers' biases, on one batch.

    Attributes
    ----------
    model, optimiser
        What is trained, and who steps it.
    max_norm
        To which the gradients' norm is clipped.
    balance_rate
        By which the routers' biases move.
    """

    model: KimiLinear
    optimiser: Optimiser
    max_norm: float
    balance_rate: float

    def __call__(self, batch: Batch, rate: float | Tensor) -> Tensor:
        """Make a step; return its loss (nats), share of right guesses and norm of gradients before clipping, float64 ``[3]``."""
        loss, accuracy = loss_and_accuracy(self.model, batch)
        loss.backward()
        norm = self.optimiser.step(rate, self.max_norm)
        self.model.balance_routers(self.balance_rate)
        return torch.stack([x.detach().to(torch.float64) for x in (loss, accuracy, norm)])

    def obstacle(self, batch: Batch) -> str | None:
        """Return why steps on such batches cannot be recorded in a CUDA graph, or ``None``."""
        if self.model.device.type != "cuda":
            return f"the model is on {self.model.device}"
        if not self.optimiser.reads_nothing:
            return "the optimiser's learning rate is read on the host"
        if batch.packing is not None:
            return "packed sequences differ in length from step to step"
        if self.model.recompute:
            return "recomputation reads the state of random numbers on the host"
        if any(True for _ in self.model.routers()):
            return "how many tokens each expert has may be read on the host"
        return None


class StepGraph:
    """A training step recorded for batches of one shape, and replayed on others; the same bits as the step itself.

    Parameters
    ----------
    step
        Without an obstacle, and made before: kernels are compiled, and the optimiser has its state.
    batch, rate
        Of the shapes that are to come; nothing is trained on them by recording.
    """

    def __init__(self, step: TrainingStep, batch: Batch, rate: Tensor) -> None:
        self._tokens, self._targets, self._rate = batch.tokens.clone(), batch.targets.clone(), rate.clone()
        self._graph = torch.cuda.CUDAGraph()
        # On the stream that replays it: scratch memory of matrix products belongs to the stream on which they are recorded, and graphs
        # that share some must not run at the same time.
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self._found = step(Batch(self._tokens, self._targets), self._rate)

    def __call__(self, batch: Batch, rate: Tensor) -> Tensor:
        """Make a step as :class:`TrainingStep` does."""
        self._tokens.copy_(batch.tokens)
        self._targets.copy_(batch.targets)
        self._rate.copy_(rate)
        self._graph.replay()
        return self._found.clone()


def loss_and_accuracy(model: KimiLinear, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean negative log likelihood (nats) and the share of right guesses at the places that are asked."""
    logits = at_least_float32(linear(model.hidden(batch.tokens, batch.packing), model.head)).flatten(0, 1)
    # Where nothing is asked no guess is right; how many places are asked is not read, so that a graph serves any number.
    targets = batch.targets.flatten()
    right = (logits.argmax(-1) == targets).sum()
    return cross_entropy(logits, targets, ignore_index=NO_TARGET), right / (targets != NO_TARGET).sum()

"""The report's synthetic tasks [KL section 5.1]: new sequences at every step, so that training accuracy is test accuracy.

    palindrome    a b c SEP c b a                         repeat a random string backwards
    recall        k1 v1 k2 v2 ... SEP k2 v2 k1 v1         multi-query associative recall: the value that came with each key
    stacks        PUSH 7 x  PUSH 9 y  POP 7 x ...         64 stacks at once: what a pop gives

Only what is determined is asked for: the reversed half, the values, the popped elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kda_reference.errors import DomainError

from kda_model.training.batches import NO_TARGET, Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NUM_SYMBOLS = 64
NUM_STACKS = 64
RECENT = 64  # steps that are kept, for other runs on the same sequences
SHARE_OF_PAIRS = 4  # a quarter of a recall sequence defines pairs; keys are asked for more than once
Array = np.ndarray[Any, np.dtype[np.int64]]


def palindrome(rng: np.random.Generator, rows: int, length: int) -> tuple[Array, Array]:
    """Return tokens and targets ``[rows, length]``, or one less; symbols 0..63, separator 64."""
    half = length // 2
    text = rng.integers(0, NUM_SYMBOLS, (rows, half))
    whole = np.concatenate([text, np.full((rows, 1), NUM_SYMBOLS), text[:, ::-1]], 1)
    targets = np.full_like(whole[:, :-1], NO_TARGET)
    targets[:, half:] = whole[:, half + 1 :]
    return whole[:, :-1], targets


def recall(rng: np.random.Generator, rows: int, length: int) -> tuple[Array, Array]:
    """Return tokens and targets ``[rows, length]``; keys 0..K-1 each once, values behind them, separator last."""
    num_pairs = max(1, length // (2 * SHARE_OF_PAIRS))
    num_keys = recall_keys(length)
    keys = rng.permuted(np.tile(np.arange(num_keys), (rows, 1)), axis=1)[:, :num_pairs]
    values = num_keys + rng.integers(0, NUM_SYMBOLS, (rows, num_pairs))
    asked = rng.integers(0, num_pairs, (rows, (length - 2 * num_pairs - 1) // 2))
    definitions = np.stack([keys, values], 2).reshape(rows, -1)
    questions = np.stack([np.take_along_axis(keys, asked, 1), np.take_along_axis(values, asked, 1)], 2).reshape(
        rows, -1
    )
    separator = np.full((rows, 1), num_keys + NUM_SYMBOLS)
    tokens = np.concatenate([definitions, separator, questions], 1)
    targets = np.full_like(tokens, NO_TARGET)
    first = definitions.shape[1] + 1
    targets[:, first::2] = tokens[:, first + 1 :: 2]
    return tokens, targets


def recall_keys(length: int) -> int:
    """Return how many keys there are to choose from: twice as many as a sequence has pairs."""
    return 2 * max(1, length // (2 * SHARE_OF_PAIRS))


def stacks(rng: np.random.Generator, rows: int, length: int) -> tuple[Array, Array]:
    """Return tokens and targets ``[rows, length]``; elements 0..63, stacks 64..127, PUSH 128, POP 129."""
    steps = length // 3
    everyone = np.arange(rows)
    contents = np.zeros((rows, NUM_STACKS, steps), dtype=np.int64)
    depth = np.zeros((rows, NUM_STACKS), dtype=np.int64)
    tokens = np.empty((rows, steps, 3), dtype=np.int64)
    targets = np.full_like(tokens, NO_TARGET)
    for step in range(steps):
        # Of the stacks that hold something, one at random; of all of them for a push.
        full = rng.random((rows, NUM_STACKS)) * (depth > 0)
        pops = (rng.random(rows) < 0.5) & (depth.sum(1) > 0)  # noqa: PLR2004 - as many pops as pushes
        stack = np.where(pops, full.argmax(1), rng.integers(0, NUM_STACKS, rows))
        place = np.where(pops, depth[everyone, stack] - 1, depth[everyone, stack])
        element = np.where(pops, contents[everyone, stack, place], rng.integers(0, NUM_SYMBOLS, rows))
        contents[everyone, stack, place] = element
        depth[everyone, stack] += np.where(pops, -1, 1)
        tokens[:, step] = np.stack([np.where(pops, 129, 128), NUM_SYMBOLS + stack, element], 1)
        targets[:, step, 1] = np.where(pops, element, NO_TARGET)
    return tokens.reshape(rows, -1), targets.reshape(rows, -1)


@dataclass(frozen=True)
class SyntheticTask:
    """A source of one task's sequences.

    Attributes
    ----------
    name
        ``palindrome``, ``recall`` or ``stacks``.
    length
        Tokens of a sequence, at most: a task leaves off what it cannot fill.
    rows
        Sequences of a step.
    seed
        Of all of them.
    """

    name: str
    length: int
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the name and the length."""
        if self.name not in TASKS:
            message = f"task must be one of {', '.join(TASKS)}, got {self.name!r}; choose one"
            raise DomainError(message)
        if self.length < SHORTEST:
            message = f"length must be at least {SHORTEST} tokens, got {self.length}; a task needs room to ask"
            raise DomainError(message)

    @property
    def vocab_size(self) -> int:
        """Return the number of different tokens."""
        return {"palindrome": NUM_SYMBOLS + 1, "recall": recall_keys(self.length) + NUM_SYMBOLS + 1, "stacks": 130}[
            self.name
        ]

    def batch(self, step: int, device: torch.device) -> Batch:
        """Return the sequences of a step."""
        tokens, targets = _draw(self.name, self.rows, self.length, self.seed, step)
        return Batch(_tensor(tokens, device), _tensor(targets, device))


@lru_cache(maxsize=RECENT)
def _draw(name: str, rows: int, length: int, seed: int, step: int) -> tuple[Array, Array]:
    return TASKS[name](np.random.default_rng((seed, step)), rows, length)


def _tensor(x: Array, device: torch.device) -> Tensor:
    found = torch.from_numpy(np.ascontiguousarray(x))
    # From pinned memory, or the copy would wait for the steps before.
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.clone()


SHORTEST = 8
TASKS: dict[str, Callable[[np.random.Generator, int, int], tuple[Array, Array]]] = {
    "palindrome": palindrome,
    "recall": recall,
    "stacks": stacks,
}

"""Text as bytes: documents packed into one row, each predicting its own next byte and, at its end, that it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from kda_reference.errors import DomainError

from kda_model.packing import Packing
from kda_model.training.batches import Batch

if TYPE_CHECKING:
    from pathlib import Path

END, BEGIN = 256, 257


def read_documents(path: Path) -> tuple[bytes, ...]:
    """Return the documents of a file: what blank lines separate.

    Raises
    ------
    DomainError
        If there is none.
    """
    documents = tuple(part for part in path.read_bytes().split(b"\n\n") if part.strip())
    if not documents:
        message = f"text must hold at least one document, got none in {path}; separate documents by blank lines"
        raise DomainError(message)
    return documents


@dataclass(frozen=True)
class ByteText:
    """A source of packed documents, drawn at random.

    Attributes
    ----------
    documents
        Of at least one byte each.
    num_tokens
        Of a step; the last document is cut to fill the row exactly.
    longest
        Tokens of a document at most; longer ones are entered at a random place.
    seed
        Of all draws.
    """

    documents: tuple[bytes, ...]
    num_tokens: int
    longest: int
    seed: int = 0
    vocab_size: int = 258

    def batch(self, step: int, device: torch.device) -> Batch:
        """Return the documents of a step."""
        rng = np.random.default_rng((self.seed, step))
        tokens, targets, lengths = list[int](), list[int](), list[int]()
        while len(tokens) < self.num_tokens:
            document = self.documents[rng.integers(len(self.documents))]
            start = int(rng.integers(max(1, len(document) - self.longest + 2)))
            text = [BEGIN, *document[start:], END] if start == 0 else [*document[start:], END]
            length = min(self.longest, self.num_tokens - len(tokens), len(text) - 1)
            tokens += text[:length]
            targets += text[1 : length + 1]
            lengths.append(length)
        row = torch.tensor([tokens], device=device)
        return Batch(row, torch.tensor([targets], device=device), Packing(tuple(lengths), device))

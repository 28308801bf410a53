"""Decoding as one CUDA graph: a token for every sequence of a cache, without a launch from the host in between.

Everything that a step reads or writes keeps its place: the cache's states and tails are updated where they are, pages are reserved
beforehand, and the place of a new token is computed on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kda_reference.errors import DeviceError, DomainError

if TYPE_CHECKING:
    from torch import Tensor

    from kda_model.cache import Cache
    from kda_model.model import KimiLinear

WARM_UP_STEPS = 3


class DecodeGraph:
    """Decodes the sequences of one cache, up to ``capacity`` tokens each.

    Parameters
    ----------
    model
        On a CUDA device.
    cache
        The sequences; must not be forked, trimmed or extended otherwise while the graph is used.
    capacity
        Tokens for which pages are reserved.

    Raises
    ------
    DeviceError
        If the model is not on a CUDA device.
    """

    def __init__(self, model: KimiLinear, cache: Cache, capacity: int) -> None:
        if model.device.type != "cuda":
            message = (
                f"model must be on a CUDA device to record a graph, got {model.device}; decode with generate() instead"
            )
            raise DeviceError(message)
        self.cache, self.remaining = cache, capacity
        self._tokens = torch.zeros(cache.num_sequences, 1, dtype=torch.int64, device=model.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            # Kernels are compiled, and tables copied, by steps of another cache of the same shape.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                trial = cache.fork()
                for _ in range(WARM_UP_STEPS):
                    model(self._tokens, cache=trial)
            torch.cuda.current_stream().wait_stream(stream)
            del trial
            cache.reserve(capacity)
            self._pool = cache.pages.pool
            with torch.cuda.graph(self._graph):
                self._logits: Tensor = model(self._tokens, cache=cache)[:, 0]
            cache.count(-1)  # recording has executed nothing

    def step(self, tokens_N: Tensor) -> Tensor:
        """Add one token to each sequence and return the logits ``[N, vocabulary]``, which the next step overwrites.

        Raises
        ------
        DomainError
            If the reserved tokens are used up, or the cache's pages have moved.
        """
        if not self.remaining:
            message = "capacity must cover every step, got one more; record another graph"
            raise DomainError(message)
        if self.cache.pages.pool is not self._pool:
            message = "cache must keep its pages while a graph is used, got new ones; record another graph"
            raise DomainError(message)
        self._tokens.copy_(tokens_N[:, None])
        self._graph.replay()
        self.cache.count(1)
        self.remaining -= 1
        return self._logits

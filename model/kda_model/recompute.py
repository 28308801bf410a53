"""Activation checkpointing runs a layer twice; what a layer counts must count once."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from kda_model.experts import Router

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import nn


def without_counting_twice(
    layer: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the contexts of ``torch.utils.checkpoint`` in which the layer runs first and again."""
    routers = [module for module in layer.modules() if isinstance(module, Router)]

    @contextmanager
    def again() -> Iterator[None]:
        for router in routers:
            router.recomputing = True
        try:
            yield
        finally:
            for router in routers:
                router.recomputing = False

    return lambda: (nullcontext(), again())

"""Every entry of the catalogue as an attribute: ``--impl kda_conformance.planted.bugs:G05`` is judged like any implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kda_conformance.planted.planting import catalogue, variants

if TYPE_CHECKING:
    from collections.abc import Callable


def __getattr__(name: str) -> Callable[..., Any]:
    entry = {**variants(), **catalogue()}.get(name)
    if entry is None:
        message = f"the catalogue has no entry {name!r}"
        raise AttributeError(message)
    return entry.function()

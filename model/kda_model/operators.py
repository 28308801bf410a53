"""Where the operator comes from: the one seam between the model and whoever computes Kimi Delta Attention.

An operator is two functions with the signature of ``fla.ops.kda``: one for many tokens (``chunk_kda``), one for a single token
(``fused_recurrent_kda``). This is the only module that knows implementations; layers only call what they are given.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from kda_reference.chunkwise import chunkwise_kda
from kda_reference.contract import KdaInputs
from kda_reference.differentiable import differentiable_kda
from kda_reference.errors import DomainError
from torch import Tensor

# Arguments and results are those of kda_reference.KdaInputs, every one after ``beta`` by name.
KdaFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
# ``x [B, T, D]`` and taps ``[D, W]`` to SiLU of the causal convolution ``[B, T, D]``, and what is of no use here.
Convolution: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Operator:
    """An implementation under a name.

    Attributes
    ----------
    name
        As it is asked for and printed.
    many
        For calls of any length; differentiable where the model is to be trained.
    one
        For calls of one token a sequence, without a gradient.
    convolution
        The short convolution with SiLU, for whole rows that continue nothing; ``None`` means torch's, as everywhere else.
    """

    name: str
    many: KdaFunction
    one: KdaFunction
    convolution: Convolution | None = None


OperatorLike: TypeAlias = Operator | KdaFunction | str | None


def find_operator(which: OperatorLike, device: torch.device) -> Operator:
    """Return an operator.

    Parameters
    ----------
    which
        ``"triton"``; ``"torch"``, the chunkwise form; ``"reference"``, the float64 recurrence; ``package.module:callable`` or
        ``path/to/file.py:callable``; a callable; an :class:`Operator`; ``None`` means Triton on CUDA and torch elsewhere.
    device
        Where the model lives.

    Raises
    ------
    DomainError
        If a name means nothing or cannot be loaded.
    """
    if isinstance(which, Operator):
        return which
    if which is None:
        which = "triton" if device.type == "cuda" else "torch"
    if not isinstance(which, str):
        return Operator(getattr(which, "__name__", repr(which)), which, which)
    if which == "triton":
        import kda_optimized  # noqa: PLC0415 - loads Triton, which not everyone wants

        return Operator(
            which, kda_optimized.chunk_kda, kda_optimized.fused_recurrent_kda, kda_optimized.short_convolution
        )
    if which == "torch":
        return Operator(which, _chunkwise, _chunkwise)
    if which == "reference":
        return Operator(which, _reference, _reference)
    function = _load(which)
    return Operator(which, function, function)


def _chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,  # noqa: ANN401 - the contract's
) -> tuple[Tensor, Tensor | None]:
    """Run the chunkwise form in float32, or float64 for float64 inputs, with chunks no longer than the call."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    chunk = min(options.pop("chunk_size", 64), max(q.shape[1], 1))
    return chunkwise_kda(q, k, v, g, beta, dtype=dtype, chunk_size=chunk, **options)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,  # noqa: ANN401 - as above
) -> tuple[Tensor, Tensor | None]:
    """Run the float64 recurrence under autograd, and round its results to the dtypes of the contract."""
    o, state = differentiable_kda(KdaInputs(q=q, k=k, v=v, g=g, beta=beta, **options))
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return o.to(v.dtype), state.to(state_dtype) if options.get("output_final_state") else None


@cache
def _load(which: str) -> KdaFunction:
    place, _, name = which.rpartition(":")
    if not place or not name:
        message = (
            f"operator must be triton, torch, reference, package.module:callable or path/to/file.py:callable, got {which!r}; "
            "name one of them"
        )
        raise DomainError(message)
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None  # noqa: S101 - a path that ends in .py has a loader
            assert spec.loader is not None  # noqa: S101 - likewise
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function: KdaFunction = getattr(module, name)
    except (ImportError, OSError, AttributeError) as cause:
        message = f"operator must be loadable, got {which!r} with {type(cause).__name__}: {cause}; correct the place or the name"
        raise DomainError(message) from cause
    if not callable(function):
        message = f"operator must be callable, got {type(function).__name__} at {which!r}; name a function"
        raise DomainError(message)
    return function

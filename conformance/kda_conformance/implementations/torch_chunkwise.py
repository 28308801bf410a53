"""The chunkwise form in plain torch, computing in the dtype of its claims."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from kda_reference import chunkwise_kda

from kda_conformance import __version__
from kda_conformance.claims import Claims, narrow
from kda_conformance.implementation import FunctionImplementation

if TYPE_CHECKING:
    from torch import Tensor


class TorchChunkwise(FunctionImplementation):
    """float64 where the inputs are float64, float32 arithmetic for every other input dtype."""

    def __init__(self) -> None:
        super().__init__(_chunkwise, "torch-chunkwise", __version__)
        precision = {"float64": "fp64", "float32": "fp32", "bfloat16": "fp32"}
        self.claims = narrow(Claims(), {"precision": precision}, self.name)


def _chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,  # noqa: ANN401 - the public keywords
) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return chunkwise_kda(q, k, v, g, beta, dtype=dtype, **options)

"""The torch fallbacks of ``transformers`` (>= 5.23), implementations nobody here wrote.

Where ``fla-core`` is installed, ``transformers`` calls its kernels under these names; what is judged here is the torch form behind them.
They compute in float32 whatever the input dtype. They take neither packing, grouped values, a scale, nor the gate and beta activations;
those are not claimed.
"""

from __future__ import annotations

from importlib.metadata import version
from inspect import unwrap
from typing import TYPE_CHECKING, Any

from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear

from kda_conformance.claims import narrow
from kda_conformance.implementation import FunctionImplementation

if TYPE_CHECKING:
    from torch import Tensor

UNCLAIMED = {
    "packed": False,
    "grouped_values": False,
    "scale": False,
    "state_v_first": False,
    "gate_in_kernel": False,
    "bounded_gate": False,
    "beta_sigmoid_in_kernel": False,
    "empty": False,
    "checks_arguments": False,
    "precision": {"float32": "fp32", "bfloat16": "fp32"},
}


class TransformersChunk(FunctionImplementation):
    """``chunk_kimi_delta_attention``."""

    def __init__(self) -> None:
        super().__init__(_chunk, "transformers-chunk", version("transformers"))
        self.claims = narrow(self.claims, {**UNCLAIMED, "chunk_size": True}, self.name)


class TransformersRecurrent(FunctionImplementation):
    """``recurrent_kimi_delta_attention``."""

    def __init__(self) -> None:
        super().__init__(_recurrent, "transformers-recurrent", version("transformers"))
        self.claims = narrow(self.claims, UNCLAIMED, self.name)


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    return unwrap(kimi_linear.chunk_kimi_delta_attention)(q, k, v, g=g, beta=beta, **options)  # type: ignore[no-any-return]


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,  # noqa: ANN401 - the public keywords
) -> tuple[Tensor, Tensor | None]:
    options.setdefault("initial_state", None)
    return unwrap(kimi_linear.recurrent_kimi_delta_attention)(q, k, v, g, beta, **options)  # type: ignore[no-any-return]

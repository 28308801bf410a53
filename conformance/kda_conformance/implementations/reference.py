"""The float64 recurrence itself, as an implementation: what the suite says of it tests the suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kda_reference

from kda_conformance import __version__
from kda_conformance.claims import Claims

if TYPE_CHECKING:
    from kda_reference import KdaGradients, KdaInputs, KdaResult
    from torch import Tensor


class Reference:
    """The explicit recurrence and its reverse in float64."""

    name = "reference"
    version = __version__
    claims = Claims(precision={"float64": "fp64"})

    def forward(self, inputs: KdaInputs) -> KdaResult:
        """Evaluate the call."""
        kda_reference.check_inputs(inputs)
        return kda_reference.recurrent_kda(inputs)

    def vjp(self, inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[KdaResult, KdaGradients]:
        """Evaluate the call and its gradients by the reverse recurrence."""
        kda_reference.check_inputs(inputs)
        return kda_reference.recurrent_kda_vjp(inputs, do, dfinal_state)

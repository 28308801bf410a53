"""Two other operators of ``fla-core``, timed beside KDA and never judged: the general DPLR recurrence and Gated DeltaNet (GDN).

Both get activations that are already applied where they cannot apply them, which is in their favour.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule
from kda_reference.activations import apply_activations

if TYPE_CHECKING:
    from collections.abc import Callable

    from kda_reference import KdaInputs


def _version() -> str:
    return version("fla-core")


class FlaDplr:
    """``chunk_dplr_delta_rule`` on the operands that make it KDA: ``a = k exp(g)`` reads, ``b = -beta k`` erases."""

    name, operator = "fla-dplr", "DPLR"

    def __init__(self) -> None:
        self.version = _version()

    def prepare(self, inputs: KdaInputs) -> Callable[[], object]:
        """Return the forward call."""
        operands = apply_activations(inputs, torch.float32)
        write, read = operands.beta[..., None] * operands.k, operands.k * operands.log_decay.exp()
        arguments = operands.q, write, operands.v, read, -write, operands.log_decay
        return partial(
            chunk_dplr_delta_rule,
            *(argument.to(inputs.q.dtype) for argument in arguments),
            initial_state=inputs.initial_state,
            output_final_state=True,
            safe_gate=inputs.safe_gate,
            lower_bound=inputs.lower_bound,
        )


class FlaGdn:
    """``chunk_gated_delta_rule`` with one decay a head, the mean over the channels."""

    name, operator = "fla-gdn", "GDN"

    def __init__(self) -> None:
        self.version = _version()

    def prepare(self, inputs: KdaInputs) -> Callable[[], object]:
        """Return the forward call."""
        decay = apply_activations(inputs, torch.float32).log_decay.mean(-1)
        return partial(
            chunk_gated_delta_rule,
            inputs.q,
            inputs.k,
            inputs.v,
            decay,
            inputs.beta,
            initial_state=inputs.initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )

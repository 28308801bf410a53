"""The recurrence as a differentiable function, for models whose gradient is wanted in float64.

It is the generator of :mod:`kda_reference.recurrence` under autograd, so its gradient is derived a second time,
independently of the reverse recurrence of :mod:`kda_reference.adjoint`; a test compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kda_reference.activations import Operands, apply_activations
from kda_reference.contract import check_inputs
from kda_reference.packing import SideBySide, call_layout, initial_state
from kda_reference.recurrence import recurrence

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.contract import KdaInputs


def differentiable_kda(inputs: KdaInputs) -> tuple[Tensor, Tensor]:
    """Evaluate a call by the recurrence, keeping what autograd needs.

    Parameters
    ----------
    inputs
        The arguments of the call; any of its tensors may require a gradient.

    Returns
    -------
    tuple[Tensor, Tensor]
        ``o`` and the final state, float64, equal bit for bit to those of :func:`kda_reference.recurrent_kda`.

    Raises
    ------
    KdaError
        If the arguments contradict the contract.

    Notes
    -----
    Cost O(T K V) per head in time and in memory.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    check_inputs(inputs)
    packing = SideBySide(inputs)
    x = Operands(*(packing.spread(operand) for operand in apply_activations(inputs)))
    state, outputs = initial_state(inputs), list[torch.Tensor]()
    for step in recurrence(x, state, inputs.effective_scale):
        state = step.state
        outputs.append(step.output)
    o = torch.stack(outputs, 2) if outputs else x.v
    return packing.gather(o), call_layout(inputs, state)

"""The recurrence and its gradient with rigorous bounds of their own rounding errors: the ground truth certifies itself.

The bounds run beside the recurrence (:mod:`kda_reference.recurrence_bounds`) and then through the activations
(:mod:`kda_reference.activation_bounds`). They hold against exact arithmetic on the very numbers of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kda_reference.activation_bounds import (
    UNDERFLOW,
    UNIT,
    InputErrors,
    input_errors,
    pull_back_bounds,
    pull_back_norms,
)
from kda_reference.activations import Operands, apply_activations
from kda_reference.adjoint import reverse_recurrence, spread_cotangents, store
from kda_reference.contract import KdaInputs, check_inputs
from kda_reference.errors import CertificateError
from kda_reference.packing import SideBySide, call_layout, initial_state
from kda_reference.pullback import pull_back
from kda_reference.recurrence import recurrence
from kda_reference.recurrence_bounds import Factors, ForwardBounds, factors, forward_bounds, reverse_bounds

if TYPE_CHECKING:
    from torch import Tensor

GRADIENT_NAMES = {
    "q": "dq",
    "k": "dk",
    "v": "dv",
    "g": "dg",
    "beta": "dbeta",
    "A_log": "dA_log",
    "dt_bias": "ddt_bias",
    "initial_state": "dinitial_state",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """float64 results with a bound of their own error, by tensor name.

    Names are ``o`` and ``final_state``, and for the inputs that were given ``dq, dk, dv, dg, dbeta, dA_log, ddt_bias,
    dinitial_state``.

    Attributes
    ----------
    value
        What :func:`recurrent_kda` and :func:`recurrent_kda_vjp` return; ``final_state`` whether asked for or not.
    bound
        At least the distance of ``value`` from the exact result, per element.
    dot_norm
        Root of the sum of squares of the terms of the last dot product behind each gradient, zero for other tensors; empty unless
        asked for.
    """

    value: dict[str, Tensor]
    bound: dict[str, Tensor]
    dot_norm: dict[str, Tensor]

    def demand(self, name: str, allowed: float) -> None:
        """Refuse a result whose bound is too wide for the judgement at hand.

        Parameters
        ----------
        name
            The tensor's name.
        allowed
            The largest error that the reference may have in any element.

        Raises
        ------
        CertificateError
            If the bound of some element is larger, or is not a number; names the element.
        """
        bound = self.bound[name]
        if bound.numel() and not bool((bound <= allowed).all()):
            index = tuple(
                int(i) for i in torch.unravel_index((~(bound <= allowed)).flatten().int().argmax(), bound.shape)
            )
            message = (
                f"{name} of the reference must be certified within {allowed:.3g} to judge an implementation, got the bound "
                f"{bound[index].item():.3g} at index {index}; keep keys at unit length, or shorten the sequence"
            )
            raise CertificateError(message)


class _Forward:
    """One forward pass with everything the reverse pass needs, sequences side by side."""

    def __init__(self, inputs: KdaInputs, *, keep: bool) -> None:
        check_inputs(inputs)
        self.inputs, self.packing = inputs, SideBySide(inputs)
        self.x = Operands(*(self.packing.spread(operand) for operand in apply_activations(inputs)))
        found = input_errors(inputs)
        errors = InputErrors(found.qk, found.beta, self.packing.spread(found.log_decay))
        self.factors: Factors = factors(self.x, inputs.effective_scale, errors)
        self.states, self.errors = [initial_state(inputs)], list[torch.Tensor]()
        self.outputs = torch.empty_like(self.x.v)
        self.bounds = ForwardBounds(*(torch.empty_like(self.x.v) for _ in range(3)))
        steps = recurrence(self.x, self.states[0], inputs.effective_scale)
        for t, group, bound in forward_bounds(self.factors, steps):
            self.outputs[:, :, t] = torch.stack([step.output for step in group], 2)
            for tensor, part in zip(self.bounds, bound, strict=True):
                tensor[:, :, t] = part
            if not keep:
                self.states.clear()
            self.states += [step.state for step in group]
            self.errors += [step.error for step in group]

    def certified(self) -> Certified:
        """Return the outputs, with bounds that are not inflated yet."""
        state, num_tokens = self.states[-1], self.x.v.shape[2]
        state_bound = self.bounds.state[:, :, -1, None, :].expand_as(state) if num_tokens else torch.zeros_like(state)
        value = {"o": self.packing.gather(self.outputs), "final_state": call_layout(self.inputs, state)}
        bound = {"o": self.packing.gather(self.bounds.output), "final_state": call_layout(self.inputs, state_bound)}
        return Certified(value=value, bound=bound, dot_norm={})

    def inflated(self, bound: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cover the rounding of the bounds themselves, and their terms of second order.

        A bound is a sum of products of non-negative numbers, so its own error is relative: fewer than
        ``16 (K + V + 64)`` units per token.
        """
        num_tokens, k_width, v_width = self.x.v.shape[2], self.x.k.shape[3], self.x.v.shape[3]
        factor = 1 + 1e-8 + 16 * UNIT * (num_tokens + 1) * (k_width + v_width + 64)
        return {name: x * factor + UNDERFLOW for name, x in bound.items()}


@torch.no_grad()
def certified_kda(inputs: KdaInputs) -> Certified:
    """Evaluate a call and bound the evaluation's error.

    Parameters
    ----------
    inputs
        The arguments of the call; magnitudes below 1e30.

    Returns
    -------
    Certified
        ``o`` and ``final_state``.

    Raises
    ------
    KdaError
        If the arguments contradict the contract.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    forward = _Forward(inputs, keep=False)
    found = forward.certified()
    return Certified(value=found.value, bound=forward.inflated(found.bound), dot_norm={})


@torch.no_grad()
def certified_kda_vjp(
    inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None = None, *, dot_norms: bool = False
) -> Certified:
    """Evaluate a call and its gradients, and bound the error of both.

    Parameters
    ----------
    inputs
        The arguments of the call; magnitudes below 1e30.
    do, dfinal_state
        Cotangents, as in :func:`kda_reference.recurrent_kda_vjp`.
    dot_norms
        Whether ``dot_norm`` is wanted too; it costs as much as half of the bounds.

    Returns
    -------
    Certified
        ``o``, ``final_state`` and the gradient of every input that was given.

    Raises
    ------
    KdaError
        If the arguments contradict the contract, or a cotangent has another shape than its result.

    Notes
    -----
    Cost below three times that of :func:`kda_reference.recurrent_kda_vjp`, memory the same; measured in ``docs/numerics.md``.

    References
    ----------
    [KL] Kimi Linear technical report, Eq. (1).
    """
    run = _Forward(inputs, keep=True)
    do_NGTV, cotangent = spread_cotangents(inputs, run.packing, do, dfinal_state)
    gradients, bounds, norms = (Operands(*(torch.empty_like(operand) for operand in run.x)) for _ in range(3))
    cotangent_bound = torch.zeros_like(cotangent[..., 0, :])
    steps = reverse_recurrence(run.x, run.states, run.errors, do_NGTV, cotangent, inputs.effective_scale)
    bounded = reverse_bounds(
        run.factors, run.x, run.states, run.errors, run.bounds, do_NGTV, steps, dot_norms=dot_norms
    )
    for t, group, fresh in bounded:
        parts = (
            Operands(*(torch.stack(x, 2) for x in zip(*(step.gradients for step in group), strict=True))),
            fresh.gradients,
            fresh.norms,
        )
        for total, part in zip((gradients, bounds, norms), parts, strict=True):
            if part is not None:
                store(total, t, part)
        cotangent, cotangent_bound = group[0].next_cotangent, fresh.cotangent
    operator, operator_bound, operator_norm = (
        Operands(*(run.packing.gather(tensor) for tensor in group)) for group in (gradients, bounds, norms)
    )
    found = run.certified()
    value, bound_by_name = found.value, found.bound
    value |= _named(pull_back(inputs, operator))
    bound_by_name |= _named(pull_back_bounds(inputs, operator, operator_bound))
    if inputs.initial_state is not None:
        value["dinitial_state"] = call_layout(inputs, cotangent)
        bound_by_name["dinitial_state"] = call_layout(inputs, cotangent_bound[..., None, :].expand_as(cotangent))
    dot_norm = {name: torch.zeros_like(x) for name, x in value.items()} if dot_norms else {}
    if dot_norms:
        dot_norm |= _named(pull_back_norms(inputs, operator, operator_norm))
    return Certified(value=value, bound=run.inflated(bound_by_name), dot_norm=dot_norm)


def _named(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {GRADIENT_NAMES[name]: gradient for name, gradient in gradients.items()}

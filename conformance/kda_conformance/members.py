"""Run ensemble members on one call: outputs, input gradients, and the operator gradients behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kda_reference.packing import SideBySide

from kda_conformance import ensemble
from kda_conformance.ensemble import NoisyFloat32, Operands
from kda_conformance.rounding import Exact, Rounder

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor

    from kda_conformance.arithmetic import Arithmetic

NUM_RECURRENCES = 6
FIRST_SEED = 900
SMALLEST_DOUBLE = 2.0**-1022
GRADIENT_OF = {
    "q": "dq",
    "k": "dk",
    "v": "dv",
    "g": "dg",
    "beta": "dbeta",
    "A_log": "dA_log",
    "dt_bias": "ddt_bias",
    "initial_state": "dinitial_state",
}


class Members:
    """One call and its cotangents, ready to be evaluated by any number of members.

    Attributes
    ----------
    backward
        Whether a cotangent was given, and gradients are wanted.
    exact_operands
        The operator's variables without rounding, ``[1, B, T, heads, ...]``; set by :meth:`recurrences`.
    operator_gradients
        Gradients of normalised q and k per value head, ``[R, B, T, G, K]``, one pair per group of members.
    """

    def __init__(self, inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None) -> None:
        self.inputs = inputs
        self.packing = SideBySide(inputs, num_leading=1)
        self.do = None if do is None else do.double()
        self.dfinal_state = None if dfinal_state is None else dfinal_state.double()
        self.backward = do is not None or dfinal_state is not None
        self.exact_operands: Operands | None = None
        self.operator_gradients: list[tuple[Tensor, Tensor]] = []

    def leaves(self, count: int) -> dict[str, Tensor]:
        """Return every input in float64, once per member, as leaves of the derivative graph."""
        return {
            name: tensor.detach().double()[None].expand(count, *tensor.shape).clone().requires_grad_(self.backward)
            for name, tensor in self.inputs.tensors().items()
        }

    def chunkwise(self, rounder: Rounder, arithmetic: Arithmetic, chunk: int) -> dict[str, Tensor]:
        """Run ``rounder.count`` members of the chunkwise form."""
        leaves = self.leaves(rounder.count)
        operands = ensemble.activate(leaves, self.inputs, rounder, arithmetic.storage)
        spread = Operands(*(self.packing.spread(x) for x in operands))
        o, final = ensemble.chunkwise_member(
            spread,
            self._state(leaves, rounder.count),
            rounder=rounder,
            arithmetic=arithmetic,
            chunk=chunk,
            scale=self.inputs.effective_scale,
        )
        return self._collect(leaves, operands, o, final)

    def recurrences(self) -> dict[str, Tensor]:
        """Run the noisy recurrences, and as last member an exact one whose gate is systematically off."""
        count, device = NUM_RECURRENCES + 1, self.inputs.q.device
        levels = torch.ones(count, dtype=torch.float64, device=device)
        levels[-1] = 0
        leaves = self.leaves(count)
        operands = ensemble.activate(leaves, self.inputs, Exact(), "fp32")
        self.exact_operands = Operands(*(x.detach()[:1] for x in operands))
        shift = ensemble.gate_uncertainty(leaves, self.inputs, operands.log_decay).detach()
        shifted = operands.log_decay - shift * (1 - levels).reshape(-1, 1, 1, 1, 1)
        spread = Operands(*(self.packing.spread(x) for x in operands._replace(log_decay=shifted)))
        decay = spread.log_decay.detach().exp()
        rounded = Rounder(0, count, device).raw(decay, "fp32") / decay.clamp(min=SMALLEST_DOUBLE)
        exp_noise = torch.where(levels.reshape(-1, 1, 1, 1, 1) > 0, rounded, torch.ones_like(rounded))
        o, final = ensemble.recurrence_member(
            spread,
            self._state(leaves, count),
            noise=NoisyFloat32(levels, seed=FIRST_SEED),
            exp_noise=exp_noise,
            scale=self.inputs.effective_scale,
        )
        return self._collect(leaves, operands, o, final)

    def _state(self, leaves: dict[str, Tensor], count: int) -> Tensor:
        """Return the initial states ``[R, N, G, K, V]``."""
        initial = leaves.get("initial_state")
        if initial is not None:
            return initial.transpose(-1, -2) if self.inputs.state_v_first else initial
        heads, k_width, v_width = self.inputs.v.shape[2], self.inputs.k.shape[3], self.inputs.v.shape[3]
        shape = (count, self.inputs.num_sequences, heads, k_width, v_width)
        return torch.zeros(shape, dtype=torch.float64, device=self.inputs.q.device)

    def _collect(self, leaves: dict[str, Tensor], operands: Operands, o: Tensor, final: Tensor) -> dict[str, Tensor]:
        if self.inputs.state_v_first:
            final = final.transpose(-1, -2)
        found = {"o": self.packing.gather(o).detach(), "final_state": final.detach()}
        if not self.backward:
            return found
        loss = torch.zeros((), dtype=torch.float64, device=o.device)
        if self.do is not None:
            loss = loss + (o * self.packing.spread(self.do[None])).sum()
        if self.dfinal_state is not None:
            loss = loss + (final * self.dfinal_state).sum()
        targets = [*leaves.values(), operands.q, operands.k]
        if not loss.requires_grad:  # no tokens and no initial state: nothing the loss depends on
            gradients: tuple[Tensor, ...] = tuple(torch.zeros_like(target) for target in targets)
        else:
            gradients = torch.autograd.grad(loss, targets, allow_unused=True, materialize_grads=True)
        found |= {GRADIENT_OF[name]: gradient for name, gradient in zip(leaves, gradients, strict=False)}
        self.operator_gradients.append((gradients[-2], gradients[-1]))
        return found

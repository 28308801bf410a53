"""AdamW and Muon on float32 masters of any model's parameters.

A 16-bit parameter cannot take an update smaller than half its last place, so the optimiser steps on a float32 copy and rounds.
Muon orthogonalises matrices: the stacked matrices of experts are given to it one by one. It takes the matrices inside the layers;
embeddings, output, convolutions, gates and norms take AdamW, the last two without weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.errors import DomainError

from kda_model.model import stays_float32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from kda_model.model import KimiLinear

OPTIMISERS = ("adamw", "muon")


@dataclass(frozen=True)
class Master:
    """What the optimiser steps on, and the parameter, or the part of one, that follows it."""

    leaf: Tensor
    parameter: nn.Parameter
    part: int | None

    def take_gradient(self) -> None:
        """Give the parameter's gradient to the leaf."""
        gradient = self.parameter.grad
        if gradient is not None:
            self.leaf.grad = (gradient if self.part is None else gradient[self.part]).to(self.leaf.dtype)

    def follow(self) -> None:
        """Round the leaf into the parameter; where they share memory there is nothing to do."""
        target = self.parameter.data if self.part is None else self.parameter.data[self.part]
        if target.data_ptr() != self.leaf.data_ptr():
            target.copy_(self.leaf)


class Optimiser:
    """Steps all parameters of a model.

    Parameters
    ----------
    model
        Whose parameters have their final dtype and device.
    name
        ``adamw`` or ``muon``.
    weight_decay
        Of what decays, per step and learning rate.
    """

    def __init__(self, model: KimiLinear, name: str = "adamw", weight_decay: float = 0.1) -> None:
        if name not in OPTIMISERS:
            message = f"optimiser must be one of {', '.join(OPTIMISERS)}, got {name!r}; choose one"
            raise DomainError(message)
        kinds: dict[str, list[Master]] = {"matrix": [], "decayed": [], "kept": []}
        for parameter_name, parameter in model.named_parameters():
            kind = _kind(parameter_name, parameter, name)
            kinds[kind] += _masters(parameter, split=kind == "matrix")
        self.masters = [master for group in kinds.values() for master in group]
        leaves = {kind: [master.leaf for master in group] for kind, group in kinds.items()}
        adamw = [
            {"params": leaves["decayed"], "weight_decay": weight_decay},
            {"params": leaves["kept"], "weight_decay": 0.0},
        ]
        self._optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw, betas=(0.9, 0.95))]
        if leaves["matrix"]:
            muon = torch.optim.Muon(leaves["matrix"], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._optimisers.append(muon)

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float) -> float:
        """Make one step on the parameters' gradients, clipped together, and drop them; return their norm before."""
        for master in self.masters:
            master.take_gradient()
        norm = torch.nn.utils.clip_grad_norm_([master.leaf for master in self.masters], max_norm)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
            optimiser.step()
        for master in self.masters:
            master.follow()
            master.leaf.grad = master.parameter.grad = None
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Return what a step depends on besides the parameters."""
        return {
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "masters": [master.leaf.detach() for master in self.masters],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of ``state_dict``."""
        for optimiser, found in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(found)
        for master, leaf in zip(self.masters, state["masters"], strict=True):
            master.leaf.copy_(leaf)
            master.follow()


def _kind(name: str, parameter: nn.Parameter, optimiser: str) -> str:
    if stays_float32(name):
        return "kept"
    inside = "layers." in name and "conv1d" not in name and parameter.dim() > 1
    return "matrix" if inside and optimiser == "muon" else "decayed"


def _masters(parameter: nn.Parameter, *, split: bool) -> Iterator[Master]:
    wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    if split and parameter.dim() == 3:  # noqa: PLR2004 - experts, out, in
        for part in range(parameter.shape[0]):
            yield Master(wide[part], parameter, part)
    else:
        yield Master(wide, parameter, None)

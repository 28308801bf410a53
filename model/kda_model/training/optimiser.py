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
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from kda_model.model import KimiLinear

OPTIMISERS = ("adamw", "muon")


@dataclass(frozen=True)
class Master:
    """What the optimiser steps on, and the parameter, or the part of one, that follows it."""

    leaf: Tensor
    parameter: nn.Parameter
    part: int | None

    def take_gradient(self, factor: Tensor) -> None:
        """Give the parameter's gradient, times a factor, to the leaf."""
        gradient = self.parameter.grad
        if gradient is not None:
            part = gradient if self.part is None else gradient[self.part]
            self.leaf.grad = part.to(self.leaf.dtype) * factor.to(self.leaf.dtype)

    def follow(self) -> None:
        """Round the leaf into the parameter; where they share memory there is nothing to do."""
        target = self.parameter.data if self.part is None else self.parameter.data[self.part]
        if target.data_ptr() != self.leaf.data_ptr():
            target.copy_(self.leaf)


class Unit:
    """The masters of one layer, or of what is in no layer, and the optimisers that step them."""

    def __init__(self, weight_decay: float) -> None:
        self.masters: list[Master] = []
        self.optimisers: list[torch.optim.Optimizer] = []
        self._kinds: dict[str, list[Tensor]] = {"matrix": [], "decayed": [], "kept": []}
        self._weight_decay = weight_decay

    def add(self, kind: str, master: Master) -> None:
        """Take one master of a kind: ``matrix``, ``decayed`` or ``kept``."""
        self.masters.append(master)
        self._kinds[kind].append(master.leaf)

    def finish(self) -> None:
        """Make the optimisers, once all masters are there."""
        rates = {"decayed": self._weight_decay, "kept": 0.0}
        groups = [
            {"params": self._kinds[kind], "weight_decay": rate} for kind, rate in rates.items() if self._kinds[kind]
        ]
        if groups:
            # On a GPU in one launch, which reads the rate and counts the steps there, so that a graph can repeat it.
            on_device = all(master.leaf.is_cuda for master in self.masters)
            adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=on_device or None, capturable=on_device)
            self.optimisers.append(adamw)
        if self._kinds["matrix"]:
            muon = torch.optim.Muon(
                self._kinds["matrix"], weight_decay=self._weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimisers.append(muon)

    def step(self, learning_rate: float | Tensor, factor: Tensor) -> None:
        """Step on the gradients times a factor, and drop them."""
        for master in self.masters:
            master.take_gradient(factor)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
            optimiser.step()
        for master in self.masters:
            master.follow()
            master.leaf.grad = None


class Optimiser:
    """Steps all parameters of a model, a layer at a time, so that float32 gradients exist of one layer only.

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
        self._parameters = list(model.parameters())
        units: dict[str, Unit] = {}
        for parameter_name, parameter in model.named_parameters():
            layer = parameter_name.split(".")[2] if "layers." in parameter_name else ""
            unit = units.setdefault(layer, Unit(weight_decay))
            kind = _kind(parameter_name, parameter, name)
            for master in _masters(parameter, split=kind == "matrix"):
                unit.add(kind, master)
        self.units = list(units.values())
        for unit in self.units:
            unit.finish()

    @property
    def reads_nothing(self) -> bool:
        """Return whether a step is the device's work alone: AdamW on a GPU, where Muon has its rate read by the host."""
        optimisers = [optimiser for unit in self.units for optimiser in unit.optimisers]
        return all(optimiser.defaults.get("capturable", False) for optimiser in optimisers)

    def rates(self, values: Sequence[float]) -> Sequence[float | Tensor]:
        """Return learning rates as steps take them: on the device where its steps read nothing on the host."""
        if not self.reads_nothing:
            return values
        return (
            torch.tensor(values, dtype=torch.float32)
            .pin_memory()
            .to(self._parameters[0].device, non_blocking=True)
            .unbind()
        )

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, max_norm: float) -> Tensor:
        """Make one step on the parameters' gradients, clipped together, and drop them; return their norm before."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for unit in self.units:
            unit.step(learning_rate, factor)
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return what a step depends on besides the parameters."""
        return {
            "optimisers": [optimiser.state_dict() for unit in self.units for optimiser in unit.optimisers],
            "masters": [master.leaf.detach() for unit in self.units for master in unit.masters],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of ``state_dict``."""
        optimisers = [optimiser for unit in self.units for optimiser in unit.optimisers]
        for optimiser, found in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(found)
        masters = [master for unit in self.units for master in unit.masters]
        for master, leaf in zip(masters, state["masters"], strict=True):
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

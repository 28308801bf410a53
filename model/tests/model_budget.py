"""How far a correct float32 model may be from the float64 reference: a budget per element, from noisy runs of the reference.

A member of the ensemble is the reference model, forward and backward, with every arithmetic result perturbed as float32 would round
it: uniformly by up to half a unit in the last place, and for sums of n products by ``0.4 u sqrt(n / 2)`` times the root of the
sum of their squares. Half of the members compute the recurrence token by token, half by chunks. With ``e_r`` the error of member r,

    s^2 = (mean e_r^2 + its rank-one model over rows and columns) / 2

and a tensor passes when no element errs by more than ``10 s`` and no row of 16 or more by more than ``6 s`` in the root mean
square: the suite's own limits for one operator (docs/numerics.md).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import kda_reference.kda_layer
import torch
from kda_reference import KdaInputs, chunkwise_kda
from kda_reference.hybrid import float64_leaves, hybrid_model, next_token_loss
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest
    from torch import Tensor

UNIT = 2.0**-24
LIMIT, SLICE_LIMIT, SMALLEST_SLICE = 10.0, 6.0, 16
NUM_MEMBERS = 8
PRODUCTS = {"aten::mm", "aten::bmm"}
SUMS = {"aten::sum", "aten::mean"}
# Operations that only move, choose or compare values are exact.
EXACT = {
    f"aten::{name}"
    for line in (
        "view _unsafe_view reshape expand permute transpose t select slice unsqueeze squeeze split split_with_sizes unbind cat stack",
        "clone detach _to_copy alias empty zeros ones zeros_like ones_like empty_like new_zeros new_empty full_like full fill_ zero_",
        "copy_ index index_select gather scatter embedding masked_fill sort topk nonzero eq ne le lt ge gt where tril triu eye arange",
        "neg abs select_backward slice_backward embedding_dense_backward constant_pad_nd flip unfold lift_fresh item",
        "_local_scalar_dense unique_dim _unique2 bitwise_and bitwise_or bitwise_not logical_not isfinite any all diag_embed diagonal",
        "as_strided max min",
    )
    for name in line.split()
}


class Rounded(TorchDispatchMode):
    """Perturbs float64 results as rounding to float32 would."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and perturb what it computes."""
        out, name = func(*args, **(kwargs or {})), str(func.overloadpacket).replace(".", "::")
        if name in EXACT or name.endswith("_"):
            return out
        if not isinstance(out, torch.Tensor):
            return tuple(self._perturb(x, name, args) for x in out) if isinstance(out, (tuple, list)) else out
        return self._perturb(out, name, args)

    def _perturb(self, out: Any, name: str, args: Any) -> Any:
        if not isinstance(out, torch.Tensor) or out.dtype != torch.float64:
            return out
        noise = UNIT * (2 * torch.rand(out.shape, dtype=out.dtype, generator=self.generator) - 1) * out
        if name in PRODUCTS:
            spread = (args[0].square() @ args[1].square() + out.square()).sqrt()
            noise = noise + 0.4 * UNIT * math.sqrt(args[0].shape[-1] / 2) * spread * self._normal(out)
        elif name in SUMS and out.numel():
            number = args[0].numel() / out.numel()
            noise = noise + 0.4 * UNIT * math.sqrt(number / 2) * out.abs() * self._normal(out)
        return out + noise

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator)


class Budget(NamedTuple):
    """Value and deviation of one tensor."""

    value: Tensor
    deviation: Tensor


class Truth(NamedTuple):
    """What the reference says about one batch: budgets by name, the experts it chose and the narrowest choice."""

    budgets: dict[str, Budget]
    routing: dict[int, Tensor]
    margin: float


class Verdict(NamedTuple):
    """The largest score, at most 1 for a correct model, and where it is."""

    score: float
    name: str


def evaluate(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokens: Tensor, forced: dict[int, Tensor] | None
) -> dict[str, Tensor]:
    """Return logits, hidden states, loss and the gradient of every parameter, by name."""
    leaves = float64_leaves(tensors)
    result = hybrid_model(config, leaves, tokens, forced=forced)
    loss = next_token_loss(result.logits, tokens)
    trained = {name: leaf for name, leaf in leaves.items() if not name.endswith("e_score_correction_bias")}
    gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    named = {"logits": result.logits, "loss": loss}
    named |= {f"hidden.{layer}": x for layer, x in enumerate(result.hidden)}
    named |= {f"gradient of {name}": x for name, x in zip(trained, gradients, strict=True)}
    return {name: x.detach() for name, x in named.items()}


def establish(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokens: Tensor, patch: pytest.MonkeyPatch
) -> Truth:
    """Compute the reference's value and the budget of everything that a model returns."""
    free = hybrid_model(config, {name: x.double() for name, x in tensors.items()}, tokens).routing
    forced = {layer: routing.indices for layer, routing in free.items()}
    margin = min((float(routing.margin.min()) for routing in free.values()), default=math.inf)
    exact = evaluate(config, tensors, tokens, forced)
    squares = {name: torch.zeros_like(x) for name, x in exact.items()}
    for member in range(NUM_MEMBERS):
        with patch.context() as inner:
            if member % 2:
                inner.setattr(kda_reference.kda_layer, "differentiable_kda", _by_chunks)
            with Rounded(member):
                found = evaluate(config, tensors, tokens, forced)
        for name, x in found.items():
            squares[name] += (x - exact[name]).square() / NUM_MEMBERS
    budgets = {name: Budget(x, pooled(squares[name]).sqrt() + UNIT * x.abs()) for name, x in exact.items()}
    return Truth(budgets, forced, margin)


def _by_chunks(inputs: KdaInputs) -> tuple[Tensor, Tensor]:
    o, state = chunkwise_kda(**inputs.keywords())
    assert state is not None
    return o, state


def pooled(squares: Tensor) -> Tensor:
    """Average each mean square with a rank-one model of all: few members alone would trust elements by luck."""
    if squares.dim() < 2:
        return (squares + squares.mean()) / 2
    flat = squares.flatten(0, -2)
    rank_one = flat.mean(1, keepdim=True) * flat.mean(0, keepdim=True) / flat.mean().clamp_min(1e-300)
    return (squares + rank_one.view_as(squares)) / 2


def judge(found: Mapping[str, Tensor], truth: Truth) -> Verdict:
    """Compare tensors with their budgets; every tensor of the truth must be there."""
    assert found.keys() == truth.budgets.keys(), found.keys() ^ truth.budgets.keys()
    return max(Verdict(score(x, truth.budgets[name]), name) for name, x in found.items())


def score(x: Tensor, budget: Budget) -> float:
    """Return the score of one tensor: the larger of the element's and the row's, each over its limit."""
    assert x.shape == budget.value.shape, (x.shape, budget.value.shape)
    error = (x.detach().double() - budget.value).abs()
    z = torch.where(error == 0, 0.0, error / budget.deviation.clamp_min(1e-300))
    largest = float(z.max()) / LIMIT if bool(z.isfinite().all()) else math.inf
    if z.dim() and z.shape[-1] >= SMALLEST_SLICE and math.isfinite(largest):
        largest = max(largest, float(z.square().mean(-1).max()) ** 0.5 / SLICE_LIMIT)
    return largest

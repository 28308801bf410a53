"""Dense SwiGLU, and the mixture of experts: sigmoid routing with a correction bias.

The bias decides who is chosen and never how much it counts. It is no parameter: after a training step it moves by a fixed
amount towards an even load (``Router.balance``), so that no auxiliary loss is needed. Dimension letters: T tokens, E experts, k
chosen ones, D model width, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import linear, silu

from kda_model.norms import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

    from kda_model.config import KimiLinearConfig

GROUP_ALIGNMENT = 8  # rows; a grouped product of 16-bit operands wants groups that start at multiples of 16 bytes
FEW_ROWS = 64


class SwiGLU(nn.Module):
    """``W_down (SiLU(W_gate x) W_up x)``."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``[..., D]``."""
        y: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Routing(NamedTuple):
    """Chosen experts ``[T, k]`` and their weights, at least float32."""

    indices: Tensor
    weights: Tensor


class Router(nn.Module):
    """Chooses and weighs experts.

    Attributes
    ----------
    forced
        Experts ``[T, k]`` to take instead of the chosen ones, for comparisons across a tie; ``None`` means to choose.
    last
        The routing of the last call, without its gradient.
    load
        Tokens that each expert was given since the last ``balance``, while training.
    recomputing
        Set while activations are computed a second time, so that nothing is counted twice.
    """

    load: Tensor
    e_score_correction_bias: Tensor

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)
        self.forced: Tensor | None = None
        self.last: Routing | None = None
        self.recomputing = False

    def forward(self, x_TD: Tensor) -> Routing:
        """Route tokens."""
        config = self.config
        logits = linear(at_least_float32(x_TD), at_least_float32(self.weight))
        scores = torch.sigmoid(logits)
        indices = self._choose(scores.detach()) if self.forced is None else self.forced
        weights = scores.gather(-1, indices)
        if config.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = config.routed_scaling_factor * weights
        self.last = Routing(indices, weights.detach())
        if self.training and not self.recomputing:
            self.load.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
        return Routing(indices, weights)

    def _choose(self, scores: Tensor) -> Tensor:
        config = self.config
        choice = scores + self.e_score_correction_bias
        if config.num_expert_groups > 1:
            grouped = choice.unflatten(-1, (config.num_expert_groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(config.num_chosen_groups, -1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, value=True)
            choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        return choice.topk(config.num_chosen_experts, -1).indices

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Raise the bias of experts with less than the mean load by ``rate``, lower the others', and count anew."""
        load = self.load.to(torch.float64)
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load).to(self.e_score_correction_bias.dtype)
        self.load.zero_()


class Experts(nn.Module):
    """All experts of a layer, their matrices stacked: ``w1`` (gate) and ``w3`` (up) ``[E, F, D]``, ``w2`` (down) ``[E, D, F]``."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.expert_width, config.hidden_size
        self.w1 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum of each token's experts."""
        num_chosen = routing.indices.shape[1]
        flat = routing.indices.flatten()
        order = flat.argsort(stable=True)
        x = x_TD[order // num_chosen]
        if x.is_cuda and x.dtype == torch.bfloat16:
            y = self._grouped(x, flat[order])
        elif x.is_cuda and (x.shape[0] <= FEW_ROWS or torch.cuda.is_current_stream_capturing()):
            y = self._gathered(x, flat[order])
        else:
            y = self._one_by_one(x, flat[order])
        # Back to the order of the tokens: a sum over k in one order, where adding by index would have none.
        y = at_least_float32(y[order.argsort()]).unflatten(0, (-1, num_chosen)) * routing.weights[..., None]
        total: Tensor = y.sum(1)
        return total.to(x_TD.dtype)

    def _one_by_one(self, x: Tensor, expert: Tensor) -> Tensor:
        parts, counts = [], torch.bincount(expert, minlength=self.w1.shape[0]).tolist()
        for index, rows in enumerate(x.split(counts)):
            if len(rows):
                hidden = silu(linear(rows, self.w1[index])) * linear(rows, self.w3[index])
                parts.append(linear(hidden, self.w2[index]))
        return torch.cat(parts) if parts else x

    def _gathered(self, x: Tensor, expert: Tensor) -> Tensor:
        """Copy each row's matrices: for a few rows, without asking the device how many each expert has."""
        hidden = silu((self.w1[expert] @ x[..., None])[..., 0]) * (self.w3[expert] @ x[..., None])[..., 0]
        return (self.w2[expert] @ hidden[..., None])[..., 0]

    def _grouped(self, x: Tensor, expert: Tensor) -> Tensor:
        """Multiply groups of rows by their expert's matrices in one launch, each group padded to whole units of alignment."""
        experts = self.w1.shape[0]
        counts = torch.zeros(experts, dtype=torch.int64, device=x.device).scatter_add_(
            0, expert, torch.ones_like(expert)
        )
        padded = -(-counts // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
        ends = padded.cumsum(0)
        shift = (ends - padded) - (counts.cumsum(0) - counts)
        place = torch.arange(x.shape[0], device=x.device) + shift[expert]
        # Room for every group's padding, and for a row behind the last group, which the product wants.
        room = (x.shape[0] // GROUP_ALIGNMENT + experts + 1) * GROUP_ALIGNMENT
        spread = x.new_zeros(room, x.shape[1]).index_copy(0, place, x)
        offsets = ends.to(torch.int32)
        w1, w3, w2 = (w.transpose(-1, -2) for w in (self.w1, self.w3, self.w2))
        hidden = silu(functional.grouped_mm(spread, w1, offs=offsets)) * functional.grouped_mm(spread, w3, offs=offsets)
        y: Tensor = functional.grouped_mm(hidden, w2, offs=offsets)
        return y[place]


class MixtureOfExperts(nn.Module):
    """Routed experts and the shared one; attributes bear the released names."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.num_shared_experts * config.expert_width)
            if config.num_shared_experts
            else None
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply to tokens ``[B, T, D]``."""
        flat = x_BTD.flatten(0, 1)
        y: Tensor = self.experts(flat, self.gate(flat)).view_as(x_BTD)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x_BTD)
        return y

"""Regimes: the kinds of keys, values, gates and strengths that expose different bugs.

Each is a function of a source of randomness and a shape, and returns float64 values that are rounded to the input dtype afterwards.
Random inputs alone leave whole classes of bugs invisible; what each regime exposes is said beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid, normalize

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Regime = Callable[["Draw", tuple[int, ...]], Tensor]

LOWER_BOUND = -5.0


class Draw:
    """Reproducible float64 draws; always made on the CPU, so that a case means the same on every device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw from N(0, 1)."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Draw from U[0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


def layer_parameters(draw: Draw, num_heads: int, k_width: int) -> tuple[Tensor, Tensor]:
    """Draw ``A_log [G]`` and ``dt_bias [G K]`` as the layer initialises them."""
    a_log = (1 + 15 * draw.uniform((num_heads,))).log()
    low, high = math.log(1e-3), math.log(1e-1)
    step = (low + (high - low) * draw.uniform((num_heads * k_width,))).exp().clamp(min=1e-4)
    return a_log, step + (-torch.expm1(-step)).log()


def _unit(x: Tensor) -> Tensor:
    return normalize(x, dim=-1)


def _per_head(x: Tensor) -> Tensor:
    """Give every value head its own strength of the same gate, so that a head map mistake shows."""
    heads = x.shape[2]
    factor = 1 - 0.5 * torch.arange(heads, dtype=x.dtype) / max(heads, 1)
    return x * factor[:, None]


def _near(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    common = _unit(draw.normal((shape[0], 1, *shape[2:])))
    return _unit(common + 0.05 * _unit(draw.normal(shape)))


def _orthogonal(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    batch, tokens, heads, width = shape
    basis: Tensor = torch.linalg.qr(draw.normal((batch, heads, width, width)))[0]
    return basis[:, :, torch.arange(tokens) % width].transpose(1, 2)


def _zero_rows(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return _unit(draw.normal(shape)) * (draw.uniform((*shape[:-1], 1)) >= 0.3)  # noqa: PLR2004 - share of rows


KEYS: dict[str, Regime] = {
    "random": lambda draw, shape: _unit(draw.normal(shape)),
    "near": _near,  # inverse by powers, missing cross blocks, backward through the inverse
    "same": lambda draw, shape: (
        _unit(draw.normal((shape[0], 1, *shape[2:]))).expand(shape).clone()
    ),  # growth, coherent rounding
    "positive": lambda draw, shape: _unit(draw.uniform(shape)),  # strong correlation
    "orthogonal": _orthogonal,  # erasure
    "small": lambda draw, shape: (
        _unit(draw.normal(shape)) * 10 ** (-4 + 3 * draw.uniform((*shape[:-1], 1)))
    ),  # epsilon's place
    "zero_rows": _zero_rows,  # 0 / 0 in the normalisation
}

VALUES: dict[str, Regime] = {
    "normal": lambda draw, shape: draw.normal(shape),
    "big": lambda draw, shape: draw.normal(shape) * 1e4,  # absolute tolerances
    "huge": lambda draw, shape: draw.normal(shape) * 1e25,  # float16 inside, squares of values
    "least": lambda draw, shape: draw.normal(shape) * 1e-25,  # flushed operands, squares of values
    "tiny": lambda draw, shape: draw.normal(shape) * 1e-5,  # flushed operands, absolute tolerances
    "sparse": lambda draw, shape: draw.normal(shape) * (draw.uniform(shape) < 0.02),  # noqa: PLR2004 - leaks between tokens
    "alternating": lambda draw, shape: (
        draw.normal((shape[0], 1, *shape[2:])) * (1 - 2.0 * (torch.arange(shape[1]) % 2)).reshape(1, -1, 1, 1)
    ),  # linear growth with repeated keys at beta 2
}

STRENGTHS: dict[str, Regime] = {
    "random": lambda draw, shape: torch.sigmoid(draw.normal(shape)),
    "one": lambda draw, shape: torch.ones(shape, dtype=torch.float64),
    "zero": lambda draw, shape: torch.zeros(shape, dtype=torch.float64),
    "near_one": lambda draw, shape: 1 - 0.02 * draw.uniform(shape),
    "tiny": lambda draw, shape: 1e-3 * draw.uniform(shape),
    "faint": lambda draw, shape: 10 ** (-8 + 3 * draw.uniform(shape)),  # sigmoids by subtraction
}


def _alternating(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    del draw
    return (LOWER_BOUND * ((torch.arange(shape[1]) % 2) == 0).double()).reshape(1, -1, 1, 1).expand(shape).clone()


def _one_channel(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    del draw
    decay = torch.full(shape, -1e-3, dtype=torch.float64)
    decay[..., 0] = LOWER_BOUND
    return decay


def _spikes(period: int, low: float) -> Regime:
    def spikes(draw: Draw, shape: tuple[int, ...]) -> Tensor:
        decay = -0.02 * draw.uniform(shape)
        decay[:, 5::period] = low
        return decay

    return spikes


def _mixed(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    scale = (3 * draw.normal((shape[0], 1, *shape[2:])) - 3).exp()
    return (-scale * draw.uniform(shape)).clamp(min=-30.0)


def _layer(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    a_log, dt_bias = layer_parameters(draw, shape[2], shape[3])
    x = draw.normal(shape) + dt_bias.reshape(shape[2:])
    return -a_log.exp()[:, None] * torch.nn.functional.softplus(x, threshold=700.0)


def _holes(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return -2 * draw.uniform(shape) * (draw.uniform(shape) < 0.5)  # noqa: PLR2004 - half of the entries


GATES: dict[str, Regime] = {
    "moderate": lambda draw, shape: _per_head(logsigmoid(draw.normal(shape) + 3)),
    "zero": lambda draw, shape: torch.zeros(shape, dtype=torch.float64),  # state accumulation, DeltaNet
    "tiny": lambda draw, shape: _per_head(-1e-4 * draw.uniform(shape)),  # residuals of the inverse
    "constant": lambda draw, shape: _per_head(
        torch.full(shape, -1e-3, dtype=torch.float64)
    ),  # coherent rounding of exp
    "slow": lambda draw, shape: torch.full(shape, -2e-5, dtype=torch.float64),  # decays lost by a rounded state
    "bound": lambda draw, shape: torch.full(shape, LOWER_BOUND, dtype=torch.float64),  # overflow of exp(-cumsum)
    "uniform": lambda draw, shape: LOWER_BOUND * torch.sigmoid(3 * draw.normal(shape)),
    "alternating": _alternating,  # decay applied one token off
    "one_channel": _one_channel,  # channel mix-ups
    "holes": _holes,  # exact zeros beside decays, strict tests in masked exponentials
    "spikes": _spikes(37, -40.0),  # cancellation in cumulative sums
    "cliffs": _spikes(50, -1000.0),  # clamped exponents, resets
    "mixed": _mixed,  # a different time scale per channel
    "layer": _layer,  # what a freshly initialised layer feeds the kernel: hundreds of nats per chunk
    "hundreds": lambda draw, shape: _per_head(-300 * draw.uniform(shape)),  # underflow to a zero decay
}

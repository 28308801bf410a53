"""Random calls: every flag of the contract, gates from open to closed, keys from random to repeated."""

from __future__ import annotations

from typing import Any

import torch
from kda_reference import KdaInputs
from torch import Tensor
from torch.nn.functional import normalize

# Every flag of the contract at least once in each of its forms.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_state": {"state": False},
    "batch": {"B": 2, "T": 7, "H": 2, "G": 2},
    "grouped": {"H": 2, "G": 4, "T": 7},
    "grouped_l2norm": {"H": 1, "G": 3, "T": 7, "l2norm": True},
    "packed": {"lengths": (5, 0, 1, 8)},
    "packed_state_v_first": {"lengths": (4, 9, 0), "state_v_first": True, "V": 5},
    "scale": {"scale": -0.7},
    "l2norm": {"l2norm": True},
    "softplus": {"gate_form": "softplus"},
    "softplus_no_bias": {"gate_form": "softplus", "bias": False},
    "bounded": {"gate_form": "bounded", "H": 1, "G": 2, "T": 8},
    "bounded_no_slope": {"gate_form": "bounded", "a_log": False, "bias": False},
    "sigmoid": {"beta_form": "sigmoid"},
    "doubled_sigmoid": {"beta_form": "doubled"},
    "everything": {
        "lengths": (6, 0, 7),
        "H": 1,
        "G": 2,
        "l2norm": True,
        "gate_form": "softplus",
        "beta_form": "doubled",
        "state_v_first": True,
    },
    "bfloat16": {"dtype": torch.bfloat16, "l2norm": True, "gate_form": "bounded", "beta_form": "sigmoid"},
}

# Log decays in nats. A chunk of 64 spans up to 6.4e4 nats here.
GATES = ("moderate", "zero", "bound", "alternating", "spikes", "closed", "hard_spikes", "one_channel", "stagnant")


def log_decays(gate: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return log decays ``[B, T, G, K]`` of a named regime."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(uniform)
    first_channel, odd_token = torch.arange(shape[3]) == 0, torch.arange(shape[1])[:, None, None] % 2 == 1
    return {
        "moderate": -0.3 * uniform,
        "zero": zero,
        "bound": zero - 5,
        "alternating": torch.where(odd_token, zero - 5, zero),
        "spikes": torch.where(uniform < 0.1, zero - 40, -0.01 * uniform),
        "closed": zero - 1000,
        "hard_spikes": torch.where(uniform < 0.1, zero - 1e4, -0.1 * uniform),
        "one_channel": torch.where(first_channel, zero - 5, zero - 1e-3),
        "stagnant": zero - 2e-5,
    }[gate]


def keys(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return unit keys ``[B, T, H, K]``: ``random``, ``repeated``, or ``near`` identical."""
    random = torch.randn(shape, generator=generator, dtype=torch.float64)
    repeated = random[:, :1].expand(shape)
    return normalize({"random": random, "repeated": repeated, "near": repeated + 0.05 * random}[kind], dim=-1)


def make_inputs(
    *,
    seed: int = 0,
    B: int = 1,
    T: int = 13,
    H: int = 1,
    G: int | None = None,
    K: int = 4,
    V: int = 3,
    lengths: tuple[int, ...] | None = None,
    gate: str = "moderate",
    key: str = "random",
    beta: tuple[float, float] = (0.0, 1.0),
    state: bool = True,
    state_v_first: bool = False,
    l2norm: bool = False,
    gate_form: str | None = None,
    a_log: bool = True,
    bias: bool = True,
    beta_form: str | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> KdaInputs:
    """Return a random call; the same arguments give the same call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    G = H if G is None else G
    T = T if lengths is None else sum(lengths)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    num_states = B if lengths is None else len(lengths)
    found: dict[str, Any] = {
        "q": keys("random", (B, T, H, K), generator),
        "k": keys(key, (B, T, H, K), generator),
        "v": normal(B, T, G, V),
        "g": log_decays(gate, (B, T, G, K), generator),
        "beta": beta[0] + (beta[1] - beta[0]) * torch.rand((B, T, G), generator=generator, dtype=torch.float64),
    }
    options: dict[str, Any] = {"scale": scale, "state_v_first": state_v_first}
    if l2norm:
        options["use_qk_l2norm_in_kernel"] = True
        found["q"], found["k"] = 3 * found["q"] * torch.rand((B, T, H, 1), generator=generator), 0.01 * found["k"]
    if gate_form is not None:
        options |= {"use_gate_in_kernel": True, "lower_bound": -5.0 if gate_form == "bounded" else None}
        found["g"] = 2 * normal(B, T, G, K)
        if a_log:
            options["A_log"] = (0.3 * normal(G)).to(wide)
        if bias:
            options["dt_bias"] = normal(G * K).to(wide)
    if beta_form is not None:
        options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": beta_form == "doubled"}
        found["beta"] = 2 * normal(B, T, G)
    if state:
        initial_state = normal(num_states, G, V, K) if state_v_first else normal(num_states, G, K, V)
        options["initial_state"] = initial_state.to(wide)
    if lengths is not None:
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return KdaInputs(**{name: tensor.to(dtype) for name, tensor in found.items()}, **options)


def cotangents(inputs: KdaInputs, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return random float64 cotangents of ``o`` and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    do = torch.randn(inputs.v.shape, generator=generator, dtype=torch.float64)
    return do, torch.randn(inputs.state_shape, generator=generator, dtype=torch.float64)


def inner(one: Tensor | None, two: Tensor | None) -> float:
    """Return the inner product of two tensors; zero when either is missing."""
    return 0.0 if one is None or two is None else float((one.double() * two.double()).sum())

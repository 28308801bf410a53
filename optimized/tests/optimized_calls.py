"""Calls for the kernel tests, and the float64 answers they are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kda_optimized
import torch
from kda_reference.contract import KdaInputs, KdaResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUT_LIMIT = {torch.bfloat16: 2.5e-3, torch.float16: 1e-3, torch.float32: 2e-6}
STATE_LIMIT = {torch.bfloat16: 1.5e-3, torch.float16: 1e-3, torch.float32: 2e-6}


class Calls:
    """Builds calls from a seeded generator, so that a test says only what it varies."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def __call__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        B: int = 1,
        T: int = 70,
        H: int = 1,
        G: int | None = None,
        K: int = 16,
        V: int = 16,
        **changes: Any,
    ) -> KdaInputs:
        """Return a call with normalised q and k, mild decay and beta in [0, 1]; ``changes`` replaces arguments."""
        G = H if G is None else G
        unit = torch.nn.functional.normalize
        arguments = {
            "q": unit(self.normal(B, T, H, K), dim=-1).to(dtype),
            "k": unit(self.normal(B, T, H, K), dim=-1).to(dtype),
            "v": self.normal(B, T, G, V).to(dtype),
            "g": -0.3 * self.uniform(B, T, G, K),
            "beta": self.uniform(B, T, G),
            **changes,
        }
        placed: dict[str, Any] = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        return KdaInputs(**placed)

    def gated(self, *, lower_bound: float | None = None, **changes: Any) -> KdaInputs:
        """Return a call with every activation in the kernel."""
        sizes = {"B": 1, "T": 70, "H": 1, "K": 16} | {
            name: changes[name] for name in ("B", "T", "H", "K") if name in changes
        }
        G = changes.get("G") or sizes["H"]
        logits = {
            "q": 3 * self.normal(sizes["B"], sizes["T"], sizes["H"], sizes["K"]),
            "k": 3 * self.normal(sizes["B"], sizes["T"], sizes["H"], sizes["K"]),
            "g": self.normal(sizes["B"], sizes["T"], G, sizes["K"]),
            "beta": self.normal(sizes["B"], sizes["T"], G),
            "A_log": torch.log(1 + 15 * self.uniform(G)),
            "dt_bias": self.normal(G * sizes["K"]) - 2,
        }
        dtype = changes.get("dtype", torch.float32)
        logits["q"], logits["k"] = logits["q"].to(dtype), logits["k"].to(dtype)
        flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        return self(lower_bound=lower_bound, **{**logits, **flags, **changes})


def evaluate(inputs: KdaInputs, function: Callable[..., Any] | None = None) -> KdaResult:
    """Call a kernel function with the arguments of ``inputs``."""
    keywords = inputs.keywords()
    tensors = [keywords.pop(name) for name in ("q", "k", "v", "g", "beta")]
    o, final_state = (function or kda_optimized.chunk_kda)(*tensors, **keywords)
    return KdaResult(o=o, final_state=final_state)


def state_of(result: KdaResult) -> Tensor:
    """Return the final state of a call that asked for it."""
    assert result.final_state is not None
    return result.final_state


def differentiate(
    inputs: KdaInputs, do: Tensor | None, dfinal: Tensor | None, function: Callable[..., Any] | None = None
) -> tuple[KdaResult, dict[str, Tensor]]:
    """Return the result and the gradients of ``<do, o> + <dfinal, final_state>`` by argument name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}
    result = evaluate(inputs.replace(**leaves), function)
    pairs = [
        (out, grad)
        for out, grad in ((result.o, do), (result.final_state, dfinal))
        if out is not None and grad is not None
    ]
    outputs, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return result, dict(zip(leaves, found, strict=True))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error; that of an exactly zero expectation is the norm of what was found."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    size = expected.detach().double().norm()
    return float(difference / size) if float(size) else float(difference)

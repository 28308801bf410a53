"""What the suite judges: an object with ``forward`` and ``vjp``, or a bare function with the public signature."""

from __future__ import annotations

import inspect
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from kda_reference import KdaGradients, KdaInputs, KdaResult

from kda_conformance import decoding
from kda_conformance.claims import Claims, narrow

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kda_conformance.decoding import Step

# Without the argument, not the claim.
CLAIM_OF_PARAMETER = {
    "cu_seqlens": "packed",
    "initial_state": "initial_state",
    "scale": "scale",
    "state_v_first": "state_v_first",
    "use_qk_l2norm_in_kernel": "l2norm_in_kernel",
    "use_gate_in_kernel": "gate_in_kernel",
    "A_log": "gate_in_kernel",
    "dt_bias": "gate_in_kernel",
    "lower_bound": "bounded_gate",
    "safe_gate": "bounded_gate",
    "allow_neg_eigval": "allow_neg_eigval",
    "use_beta_sigmoid_in_kernel": "beta_sigmoid_in_kernel",
}
ALWAYS_PASSED = ("q", "k", "v", "g", "beta", "output_final_state")


@runtime_checkable
class Implementation(Protocol):
    """Anything that evaluates the operator.

    Attributes
    ----------
    name, version
        How reports call it.
    claims
        What it promises.
    """

    name: str
    version: str
    claims: Claims

    def forward(self, inputs: KdaInputs) -> KdaResult:
        """Evaluate the call, with no gradient wanted."""
        ...

    def vjp(self, inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[KdaResult, KdaGradients]:
        """Evaluate the call and the gradients of ``<do, o> + <dfinal_state, final_state>``."""
        ...


class FunctionImplementation:
    """A function with the signature of ``fla.ops.kda.chunk_kda``, differentiated by autograd.

    Claims start at the whole contract, lose what the signature cannot receive, and are then narrowed by attributes of the function
    named like claims (``function.precision = "bf16"``). Laws on decoding call its attribute ``step``, if it has one.

    Parameters
    ----------
    function
        Called with q, k, v, g and beta by position, and other arguments by keyword where they differ from the contract's default.
    name, version
        How reports call it.
    """

    def __init__(self, function: Callable[..., Any], name: str, version: str = "unknown") -> None:
        self.function, self.name, self.version = function, name, version
        signature = inspect.signature(function)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
        lost = (
            {}
            if takes_any
            else {claim: False for name, claim in CLAIM_OF_PARAMETER.items() if name not in signature.parameters}
        )
        # A function that takes anything may hand it to one that does not take this.
        lost["chunk_size"] = "chunk_size" in signature.parameters
        self.step_function = getattr(function, "step", None)
        claims = narrow(Claims(), lost | decoding.claims_of(self.step_function), name)
        attributes = {
            item.name: getattr(function, item.name) for item in fields(Claims) if hasattr(function, item.name)
        }
        self.claims = narrow(claims, attributes, name)

    def forward(self, inputs: KdaInputs) -> KdaResult:
        """Evaluate the call, with no gradient wanted."""
        with torch.no_grad():
            return self._call(inputs)

    def vjp(
        self,
        inputs: KdaInputs,
        do: Tensor | None,
        dfinal_state: Tensor | None,
        frozen: frozenset[str] = frozenset(),
    ) -> tuple[KdaResult, KdaGradients]:
        """Evaluate the call and its gradients by autograd; an input that the result does not depend on has gradient zero.

        Parameters
        ----------
        frozen
            Inputs that need no gradient, and are given zero.
        """
        leaves = {name: tensor.detach().requires_grad_(name not in frozen) for name, tensor in inputs.tensors().items()}
        result = self._call(inputs.replace(**leaves))
        pairs = [
            (out, grad)
            for out, grad in ((result.o, do), (result.final_state, dfinal_state))
            if out is not None and grad is not None
        ]
        pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
        wanted = [name for name in leaves if name not in frozen]
        found: dict[str, Tensor | None] = {}
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], cotangents, allow_unused=True)
            found = dict(zip(wanted, grads, strict=True))
        gradients = {
            name: torch.zeros_like(leaf) if (gradient := found.get(name)) is None else gradient
            for name, leaf in leaves.items()
        }
        final = None if result.final_state is None else result.final_state.detach()
        return KdaResult(o=result.o.detach(), final_state=final), KdaGradients(**gradients)

    def step(self, call: Step, pool: Tensor) -> Tensor:
        """Advance the rows of a decoding call by the function's attribute ``step``."""
        assert self.step_function is not None  # noqa: S101 - claimed only where it is there
        return decoding.run(self.step_function, call, pool)

    def prepare(self, inputs: KdaInputs, cotangents: tuple[Tensor, Tensor] | None) -> Callable[[], object]:
        """Return the bare call of the function, and of its derivative when there are cotangents, with nothing around it: for timing."""
        if cotangents is None:
            positional, keywords = self._arguments(inputs)
            return partial(self.function, *positional, **keywords)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}
        positional, keywords = self._arguments(inputs.replace(**leaves))

        def forward_backward() -> object:
            outputs = self.function(*positional, **keywords)
            return torch.autograd.grad(outputs, list(leaves.values()), cotangents)

        return forward_backward

    def prepare_step(self, call: Step, pool: Tensor) -> Callable[[], object]:
        """Return the bare call of the step function, with nothing around it: for timing."""
        assert self.step_function is not None  # noqa: S101 - asked for only where it is claimed
        return partial(self.step_function, state=pool, **call.keywords())

    def _call(self, inputs: KdaInputs) -> KdaResult:
        positional, keywords = self._arguments(inputs)
        o, final_state = self.function(*positional, **keywords)
        return KdaResult(o=o, final_state=final_state)

    @staticmethod
    def _arguments(inputs: KdaInputs) -> tuple[list[Tensor], dict[str, Any]]:
        defaults = {item.name: item.default for item in fields(KdaInputs)}
        keywords = {
            name: value
            for name, value in inputs.keywords().items()
            if name in ALWAYS_PASSED or not (value is defaults[name] or value == defaults[name])
        }
        return [keywords.pop(name) for name in ALWAYS_PASSED[:5]], keywords

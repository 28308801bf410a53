"""The implementation on trial: runs calls, judges them, and keeps what the report needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
from torch.nn.functional import max_pool2d

from kda_conformance import ensemble, service
from kda_conformance.arithmetic import CLASSES
from kda_conformance.budget import TensorBudget
from kda_conformance.claims import DTYPES, Claims
from kda_conformance.judge import AXES, Judgement, judge
from kda_conformance.members import GRADIENT_OF
from kda_conformance.rounding import Exact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kda_reference import KdaInputs, KdaResult
    from torch import Tensor

    from kda_conformance.arithmetic import Arithmetic
    from kda_conformance.budget import Budget
    from kda_conformance.cases import Case
    from kda_conformance.decoding import Step
    from kda_conformance.implementation import Implementation

BINS = 48
MOST_HEADS, MOST_CHANNELS = 16, 32
RECORDED = "recorded only: "
# More than the calls of the battery, so that laws on one call share its results.
KEPT_RESULTS = 1024


@dataclass(frozen=True, slots=True)
class Call:
    """A case in an input dtype: what one test of a law is about."""

    case: Case
    dtype: str

    def __str__(self) -> str:
        """Return the test's id."""
        return f"{self.dtype}|{self.case}"


class LawViolation(AssertionError):  # noqa: N818 - a failed assertion, not an error of the suite
    """An implementation broke a law; the text says which, where, by how much, and how to see it again.

    Attributes
    ----------
    call
        On what it was broken.
    """

    def __init__(self, message: str, call: Call) -> None:
        super().__init__(message)
        self.call = call


@dataclass
class Subject:
    """One implementation under one claims set, on one device.

    Attributes
    ----------
    implementation, claims, device
        What runs, what it promises, where.
    spec
        What the user typed after ``--impl``; reproductions repeat it.
    options
        Further options a reproduction must repeat.
    seed
        Which draw of every call is judged.
    law, test
        What is running now; set by the plugin before each test.
    measures
        Rows recorded by the running test.
    """

    implementation: Implementation
    claims: Claims
    device: str
    spec: str
    options: str = ""
    seed: int = 0
    law: str = ""
    test: str = ""
    measures: list[dict[str, Any]] = field(default_factory=list)
    _results: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def require(self, call: Call) -> None:
        """Skip the running test when the call needs a claim the implementation does not make."""
        missing = call.case.unclaimed(self.claims)
        if missing is not None:
            pytest.skip(f"unclaimed: {missing}")

    def _require_activations(self, inputs: KdaInputs) -> None:
        """Skip the running test when its law changed the call into one whose activations are not claimed."""
        missing = self.claims.unclaimed_activation(
            gate=inputs.use_gate_in_kernel,
            bounded=inputs.lower_bound is not None,
            l2norm=inputs.use_qk_l2norm_in_kernel,
            beta_sigmoid=inputs.use_beta_sigmoid_in_kernel,
        )
        if missing is not None:
            pytest.skip(f"unclaimed: {missing}")

    def inputs(self, call: Call) -> KdaInputs:
        """Return the call's arguments on the subject's device."""
        return call.case.inputs(DTYPES[call.dtype], self.device)

    def forward(self, call: Call, inputs: KdaInputs) -> KdaResult:
        """Run a forward call and check the form of what it returns."""
        self._require_activations(inputs)
        result = self.implementation.forward(inputs)
        self.check_form(call, inputs, {"o": result.o, "final_state": result.final_state})
        return result

    def step(self, call: Call, step: Step, pool: Tensor) -> Tensor:
        """Run a decoding call and check the form of what it returns."""
        o = self.implementation.step(step, pool)  # type: ignore[attr-defined]
        self.check_form(call, step.inputs, {"o": o})
        return o  # type: ignore[no-any-return]

    def evaluate(
        self, call: Call, inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None
    ) -> dict[str, Tensor]:
        """Run a call with gradients; return outputs and gradients by name."""
        self._require_activations(inputs)
        result, gradients = self.implementation.vjp(inputs, do, dfinal_state)
        found = {"o": result.o, "final_state": result.final_state}
        found |= {GRADIENT_OF[name]: getattr(gradients, name) for name in inputs.tensors()}
        self.check_form(call, inputs, found)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def run(self, call: Call, inputs: KdaInputs, cotangents: Sequence[Tensor | None] | None) -> dict[str, Tensor]:
        """Run a call, with gradients where cotangents are given; return what it gives by name."""
        if cotangents is not None:
            return self.evaluate(call, inputs, *cotangents)
        result = self.forward(call, inputs)
        return {"o": result.o, "final_state": result.final_state}  # type: ignore[dict-item]

    def results(self, call: Call, *, backward: bool) -> dict[str, Tensor]:
        """Return what the implementation makes of the call itself; computed once per call."""
        key = f"{call}|{backward}"
        if key not in self._results:
            inputs = self.inputs(call)
            found = self.run(call, inputs, call.case.cotangents(inputs) if backward else None)
            if len(self._results) >= KEPT_RESULTS:
                self._results.pop(next(iter(self._results)))
            self._results[key] = found
        return self._results[key]

    def budget(self, call: Call, inputs: KdaInputs | None = None, *, backward: bool | None = None) -> Budget:
        """Return the budget of the call, or of ``inputs`` in its place, at the claimed arithmetic."""
        inputs = self.inputs(call) if inputs is None else inputs
        backward = self.claims.backward if backward is None else backward
        cotangents = call.case.cotangents(inputs) if backward else (None, None)
        budget = service.budget_of(inputs, *cotangents, self.arithmetic(call))
        if self.claims.cumulative_gate_gradient:
            return budget
        return {name: replace(entry, variance=entry.strict_variance) for name, entry in budget.items()}

    def arithmetic(self, call: Call) -> Arithmetic:
        """Return the arithmetic that is claimed for the call's dtype."""
        return CLASSES[self.claims.precision[call.dtype]]

    def check_form(self, call: Call, inputs: KdaInputs, found: dict[str, Tensor | None]) -> None:
        """Demand the shapes and dtypes of the contract."""
        wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
        expected = {"o": (tuple(inputs.v.shape), inputs.v.dtype), "final_state": (inputs.state_shape, wide)}
        expected |= {
            GRADIENT_OF[name]: (tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.tensors().items()
        }
        for name, tensor in found.items():
            shape, dtype = expected[name]
            if not isinstance(tensor, torch.Tensor):
                self.fail(call, f"{name} must be a tensor, got {type(tensor).__name__}")
            if tuple(tensor.shape) != shape:
                self.fail(call, f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
            if tensor.dtype != dtype and inputs.q.dtype != torch.float64:
                self.fail(call, f"{name} must have dtype {dtype}, got {tensor.dtype}")

    def judge(self, call: Call, found: dict[str, Tensor], budget: Budget, inputs: KdaInputs | None = None) -> None:
        """Judge the named tensors against the budget; record all of them, fail on the worst."""
        __tracebackhide__ = True
        inputs = self.inputs(call) if inputs is None else inputs
        judgements = [judge(name, tensor, budget[name]) for name, tensor in found.items() if name in budget]
        if not judgements:
            message = f"law {self.law} judged nothing on {call}; a run that judges nothing is no pass"
            raise RuntimeError(message)
        for judgement in judgements:
            self._record(call, judgement, inputs)
        wrong = sorted((j for j in judgements if not j.score <= 1), key=lambda j: -j.score)
        if wrong:
            worst = wrong[0]
            others = ", ".join(f"{j.tensor} {j.score:.3g}" for j in wrong[1:])
            self.fail(
                call,
                f"{worst.tensor} must stay within its {self.claims.precision[call.dtype]} budget, "
                f"got error {worst.score:.3g} times the limit at {axis_index(worst)}\n"
                f"  got {worst.got!r}, expected {worst.expected!r}, bound {worst.bound:.3g}\n"
                f"  z {worst.z:.3g} of 10, slice {worst.slice_z:.3g} of 6, gain {worst.gain:.3g} of 8, "
                f"relative error {worst.relative_error:.3g}"
                + (f"\n  also beyond the limit: {others}" if others else ""),
            )

    def compare(self, call: Call, name: str, one: Tensor, two: Tensor, deviation: Tensor) -> None:
        """Demand that two results of the same exact quantity differ by no more than two correct ones may."""
        __tracebackhide__ = True
        budget = TensorBudget(value=two.double(), variance=2 * deviation**2, gain_rms=0.0, strict_variance=deviation**2)
        judgement = judge(name, one, budget, num_rounded=2)
        if not judgement.score <= 1:
            self.fail(
                call,
                f"{name} of the two calls must agree, got a difference {judgement.score:.3g} times the limit at {axis_index(judgement)}\n"
                f"  one {judgement.got!r}, other {judgement.expected!r}, bound {judgement.bound:.3g}",
            )

    def agree(self, call: Call, one: dict[str, Tensor], two: dict[str, Tensor], budget: Budget) -> None:
        """Demand that two evaluations of a call agree in every tensor that has a budget."""
        __tracebackhide__ = True
        for name, tensor in one.items():
            if name in budget:
                self.compare(call, name, tensor, two[name], budget[name].variance.sqrt())

    def same_bits(self, call: Call, name: str, one: Tensor, two: Tensor, what: str) -> None:
        """Demand that two tensors are equal bit for bit (zeros of either sign are equal)."""
        __tracebackhide__ = True
        different = ~((one == two) | (one.isnan() & two.isnan()))
        if bool(different.any()):
            position = tuple(different.nonzero()[0].tolist())
            index = ", ".join(f"{axis}={i}" for axis, i in zip(AXES[name], position, strict=True))
            self.fail(
                call,
                f"{name} must not change by one bit when {what}, got {one[position].item()!r} against {two[position].item()!r} at "
                f"{index} ({int(different.sum())} of {different.numel()} elements differ)",
            )

    def fail(self, call: Call, what: str) -> NoReturn:
        """Raise a violation that names implementation, law and case, and how to reproduce it."""
        __tracebackhide__ = True
        message = (
            f"{self.implementation.name} breaks the law {self.law} on {call.dtype} [{call.case}]\n"
            f"  {what}\n  {self.reproduction(call)}"
        )
        raise LawViolation(message, call)

    @staticmethod
    def record_only(what: str) -> NoReturn:
        """End the running test with the outcome ``may``: recorded, and no failure."""
        pytest.skip(f"{RECORDED}{what}")

    def reproduction(self, call: Call) -> str:
        """Return the one-line command that runs this law on this case again."""
        return f'{self.rerun(call.dtype)} --case "{call.case}"'

    def rerun(self, dtype: str) -> str:
        """Return the one-line command that runs this law again on every call it makes in a dtype."""
        return f"kda reproduce --impl {self.spec}{self.options} --law {self.law} --dtype {dtype}"

    def _record(self, call: Call, judgement: Judgement, inputs: KdaInputs) -> None:
        case = call.case
        self.measures.append(
            {
                "law": self.law,
                "test": self.test,
                "case": str(case),
                "dtype": call.dtype,
                "precision": self.claims.precision[call.dtype],
                "tensor": judgement.tensor,
                "score": judgement.score,
                "z": judgement.z,
                "slice": judgement.slice_z,
                "gain": judgement.gain,
                "relative_error": judgement.relative_error,
                "worst": {
                    "index": judgement.index,
                    "got": judgement.got,
                    "expected": judgement.expected,
                    "bound": judgement.bound,
                },
                "by_token": _by_token(judgement),
                "by_decay": _by_decay(judgement, inputs),
                "by_channel": by_channel(judgement),
                "regime": case.gate,
                "shape": {
                    "B": case.B,
                    "T": case.num_tokens,
                    "H": case.H,
                    "G": case.G,
                    "K": case.K,
                    "V": case.V,
                    "N": inputs.num_sequences,
                },
                "reproduction": self.reproduction(call),
            }
        )


def axis_index(judgement: Judgement) -> str:
    """Return where the worst element is, by axis name."""
    return ", ".join(f"{axis}={i}" for axis, i in judgement.index.items()) or "the only element"


def _by_token(judgement: Judgement) -> list[list[float]]:
    axes = AXES[judgement.tensor]
    if "t" not in axes or judgement.ratio.numel() == 0:
        return []
    per_token = judgement.ratio.movedim(axes.index("t"), 0).flatten(1).amax(1)
    step = math.ceil(per_token.numel() / BINS)
    return [[start, float(per_token[start : start + step].max())] for start in range(0, per_token.numel(), step)]


def _by_decay(judgement: Judgement, inputs: KdaInputs) -> list[list[float]]:
    """Return the largest ratio by the decay accumulated since the sequence began, averaged over channels, in nats."""
    axes = AXES[judgement.tensor]
    if not axes.startswith("btg") or judgement.ratio.numel() == 0:
        return []
    leaves = {name: tensor.double()[None] for name, tensor in inputs.tensors().items()}
    decay = ensemble.log_decay(leaves, inputs, Exact())[0] if inputs.use_gate_in_kernel else inputs.g.double()
    accumulated = -decay.mean(-1)
    for _, rows, tokens in inputs.segments():
        accumulated[rows, tokens] = accumulated[rows, tokens].cumsum(1)
    ratio = judgement.ratio.flatten(3).amax(-1) if judgement.ratio.dim() > 3 else judgement.ratio  # noqa: PLR2004 - beta has no width
    order = accumulated.flatten().argsort()
    nats, largest = accumulated.flatten()[order], ratio.flatten()[order]
    step = math.ceil(nats.numel() / BINS)
    return [
        [float(nats[i : i + step].mean()), float(largest[i : i + step].max())] for i in range(0, nats.numel(), step)
    ]


def by_channel(judgement: Judgement) -> dict[str, Any] | None:
    """Return the largest ratio by head and channel, in at most so many bins; ``None`` for a tensor without the two."""
    axes = AXES[judgement.tensor]
    heads, channels = (next((i for i, axis in enumerate(axes) if axis in pair), None) for pair in ("hg", "v"))
    channels = axes.find("k") if channels is None else channels
    if heads is None or channels < 0 or judgement.ratio.numel() == 0:
        return None
    largest = judgement.ratio.movedim((heads, channels), (0, 1)).flatten(2).amax(-1)
    steps = [math.ceil(size / most) for size, most in zip(largest.shape, (MOST_HEADS, MOST_CHANNELS), strict=True)]
    binned = max_pool2d(largest[None], steps, ceil_mode=True)[0]
    ratios = [[float(f"{ratio:.3g}") for ratio in row] for row in binned.tolist()]
    return {"head_step": steps[0], "channel_step": steps[1], "ratios": ratios}

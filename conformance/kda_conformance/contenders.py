"""What is timed: implementations of KDA, each judged before its time counts, and other operators beside them."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kda_conformance.claims import UsageError
from kda_conformance.decoding import Step, pool_with, scattered
from kda_conformance.devices import choose_device
from kda_conformance.discovery import find_implementation
from kda_conformance.subject import Call, LawViolation, Subject
from kda_conformance.workloads import USUAL_CHUNK, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kda_reference import KdaInputs
    from torch import Tensor

    Cotangents = tuple[Tensor, Tensor] | None

OUTPUTS = ("o", "final_state")
OTHER_OPERATORS = {
    "fla-dplr": "kda_conformance.implementations.fla_operators:FlaDplr",
    "fla-gdn": "kda_conformance.implementations.fla_operators:FlaGdn",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the gate says of an implementation on a workload.

    Attributes
    ----------
    outcome
        ``measured`` if it may be timed, else ``red`` (a law is broken), ``error`` (it raised) or ``unclaimed``.
    message
        Why it may not be timed.
    score
        Largest error over its bound; ``None`` where nothing was judged.
    """

    outcome: str
    message: str = ""
    score: float | None = None


class Contender(Protocol):
    """Anything that takes a turn.

    Attributes
    ----------
    name, version, operator
        How rows call it; ``operator`` is ``KDA`` or that of another recurrence, unless the workload says it.
    judged
        Whether anything here knows what it should return.
    """

    name: str
    version: str
    operator: str
    judged: bool

    def takes(self, workload: object) -> bool:
        """Tell whether the workload is one to time this on."""
        ...

    def judge(self, workload: Any) -> Judged:  # noqa: ANN401 - a workload that it takes
        """Judge it on a small call with the workload's flags."""
        ...

    def prepare_calls(self, workload: Any, inputs: list[Any], cotangents: list[Any]) -> list[Callable[[], object]]:  # noqa: ANN401
        """Return the calls that are timed, one for each input set."""
        ...


class KdaContender:
    """An implementation of KDA.

    Parameters
    ----------
    spec
        As ``--impl`` takes it.
    device
        Device type, or ``None`` for a GPU where there is one and it is claimed.
    label
        The only workloads it is timed on; ``None`` means all.

    Raises
    ------
    UsageError
        If there is no such implementation, or it does not run on the device.
    """

    operator = "KDA"
    judged = True

    def __init__(self, spec: str, device: str | None, label: str | None = None) -> None:
        self._label = label
        implementation = find_implementation(spec)
        self.name, self.version = implementation.name, implementation.version
        self.device = choose_device(device, implementation.claims, spec)
        self._subject = Subject(
            implementation=implementation, claims=implementation.claims, device=self.device, spec=spec
        )
        self._verdicts: dict[str, Judged] = {}

    def takes(self, workload: object) -> bool:
        """Every workload of the operator that has the label."""
        return isinstance(workload, Workload) and (self._label is None or self._label in workload.labels)

    def judge(self, workload: Workload) -> Judged:
        """Judge every output, and every gradient where there is a backward pass, against the budget of the claimed arithmetic."""
        missing = self._unclaimed(workload)
        if missing is not None:
            return Judged(outcome="unclaimed", message=f"unclaimed: {missing}")
        key = f"{workload.dtype} {workload.pass_name} {workload.chunk_size} {workload.gate_case}"
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(workload)
        return self._verdicts[key]

    def prepare_calls(
        self, workload: Workload, inputs: list[KdaInputs], cotangents: list[Cotangents]
    ) -> list[Callable[[], object]]:
        """Return steps where one token a row is decoded, else calls."""
        if workload.step:
            return [self.prepare_step(each) for each in inputs]
        return [self.prepare(*pair) for pair in zip(inputs, cotangents, strict=True)]

    def prepare(self, inputs: KdaInputs, cotangents: Cotangents) -> Callable[[], object]:
        """Return the bare function's call where there is one, else the adapter's."""
        implementation = self._subject.implementation
        if bare := getattr(implementation, "prepare", None):
            call: Callable[[], object] = bare(inputs, cotangents)
            return call
        if cotangents is None:
            return lambda: implementation.forward(inputs)
        return lambda: implementation.vjp(inputs, *cotangents)

    def prepare_step(self, inputs: KdaInputs) -> Callable[[], object]:
        """Return a step whose rows have one slot each, in no order, or a forward call where there is no step."""
        implementation = self._subject.implementation
        if not self._subject.claims.decode:
            return self.prepare(inputs, None)
        assert inputs.initial_state is not None  # noqa: S101 - every workload has one
        slots = scattered(inputs.num_sequences, self.device)
        pool = inputs.initial_state.new_zeros(2 * len(slots), *inputs.state_shape[1:])
        pool[slots] = inputs.initial_state
        step = Step(inputs=inputs.replace(initial_state=None), slots=slots)
        if bare := getattr(implementation, "prepare_step", None):
            call: Callable[[], object] = bare(step, pool)
            return call
        return lambda: implementation.step(step, pool)  # type: ignore[attr-defined]

    def _unclaimed(self, workload: Workload) -> str | None:
        claims = self._subject.claims
        if workload.dtype not in claims.precision:
            return f"precision of {workload.dtype}"
        if workload.backward and not claims.backward:
            return "backward"
        if workload.chunk_size != USUAL_CHUNK and not claims.chunk_size:
            return "chunk_size"
        return workload.gate_case.unclaimed(claims)

    def _judge(self, workload: Workload) -> Judged:
        subject, call = self._subject, Call(workload.gate_case, workload.dtype)
        subject.measures.clear()
        subject.law = "training-forward-matches-reference" if workload.backward else "forward-matches-reference"
        # The length of a chunk is no part of the case: budgets are those of the call without it.
        plain = subject.inputs(call)
        inputs = plain.replace(chunk_size=workload.chunk_size)
        budget = subject.budget(call, plain, backward=workload.backward)
        try:
            if workload.step and subject.claims.decode:
                subject.law = "step-is-the-recurrence"
                found = self._step(call, inputs)
            elif workload.backward:
                found = subject.evaluate(call, inputs, *call.case.cotangents(inputs))
            else:
                result = subject.forward(call, inputs)
                found = {"o": result.o, "final_state": result.final_state}  # type: ignore[dict-item]
            subject.judge(call, {name: found.pop(name) for name in OUTPUTS}, budget)
            if found:
                subject.law = "gradients-match-reference"
                subject.judge(call, found, budget)
        except LawViolation as violation:
            return Judged(outcome="red", message=str(violation), score=self._score())
        except Exception as error:  # noqa: BLE001 - whatever the implementation raises is its result
            return Judged(outcome="error", message=f"{type(error).__name__}: {error}\n  {subject.reproduction(call)}")
        return Judged(outcome="measured", score=self._score())

    def _step(self, call: Call, inputs: KdaInputs) -> dict[str, Tensor]:
        assert inputs.initial_state is not None  # noqa: S101 - every workload has one
        slots = scattered(inputs.num_sequences, self.device)
        pool = pool_with(inputs.initial_state, slots, 2 * len(slots))
        o = self._subject.step(call, Step(inputs=inputs.replace(initial_state=None), slots=slots), pool)
        return {"o": o, "final_state": pool[slots]}

    def _score(self) -> float | None:
        return max((row["score"] for row in self._subject.measures), default=None)


class OtherOperator:
    """Another recurrence, timed for comparison and not judged; forward only.

    Parameters
    ----------
    name
        A key of ``OTHER_OPERATORS``.

    Raises
    ------
    UsageError
        If there is none of this name, or what it needs is not installed.
    """

    judged = False

    def __init__(self, name: str) -> None:
        if name not in OTHER_OPERATORS:
            message = f"--other must be one of {sorted(OTHER_OPERATORS)}, got {name!r}; check the spelling"
            raise UsageError(message)
        place, _, attribute = OTHER_OPERATORS[name].partition(":")
        try:
            self._adapter = getattr(importlib.import_module(place), attribute)()
        except ImportError as error:
            message = f"--other {name} must be importable, got {error}; install fla-core"
            raise UsageError(message) from error
        self.name, self.version, self.operator = name, self._adapter.version, self._adapter.operator

    def takes(self, workload: object) -> bool:
        """Only what the operators are compared on."""
        return isinstance(workload, Workload) and "operators" in workload.labels

    def judge(self, workload: Workload) -> Judged:
        """Let it pass: nothing here knows what it should return."""
        del workload
        return Judged(outcome="measured")

    def prepare_calls(
        self, workload: Workload, inputs: list[KdaInputs], cotangents: list[Cotangents]
    ) -> list[Callable[[], object]]:
        """Return forward calls."""
        del workload, cotangents
        return [self._adapter.prepare(each) for each in inputs]


def installed_operators() -> list[str]:
    """Return the other operators that can be timed on this machine."""
    found = []
    for name in OTHER_OPERATORS if torch.cuda.is_available() else ():
        with suppress(UsageError):
            OtherOperator(name)
            found.append(name)
    return found


def contenders(
    specs: Iterable[str], others: Iterable[str], device: str | None, decoders: Iterable[str] = ()
) -> tuple[list[Contender], str]:
    """Load everything that is to be timed, ``decoders`` on the workloads of that label only, and say on which device.

    Raises
    ------
    UsageError
        If something cannot be loaded, two have one name, or they would run on different devices.
    """
    ours = [KdaContender(spec, device) for spec in specs] + [KdaContender(spec, device, "decode") for spec in decoders]
    found: list[Contender] = [*ours, *(OtherOperator(name) for name in others)]
    names = [contender.name for contender in found]
    if len(set(names)) < len(names):
        message = f"--impl must name each implementation once, got {names}; leave one out"
        raise UsageError(message)
    devices = {contender.device for contender in ours} | ({"cuda"} if len(found) > len(ours) else set())
    if len(devices) != 1:
        places = {contender.name: contender.device for contender in ours}
        message = f"--device must be one for all sides, got {places}; name a device that all of them claim"
        raise UsageError(message)
    return found, devices.pop()

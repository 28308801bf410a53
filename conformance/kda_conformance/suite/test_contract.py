"""What a call promises beyond its numbers: determinism, untouched inputs, refused nonsense."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance import battery, misuse

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject

REPEATS = {"quick": 2, "wide": 2, "standard": 3, "exhaustive": 20}


@pytest.mark.law("same-call-same-bits", cases=battery.relation_cases_at)
def test_the_same_call_gives_the_same_bits(subject: Subject, call: Call, effort: str) -> None:
    """Outputs and gradients of a repeated call are equal bit for bit."""
    if not subject.claims.deterministic:
        pytest.skip("unclaimed: deterministic")
    backward = subject.claims.backward
    first = subject.results(call, backward=backward)
    for _ in range(REPEATS[effort] - 1):
        inputs = subject.inputs(call)
        again = subject.run(call, inputs, call.case.cotangents(inputs) if backward else None)
        for name, tensor in again.items():
            subject.same_bits(call, name, tensor, first[name], "the call is repeated")


@pytest.mark.law("inputs-are-untouched", cases=battery.relation_cases_at)
def test_inputs_are_left_untouched(subject: Subject, call: Call) -> None:
    """No argument is written to, forward or backward."""
    inputs = subject.inputs(call)
    do, dfinal_state = call.case.cotangents(inputs)
    arguments = {**inputs.tensors(), "do": do, "dfinal_state": dfinal_state}
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    before = {name: tensor.clone() for name, tensor in given.items()}
    if subject.claims.backward:
        subject.evaluate(call, inputs, do, dfinal_state)
    subject.forward(call, inputs)
    for name, tensor in given.items():
        if not torch.equal(tensor, before[name]):
            subject.fail(
                call, f"{name} must be left untouched, got {int((tensor != before[name]).sum())} changed elements"
            )


@pytest.mark.law("wrong-arguments-are-refused")
@pytest.mark.parametrize("mistake", misuse.MISTAKES, ids=str)
def test_wrong_arguments_are_refused(subject: Subject, dtype: str, mistake: misuse.Mistake) -> None:
    """A call that contradicts the contract raises, instead of computing something."""
    if subject.claims.checks_arguments is False:
        pytest.skip("unclaimed: checks_arguments")
    call = mistake.call(dtype)
    subject.require(call)
    if mistake.needs is not None and not getattr(subject.claims, mistake.needs):
        pytest.skip(f"unclaimed: {mistake.needs}")
    if _refuses(subject, mistake, call):
        return
    if subject.claims.checks_arguments is None and not _checks_anything(subject, dtype):
        subject.record_only(
            f"a call with {mistake} gives a result; nothing is claimed of wrong arguments, and no check was seen"
        )
    subject.fail(call, f"a call with {mistake} must be refused, got a result; raise an error that names the argument")


def _refuses(subject: Subject, mistake: misuse.Mistake, call: Call) -> bool:
    try:
        subject.implementation.forward(mistake.apply(subject.inputs(call)))
    except Exception:  # noqa: BLE001 - any exception is a refusal
        return True
    return False


def _checks_anything(subject: Subject, dtype: str) -> bool:
    """Tell whether a mistake is refused that only a check can see, in a call that is claimed."""
    calls = [(mistake, mistake.call(dtype)) for mistake in misuse.MISTAKES if mistake.deliberate]
    return any(
        _refuses(subject, mistake, call) for mistake, call in calls if call.case.unclaimed(subject.claims) is None
    )

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
        if backward:
            again = subject.evaluate(call, inputs, *call.case.cotangents(inputs))
        else:
            result = subject.forward(call, inputs)
            again = {"o": result.o, "final_state": result.final_state}  # type: ignore[dict-item]
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
    if not subject.claims.checks_arguments:
        pytest.skip("unclaimed: checks_arguments")
    call, wrong = mistake.call(dtype, subject.device)
    subject.require(call)
    if mistake.needs is not None and not getattr(subject.claims, mistake.needs):
        pytest.skip(f"unclaimed: {mistake.needs}")
    try:
        subject.implementation.forward(wrong)
    except Exception:  # noqa: BLE001 - any exception is a refusal
        return
    subject.fail(call, f"a call with {mistake} must be refused, got a result; raise an error that names the argument")

"""Where tensors lie in memory, and what lies around them, does not matter; nor does what was called before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kda_conformance import battery, misuse, relations
from kda_conformance.cases import Case
from kda_conformance.subject import Call

if TYPE_CHECKING:
    from kda_conformance.subject import Subject


@pytest.mark.law("strides-do-not-matter", cases=battery.relation_cases_at)
def test_strided_inputs_mean_the_same(subject: Subject, call: Call) -> None:
    """Slices of wider tensors, with NaN in between, mean what contiguous copies mean; the order of a sum may differ."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)
    after = subject.forward(call, misuse.strided(inputs))
    budget = subject.budget(call)
    for name, tensor in (("o", after.o), ("final_state", after.final_state)):
        assert tensor is not None
        subject.compare(call, name, tensor, before[name], budget[name].variance.sqrt())


@pytest.mark.law("guard-bands", cases=battery.relation_cases_at)
def test_memory_around_the_inputs_is_not_read(subject: Subject, call: Call) -> None:
    """Tensors between bands of NaN mean what tensors alone mean, with gradients too."""
    inputs = misuse.guarded(subject.inputs(call))
    backward = subject.claims.backward
    before = subject.results(call, backward=backward)
    if backward:
        after = subject.evaluate(call, inputs, *call.case.cotangents(inputs))
    else:
        result = subject.forward(call, inputs)
        after = {"o": result.o, "final_state": result.final_state}  # type: ignore[dict-item]
    budget = subject.budget(call)
    for name, tensor in after.items():
        if name in budget:
            subject.compare(call, name, tensor, before[name], budget[name].variance.sqrt())


def histories(effort: str) -> tuple[Case, ...]:
    """Return calls of one shape that differ in what a cache may forget to ask: the dtype of the gate, the offsets."""
    del effort
    plain, packed = "H=1 G=2 K=16 V=16 gate=layer seed=54", "H=1 G=2 K=16 V=16 gate=mixed seed=55"
    # What is cached on a shape comes from the first call, so both orders need a shape of their own that no other law uses.
    texts = (
        f"T=71 {plain}",
        f"T=71 {plain} gate_dtype=input",
        f"T=73 {plain} gate_dtype=input",
        f"T=73 {plain}",
        f"T=19,48,8 {packed}",
        f"T=48,8,19 {packed}",
    )
    return tuple(Case.parse(text) for text in texts)


@pytest.mark.law("calls-do-not-remember", cases=histories)
def test_a_call_does_not_depend_on_earlier_ones_of_its_shape(subject: Subject, call: Call) -> None:
    """A call is right after another one of the same shape that differs in the gate's dtype or in the offsets."""
    for case in histories(""):
        if case != call.case and case.num_tokens == call.case.num_tokens and case.unclaimed(subject.claims) is None:
            other = Call(case, call.dtype)
            subject.forward(other, subject.inputs(other))
    found = subject.forward(call, subject.inputs(call))
    assert found.final_state is not None
    subject.judge(call, {"o": found.o, "final_state": found.final_state}, subject.budget(call, backward=False))


def first_calls(effort: str) -> tuple[Case, ...]:
    """Return the call that a process begins with."""
    del effort
    return (Case.parse("T=75 K=16 V=16 gate=layer seed=59"),)


@pytest.mark.law("first-call-is-right", cases=first_calls, first=True)
def test_the_first_call_of_a_process_is_right(subject: Subject, call: Call) -> None:
    """The call before any other, while caches are empty and kernels are tuned, is right, and so is the same call again."""
    inputs = subject.inputs(call)
    found = [subject.forward(call, inputs) for _ in range(2)]
    budget = subject.budget(call, backward=False)
    for result in found:
        assert result.final_state is not None
        subject.judge(call, {"o": result.o, "final_state": result.final_state}, budget)


def layouts(effort: str) -> tuple[Case, ...]:
    """Return calls whose states are square, where a transposition changes no shape, and not square."""
    texts = (
        "T=67 H=1 G=2 K=16 V=16 gate=mixed seed=56",
        "T=33,0,17 H=1 G=1 K=16 V=16 gate=layer seed=57",
        "T=40 K=16 V=24 seed=58",
    )
    return tuple(Case.parse(text) for text in (texts[:2] if effort in ("quick", "wide") else texts))


@pytest.mark.law("state-layouts-are-transposes", cases=layouts)
def test_states_with_values_first_are_transposed_states(subject: Subject, call: Call) -> None:
    """The call with ``state_v_first`` on transposed states gives the same outputs and transposed states and gradients."""
    if not subject.claims.state_v_first:
        pytest.skip("unclaimed: state_v_first")
    backward = subject.claims.backward
    before = subject.results(call, backward=backward)
    inputs = relations.values_first(subject.inputs(call))
    if backward:
        do, dfinal_state = call.case.cotangents(subject.inputs(call))
        turned = None if dfinal_state is None else dfinal_state.transpose(-1, -2).contiguous()
        after = subject.evaluate(call, inputs, do, turned)
    else:
        result = subject.forward(call, inputs)
        after = {"o": result.o, "final_state": result.final_state}  # type: ignore[dict-item]
    budget = subject.budget(call)
    for name, tensor in after.items():
        plain = tensor.transpose(-1, -2) if name in ("final_state", "dinitial_state") else tensor
        subject.compare(call, name, plain, before[name], budget[name].variance.sqrt())

"""Where tensors lie in memory, and what lies around them, does not matter; nor does what was called before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance import battery, misuse, relations, service
from kda_conformance.cases import Case
from kda_conformance.subject import Call

if TYPE_CHECKING:
    from kda_conformance.subject import Subject


@pytest.mark.law("strides-do-not-matter", cases=battery.relation_cases_at)
@pytest.mark.parametrize("layout", misuse.LAYOUTS)
def test_strided_tensors_mean_the_same(subject: Subject, call: Call, layout: str) -> None:
    """Slices with NaN in between, and views of heads-first tensors, mean what contiguous copies mean, as inputs and as cotangents."""
    arrange, backward = misuse.LAYOUTS[layout], subject.claims.backward
    before = subject.results(call, backward=backward)
    inputs = misuse.arranged(subject.inputs(call), arrange)
    cotangents = [None if each is None else arrange(each) for each in call.case.cotangents(inputs)]
    after = subject.run(call, inputs, cotangents if backward else None)
    subject.agree(call, after, before, subject.budget(call))


def many_headed(effort: str) -> tuple[Case, ...]:
    """Return calls with several value heads."""
    return battery.relation_cases_at(effort)[:2]


@pytest.mark.law("expanded-views-mean-copies", cases=many_headed)
def test_expanded_views_mean_what_copies_mean(subject: Subject, call: Call) -> None:
    """Gates, strengths and states that all heads share, and the cotangents of a sum, may be views of stride zero."""
    backward = subject.claims.backward
    views = misuse.shared_by_heads(subject.inputs(call))
    copies = misuse.arranged(views, torch.Tensor.contiguous)
    do, dfinal_state = (
        None if each is None else torch.ones_like(each[:1, :1, :1, :1]).expand(each.shape)
        for each in (call.case.cotangents(views) if backward else (None, None))
    )
    after = subject.run(call, views, (do, dfinal_state) if backward else None)
    budget = service.budget_of(copies, do, dfinal_state, subject.arithmetic(call))
    subject.judge(call, after, budget, copies)


@pytest.mark.law("results-are-not-overwritten", cases=battery.relation_cases_at)
def test_a_later_call_leaves_earlier_results_alone(subject: Subject, call: Call) -> None:
    """Results and gradients stay what they are when another call of their shapes is made."""
    backward = subject.claims.backward
    inputs = subject.inputs(call)
    cotangents = call.case.cotangents(inputs) if backward else None
    kept = subject.run(call, inputs, cotangents)
    copies = {name: tensor.clone() for name, tensor in kept.items()}
    subject.run(call, relations.disturb(inputs, slice(None)), cotangents)
    for name, tensor in kept.items():
        subject.same_bits(call, name, tensor, copies[name], "another call is made")


@pytest.mark.law("guard-bands", cases=battery.relation_cases_at)
def test_memory_around_the_inputs_is_not_read(subject: Subject, call: Call) -> None:
    """Tensors between bands of NaN mean what tensors alone mean, with gradients too."""
    inputs = misuse.guarded(subject.inputs(call))
    backward = subject.claims.backward
    before = subject.results(call, backward=backward)
    after = subject.run(call, inputs, call.case.cotangents(inputs) if backward else None)
    subject.agree(call, after, before, subject.budget(call))


@pytest.mark.law("uninitialised-memory-is-not-read", cases=battery.relation_cases_at)
def test_memory_that_nobody_wrote_is_not_read(subject: Subject, call: Call) -> None:
    """Results do not change where torch fills what it allocates with NaN."""
    backward = subject.claims.backward
    before = subject.results(call, backward=backward)
    inputs = subject.inputs(call)
    cotangents = call.case.cotangents(inputs) if backward else None
    with misuse.poisoned_allocations():
        after = subject.run(call, inputs, cotangents)
    subject.agree(call, after, before, subject.budget(call))


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
    for case in (each.replace(seed=call.case.seed) for each in histories("")):
        if case != call.case and case.num_tokens == call.case.num_tokens and case.unclaimed(subject.claims) is None:
            other = Call(case, call.dtype)
            subject.forward(other, subject.inputs(other))
    found = subject.forward(call, subject.inputs(call))
    assert found.final_state is not None
    subject.judge(call, {"o": found.o, "final_state": found.final_state}, subject.budget(call, backward=False))


def repacked(effort: str) -> tuple[Case, ...]:
    """Return a packed call whose offsets can be those of another one before it."""
    del effort
    return (Case.parse("T=21,50,6 H=1 G=2 K=16 V=16 gate=mixed seed=64"),)


@pytest.mark.law("offsets-are-read-at-every-call", cases=repacked)
def test_offsets_are_read_at_every_call(subject: Subject, call: Call) -> None:
    """Offsets are what the tensor holds when the call is made: a buffer filled anew, as by a captured graph, is no old acquaintance."""
    inputs = subject.inputs(call)
    assert inputs.cu_seqlens is not None
    buffer, wanted = inputs.cu_seqlens.flip(0), inputs.cu_seqlens.clone()
    buffer = inputs.q.shape[1] - buffer
    subject.forward(call, inputs.replace(cu_seqlens=buffer))
    buffer.copy_(wanted)
    found = subject.forward(call, inputs.replace(cu_seqlens=buffer))
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
    do, dfinal_state = call.case.cotangents(subject.inputs(call))
    turned = None if dfinal_state is None else dfinal_state.transpose(-1, -2).contiguous()
    after = subject.run(call, inputs, (do, turned) if backward else None)
    plain = {
        name: tensor.transpose(-1, -2) if name in ("final_state", "dinitial_state") else tensor
        for name, tensor in after.items()
    }
    subject.agree(call, plain, before, subject.budget(call))

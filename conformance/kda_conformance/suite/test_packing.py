"""Packed sequences do not see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance import relations
from kda_conformance.arithmetic import CLASSES
from kda_conformance.cases import Case

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject


def packed_cases(effort: str) -> tuple[Case, ...]:
    """Return the packed calls of the law, with empty and one-token sequences among them."""
    texts = (
        "T=37,64,0,1,65 H=1 G=2 K=16 V=24 gate=holes seed=60",
        "T=1,1,16,33 H=2 G=2 K=16 V=16 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=61",
        "T=15,0,17,63,2 H=1 G=1 K=24 V=16 gate=cliffs v_first=1 seed=62",
        "T=128,1 K=16 V=16 gate=zero state=0 seed=63",
    )
    return tuple(Case.parse(text) for text in (texts[:2] if effort in ("quick", "wide") else texts))


@pytest.mark.law("packed-equals-separate", cases=packed_cases)
def test_packed_sequences_equal_separate_ones(subject: Subject, call: Call) -> None:
    """Every sequence of a packed call equals the call with that sequence alone."""
    whole = subject.inputs(call)
    packed = subject.results(call, backward=False)
    deviation = {name: entry.variance.sqrt() for name, entry in subject.budget(call).items()}
    for row, (_, _, span) in enumerate(whole.segments()):
        if span.start == span.stop:
            continue
        alone = subject.forward(call, relations.sequence(whole, row, span))
        assert alone.final_state is not None
        subject.compare(call, "o", packed["o"][:, span], alone.o, deviation["o"][:, span])
        subject.compare(
            call,
            "final_state",
            packed["final_state"][row : row + 1],
            alone.final_state,
            deviation["final_state"][row : row + 1],
        )


@pytest.mark.law("empty-sequences-pass-the-state-through", cases=packed_cases)
def test_an_empty_sequence_passes_its_state_through(subject: Subject, call: Call) -> None:
    """The final state of a sequence without tokens is its initial state, bit for bit."""
    if 0 not in call.case.T:
        pytest.skip("not about this case: no empty sequence")
    if CLASSES[subject.claims.precision[call.dtype]].state != "fp32":
        pytest.skip("not about this class: it may round the state")
    inputs = subject.inputs(call)
    final = subject.results(call, backward=False)["final_state"]
    for row, length in enumerate(call.case.T):
        if length == 0:
            expected = torch.zeros_like(final[row]) if inputs.initial_state is None else inputs.initial_state[row]
            subject.same_bits(call, "final_state", final[row : row + 1], expected[None], "no token came")


@pytest.mark.law("sequences-are-independent", cases=packed_cases)
def test_changing_one_sequence_leaves_the_others_alone(subject: Subject, call: Call) -> None:
    """Other tokens and another state in one packed sequence change no bit of the others."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)
    row = max(range(len(call.case.T)), key=lambda n: call.case.T[n])
    start = sum(call.case.T[:row])
    span = slice(start, start + call.case.T[row])
    after = subject.forward(call, relations.disturb(inputs, span, state_rows=slice(row, row + 1)))
    assert after.final_state is not None
    for name, one, two in (
        ("o", before["o"].clone(), after.o.clone()),
        ("final_state", before["final_state"].clone(), after.final_state.clone()),
    ):
        changed = (slice(None), span) if name == "o" else (slice(row, row + 1),)
        one[changed], two[changed] = 0, 0
        subject.same_bits(call, name, one, two, f"only sequence {row} changes")


@pytest.mark.law("not-a-number-stays-in-its-sequence", cases=packed_cases)
def test_a_token_that_is_no_number_stays_in_its_sequence(subject: Subject, call: Call) -> None:
    """NaN in q, k and v of a token of the longest sequence changes no bit of the other sequences."""
    before = subject.results(call, backward=False)
    row = max(range(len(call.case.T)), key=lambda n: call.case.T[n])
    start, end = sum(call.case.T[:row]), sum(call.case.T[: row + 1])
    after = subject.forward(call, relations.poison(subject.inputs(call), ("q", "k", "v"), (start + end) // 2))
    assert after.final_state is not None
    what = f"sequence {row} holds NaN"
    for part in (slice(0, start), slice(end, None)):
        subject.same_bits(call, "o", after.o[:, part], before["o"][:, part], what)
    for rows in (slice(0, row), slice(row + 1, None)):
        subject.same_bits(call, "final_state", after.final_state[rows], before["final_state"][rows], what)

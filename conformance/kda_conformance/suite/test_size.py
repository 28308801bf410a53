"""Sizes at which 32-bit offsets and grids of 65535 programs end; on a GPU, at the effort ``wide``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kda_conformance import misuse, relations
from kda_conformance.cases import Case

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject


LAST = 64


def many_tokens(effort: str) -> tuple[Case, ...]:
    """Return a call of more tokens than a grid axis holds, elsewhere one of a hundred."""
    return (Case(T=(70_000 if effort == "wide" else 100,), K=16, V=16, gate="mixed", state=False, seed=95),)


@pytest.mark.law("sequences-may-be-many", cases=many_tokens)
def test_the_last_of_many_sequences_is_computed(subject: Subject, call: Call) -> None:
    """With every token a sequence of its own, more of them than a grid axis holds, the last sequences are right."""
    if not subject.claims.packed or not subject.claims.initial_state:
        pytest.skip("unclaimed: packed or initial_state")
    inputs = relations.every_token_a_sequence(subject.inputs(call), call.case.seed)
    found = subject.implementation.forward(inputs)
    assert found.final_state is not None
    tail = relations.last_sequences(inputs, LAST)
    budget = subject.budget(call, tail, backward=False)
    subject.judge(call, {"o": found.o[:, -LAST:], "final_state": found.final_state[-LAST:]}, budget, tail)


def far_apart(effort: str) -> tuple[Case, ...]:
    """Return a small call, which ``wide`` lays out with tokens gigabytes apart."""
    return (Case(T=(5,), H=2, G=2, K=16, V=16, seed=96 if effort == "wide" else 97),)


@pytest.mark.law("strides-may-be-large", cases=far_apart)
def test_tokens_may_lie_further_apart_than_32_bits_reach(subject: Subject, call: Call, effort: str) -> None:
    """q, k, v and the cotangent of o whose tokens are ``2^29`` elements apart mean what contiguous ones mean; fewer at lower efforts."""
    stride = 2**29 if effort == "wide" else 2**12
    inputs, backward = subject.inputs(call), subject.claims.backward
    before = subject.results(call, backward=backward)
    cotangents = None
    if backward:
        do, dfinal_state = call.case.cotangents(inputs)
        cotangents = (None if do is None else misuse.spread(do, stride), dfinal_state)
    after = subject.run(call, misuse.spread_tokens(inputs, stride), cotangents)
    subject.agree(call, after, before, subject.budget(call))

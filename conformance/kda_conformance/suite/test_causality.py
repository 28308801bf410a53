"""The past does not depend on the future, not by one bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kda_conformance import battery, relations
from kda_conformance.cases import Case

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject

CUTS = {"quick": 2, "wide": 2, "standard": 5, "exhaustive": 16}


@pytest.mark.law("prefix-causality", cases=battery.relation_cases_at)
def test_later_tokens_do_not_change_a_prefix(subject: Subject, call: Call, effort: str) -> None:
    """Changing q, k, v, g and beta from token t on changes no bit of the outputs before t."""
    _require(subject)
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)["o"]
    for cut in relations.split_points(call.case, CUTS[effort]):
        after = subject.forward(call, relations.disturb(inputs, slice(cut, None))).o
        subject.same_bits(call, "o", after[:, :cut], before[:, :cut], f"tokens from {cut} on change")


@pytest.mark.law("length-does-not-change-a-prefix", cases=battery.relation_cases_at)
def test_a_shorter_call_gives_the_same_prefix(subject: Subject, call: Call, effort: str) -> None:
    """Leaving out the tokens from t on leaves the outputs before t; another shape may sum in another order."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)["o"]
    deviation = subject.budget(call)["o"].variance.sqrt()
    for cut in relations.split_points(call.case, CUTS[effort]):
        shorter = subject.forward(call, relations.tokens(inputs, slice(0, cut))).o
        subject.compare(call, "o", shorter, before[:, :cut], deviation[:, :cut])


@pytest.mark.law("gradient-causality", cases=battery.relation_cases_at)
def test_gradients_of_a_loss_on_a_prefix_do_not_see_later_tokens(subject: Subject, call: Call) -> None:
    """With a loss on the outputs before t, other tokens from t on change no bit of the gradients before t, and have none."""
    _require(subject)
    if not subject.claims.backward:
        pytest.skip("unclaimed: backward")
    inputs = subject.inputs(call)
    (cut,) = relations.split_points(call.case, 1)
    do, _ = call.case.replace(cotangent="both").cotangents(inputs)
    assert do is not None
    do[:, cut:] = 0
    one = subject.evaluate(call, inputs, do, None)
    two = subject.evaluate(call, relations.disturb(inputs, slice(cut, None)), do, None)
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        subject.same_bits(call, name, two[name][:, :cut], one[name][:, :cut], f"tokens from {cut} on change")
        late = one[name][:, cut:]
        subject.same_bits(call, name, late, late * 0, f"the loss ends at token {cut}, so later gradients are zero")


LONGEST_CHUNK = 256


def long_call(effort: str) -> tuple[Case, ...]:
    """Return a call of more tokens than a chunk has."""
    del effort
    return (Case.parse("T=330 K=16 V=16 gate=mixed seed=65"),)


@pytest.mark.law("not-a-number-stays-in-its-chunk", cases=long_call)
def test_a_token_that_is_no_number_leaves_earlier_chunks_alone(subject: Subject, call: Call) -> None:
    """NaN in q, k and v of a token changes no bit of the outputs before its chunk; a chunk has at most 256 tokens."""
    _require(subject)
    inputs, at = subject.inputs(call), call.case.num_tokens - 10
    before = subject.results(call, backward=False)["o"]
    after = subject.forward(call, relations.poison(inputs, ("q", "k", "v"), at)).o
    kept = at - LONGEST_CHUNK + 1
    subject.same_bits(call, "o", after[:, :kept], before[:, :kept], f"token {at} holds NaN")


def _require(subject: Subject) -> None:
    if not subject.claims.prefix_causal:
        pytest.skip("unclaimed: prefix_causal")

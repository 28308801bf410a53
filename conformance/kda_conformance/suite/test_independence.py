"""Heads and batch rows do not see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kda_conformance import relations
from kda_conformance.cases import Case

if TYPE_CHECKING:
    from kda_conformance.subject import Call, Subject


def many_headed(effort: str) -> tuple[Case, ...]:
    """Return calls with several heads and rows."""
    texts = (
        "T=40 B=2 H=2 G=2 K=16 V=24 gate=mixed seed=70",
        "T=66 B=1 H=2 G=4 K=16 V=16 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=71",
        "T=33 B=3 H=1 G=3 K=24 V=16 gate=uniform v_first=1 seed=72",
    )
    return tuple(Case.parse(text) for text in (texts[:2] if effort in ("quick", "wide") else texts))


@pytest.mark.law("heads-are-independent", cases=many_headed)
def test_changing_one_value_head_leaves_the_others_alone(subject: Subject, call: Call) -> None:
    """Other v, g, beta and state in one value head change no bit of the other heads."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)
    head = call.case.G - 1
    after = subject.forward(call, relations.disturb_head(inputs, head))
    assert after.final_state is not None
    subject.same_bits(call, "o", after.o[:, :, :head], before["o"][:, :, :head], f"only value head {head} changes")
    subject.same_bits(
        call,
        "final_state",
        after.final_state[:, :head],
        before["final_state"][:, :head],
        f"only value head {head} changes",
    )


@pytest.mark.law("not-a-number-stays-in-its-head", cases=many_headed)
def test_a_value_that_is_no_number_stays_in_its_head(subject: Subject, call: Call) -> None:
    """NaN in v of one value head changes no bit of the other heads; masking by multiplication would spread it."""
    before = subject.results(call, backward=False)
    head = call.case.G - 1
    after = subject.forward(call, relations.poison_head(subject.inputs(call), head))
    assert after.final_state is not None
    what = f"v of value head {head} holds NaN"
    subject.same_bits(call, "o", after.o[:, :, :head], before["o"][:, :, :head], what)
    subject.same_bits(call, "final_state", after.final_state[:, :head], before["final_state"][:, :head], what)


@pytest.mark.law("not-a-number-stays-in-its-row", cases=many_headed)
def test_a_token_that_is_no_number_stays_in_its_row(subject: Subject, call: Call) -> None:
    """NaN in q, k and v of a token of the first batch row changes no bit of the other rows."""
    if call.case.B == 1:
        pytest.skip("not about this case: one batch row")
    before = subject.results(call, backward=False)
    after = subject.forward(call, relations.poison(subject.inputs(call), ("q", "k", "v"), call.case.num_tokens // 2))
    assert after.final_state is not None
    what = "the first row holds NaN"
    subject.same_bits(call, "o", after.o[1:], before["o"][1:], what)
    subject.same_bits(call, "final_state", after.final_state[1:], before["final_state"][1:], what)


@pytest.mark.law("rows-are-independent", cases=many_headed)
def test_a_batch_row_alone_gives_the_same_result(subject: Subject, call: Call) -> None:
    """Every row of a batch equals the call with that row alone."""
    if call.case.B == 1:
        pytest.skip("not about this case: one batch row")
    inputs = subject.inputs(call)
    whole = subject.results(call, backward=False)
    deviation = {name: entry.variance.sqrt() for name, entry in subject.budget(call).items()}
    for row in range(call.case.B):
        only = slice(row, row + 1)
        alone = subject.forward(call, relations.rows(inputs, only))
        assert alone.final_state is not None
        subject.compare(call, "o", whole["o"][only], alone.o, deviation["o"][only])
        subject.compare(
            call, "final_state", whole["final_state"][only], alone.final_state, deviation["final_state"][only]
        )


@pytest.mark.law("head-order-is-free", cases=many_headed)
def test_permuting_heads_permutes_the_result(subject: Subject, call: Call) -> None:
    """Reversing query/key groups and the value heads in them reverses the outputs."""
    inputs = subject.inputs(call)
    before = subject.results(call, backward=False)
    after = subject.forward(call, relations.reverse_heads(inputs))
    assert after.final_state is not None
    deviation = {name: entry.variance.sqrt() for name, entry in subject.budget(call).items()}
    subject.compare(call, "o", after.o.flip(2), before["o"], deviation["o"])
    subject.compare(call, "final_state", after.final_state.flip(1), before["final_state"], deviation["final_state"])

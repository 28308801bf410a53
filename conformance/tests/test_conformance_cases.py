"""Cases are text: every battery case reads back as itself and draws the same call twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kda_conformance import battery, exact, strategies
from kda_conformance.arithmetic import CLASSES
from kda_conformance.cases import Case
from kda_conformance.claims import Claims, UsageError
from kda_reference import check_inputs, check_values


@pytest.mark.parametrize("case", battery.cases_at("standard"), ids=str)
def test_a_case_reads_back_and_is_a_legal_call(case: Case) -> None:
    assert Case.parse(str(case)) == case
    one, two = case.inputs(torch.bfloat16), case.inputs(torch.bfloat16)
    check_inputs(one)
    check_values(one)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name])


@pytest.mark.parametrize("case", battery.cases_at("standard"), ids=str)
def test_another_draw_changes_every_tensor_that_is_drawn(case: Case) -> None:
    one, two = (each.inputs(torch.float32).tensors() for each in (case, case.redrawn(3)))
    drawn = {"q", "k", "v"} if case.num_tokens else set()
    assert all(not torch.equal(one[name], two[name]) for name in drawn | ({"initial_state"} & set(one)))
    assert Case.parse(str(case.redrawn(3))).redrawn(-3) == case


def test_another_draw_reaches_the_exact_problems() -> None:
    one, two = (next(exact.problems("float32", "cpu", Claims(), seed)) for seed in (0, 1))
    assert not torch.equal(one.inputs.v, two.inputs.v)


@pytest.mark.parametrize(
    ("dtype", "arithmetic", "bits"),
    [("bfloat16", "bf16", 8), ("bfloat16", "fp32", 8), ("float16", "fp16", 11), ("float32", "tf32", 11)],
)
def test_exact_problems_take_every_bit_of_an_operand_and_no_more(dtype: str, arithmetic: str, bits: int) -> None:
    largest = exact.largest_integer(dtype, CLASSES[arithmetic])
    assert 2 * largest < 2**bits <= 2 * (largest + 1)
    for problem in exact.problems(dtype, "cpu", Claims(precision={dtype: arithmetic}), 0):
        state = problem.inputs.initial_state
        assert state is not None
        assert largest * 0.9 < max(problem.inputs.v.abs().max(), state.abs().max()) <= largest


def test_sums_of_all_differences_of_an_exact_problem_are_exact_in_float32() -> None:
    largest = exact.largest_integer("float32", CLASSES["fp32"])
    assert max(length for length, *_ in exact.SIZES) * 2 * largest < 2**24


@given(data=st.data())
def test_generated_cases_stay_within_the_claims(data: st.DataObject) -> None:
    claims = Claims(packed=False, grouped_values=False, l2norm_in_kernel=False, max_k_width=16)
    assert data.draw(strategies.cases(claims, "float16")).unclaimed(claims) is None


@pytest.mark.parametrize("text", ["T", "T=x", "Z=3", "gate="])
def test_a_wrong_case_is_bad_usage(text: str) -> None:
    with pytest.raises(UsageError, match=r"case must be|must be a"):
        Case.parse(text)

"""Claims about activations: what a kernel always applies is never asked for applied, and nothing of it counts as a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kda_conformance import exact, strategies
from kda_conformance.cases import Case
from kda_conformance.claims import Claims, UsageError, narrow
from kda_conformance.implementation import FunctionImplementation
from kda_conformance.implementations.reference import Reference
from kda_conformance.subject import Call, Subject

if TYPE_CHECKING:
    from pathlib import Path

FUSED = narrow(Claims(), {"only_in_kernel": ["gate", "l2norm", "beta_sigmoid"], "unbounded_decay": False}, "test")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("T=5 gate_form=bounded l2norm=1 sigmoid=1", None),
        ("T=5 gate_form=softplus l2norm=1 sigmoid=1", "unbounded_decay"),
        ("T=5 safe=1 l2norm=1 sigmoid=1", "gate applied by the caller"),
        ("T=5 gate_form=bounded sigmoid=1", "l2norm applied by the caller"),
        ("T=5 gate_form=bounded l2norm=1", "beta_sigmoid applied by the caller"),
    ],
)
def test_a_call_that_applies_what_the_kernel_always_applies_is_not_claimed(text: str, missing: str | None) -> None:
    assert Case.parse(text).unclaimed(FUSED) == missing
    assert Case.parse(text).unclaimed(Claims()) is None


@given(data=st.data())
def test_calls_drawn_for_fused_kernels_leave_all_activations_to_them(data: st.DataObject) -> None:
    assert data.draw(strategies.cases(FUSED, "bfloat16")).unclaimed(FUSED) is None


def test_a_law_that_applies_an_activation_itself_is_unclaimed() -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError((arguments, options))

    call = Call(Case.parse("T=5 gate_form=bounded l2norm=1 sigmoid=1"), "float32")
    subject = Subject(implementation=FunctionImplementation(never, "fused"), claims=FUSED, device="cpu", spec="fused")
    changed = call.case.replace(gate_form="log_decay", safe=True).inputs(torch.float32)
    with pytest.raises(pytest.skip.Exception, match="unclaimed: gate applied by the caller"):
        subject.forward(call, changed)
    with pytest.raises(pytest.skip.Exception, match="unclaimed: gate applied by the caller"):
        subject.evaluate(call, changed, None, None)


def test_a_law_that_lifts_the_bound_is_unclaimed() -> None:
    claims = narrow(Claims(), {"unbounded_decay": False}, "test")
    subject = Subject(
        implementation=FunctionImplementation(lambda *_: None, "bounded"), claims=claims, device="cpu", spec=""
    )
    call = Call(Case.parse("T=5 safe=1"), "float32")
    with pytest.raises(pytest.skip.Exception, match="unclaimed: unbounded_decay"):
        subject.forward(call, call.case.replace(safe=False).inputs(torch.float32))


@given(data=st.data())
def test_calls_drawn_with_bounded_decays_and_gates_of_the_input_dtype_are_claimed(data: st.DataObject) -> None:
    claims = narrow(Claims(), {"unbounded_decay": False, "wide_gate": False}, "test")
    case = data.draw(strategies.cases(claims, "bfloat16"))
    assert case.unclaimed(claims) is None
    assert case.gate_dtype == "input"


def test_exact_problems_are_none_for_kernels_that_apply_everything() -> None:
    assert list(exact.problems("float32", "cpu", FUSED, 0)) == []


def test_an_activation_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="only_in_kernel must name activations"):
        narrow(Claims(), {"only_in_kernel": ["gelu"]}, "test")


def test_a_gate_gradient_that_is_no_sum_is_judged_without_the_allowance_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    call = Call(Case(T=(20,), K=8, V=8, gate="spikes", seed=1), "float32")
    allowed, strict = (
        Subject(
            implementation=Reference(),
            claims=narrow(Claims(), {"precision": "fp32", "cumulative_gate_gradient": cumulative}, "test"),
            device="cpu",
            spec="reference",
        ).budget(call)
        for cumulative in (True, False)
    )
    for name, entry in allowed.items():
        assert bool((strict[name].variance == entry.strict_variance).all())
        assert bool((entry.variance > entry.strict_variance).any()) == (name == "dg")

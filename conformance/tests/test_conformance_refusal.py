"""The budget refuses to judge with a truth that it cannot trust."""

from __future__ import annotations

import pytest
import torch
from kda_conformance.arithmetic import CLASSES
from kda_conformance.budget import compute_budget
from kda_conformance.cases import Case
from kda_reference import CertificateError


@pytest.mark.parametrize("arithmetic", ["fp32", "fp64"])
def test_a_truth_whose_bound_explodes_is_refused(arithmetic: str) -> None:
    dtype = CLASSES[arithmetic].input_dtype
    inputs = Case.parse("T=16 K=8 V=6 gate=zero keys=same strengths=one").inputs(dtype)
    compute_budget(inputs, None, None, CLASSES[arithmetic])
    # A key eight times too long stretches what the next, of unit length, erases. No norm can know that it is erased.
    length = torch.where(torch.arange(16) % 2 == 0, 8.0, 1.0).to(dtype)
    stretched = inputs.replace(k=inputs.k * length[:, None, None])
    with pytest.raises(
        CertificateError, match=r"of the reference must be certified within .* got the bound .* at index"
    ):
        compute_budget(stretched, None, None, CLASSES[arithmetic])


@pytest.mark.parametrize("factor", [1.0, 2.0**-40])
def test_a_state_that_decays_to_nothing_is_judged(factor: float) -> None:
    case = Case.parse("T=300 K=60 V=20 gate=uniform gate_form=log_decay cotangent=state seed=93")
    inputs = case.inputs(torch.float32)
    _, dfinal_state = case.cotangents(inputs)
    assert dfinal_state is not None
    budget = compute_budget(inputs, None, dfinal_state * factor, CLASSES["fp32"])["dinitial_state"]
    assert budget.value.abs().max() < 1e-100
    # Far below one float32 rounding of the cotangent.
    assert budget.variance.max().sqrt() < 1e-6 * 2.0**-24 * factor * dfinal_state.abs().max()

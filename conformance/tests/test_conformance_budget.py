"""What the budget is made of: roundings, windows of sums, and chunks that end anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kda_conformance import cumulative_sum
from kda_conformance.arithmetic import CLASSES
from kda_conformance.budget import compute_budget
from kda_conformance.cases import Case
from kda_conformance.judge import judge
from kda_conformance.service import budget_of
from kda_reference import chunkwise_kda

if TYPE_CHECKING:
    from pathlib import Path


def test_a_gate_gradient_is_granted_the_noise_of_the_tokens_after_it() -> None:
    per_token = torch.rand(1, 1, 1, 300, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = cumulative_sum._following(per_token)  # noqa: SLF001 - the sum itself
    for t in (0, 100, 172, 173, 299):
        expected = per_token[:, :, :, t : t + cumulative_sum.CHUNK].sum(3)
        torch.testing.assert_close(found[:, :, :, t], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [48, 100])
def test_chunks_that_end_where_no_member_ends_one_are_within_the_budget(chunk: int) -> None:
    case = Case.parse("T=150 K=16 V=16 gate=uniform gate_form=bounded l2norm=1 sigmoid=1 seed=25")
    inputs = case.inputs(torch.float32)
    budget = compute_budget(inputs, None, None, CLASSES["fp32"])
    o, _ = chunkwise_kda(dtype=torch.float32, **(inputs.keywords() | {"chunk_size": chunk}))
    assert judge("o", o, budget["o"]).score < 1


def test_a_budget_is_kept_for_tensors_of_one_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    inputs = Case.parse("T=3 K=1 V=7 v_first=1").inputs(torch.float32)
    for kept in (1, 1):
        budget_of(inputs, None, None, CLASSES["fp32"])
        assert len(list(tmp_path.iterdir())) == kept

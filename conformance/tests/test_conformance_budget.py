"""What the budget is made of: roundings, windows of sums, and chunks that end anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kda_conformance import budget, cumulative_sum
from kda_conformance.arithmetic import CLASSES
from kda_conformance.budget import compute_budget
from kda_conformance.cases import Case
from kda_conformance.implementation import FunctionImplementation
from kda_conformance.judge import judge
from kda_conformance.members import Members
from kda_conformance.planted.planting import variants
from kda_conformance.rounding import Rounder
from kda_conformance.service import budget_of
from kda_conformance.subject import Call, Subject
from kda_reference import certified_kda_vjp, chunkwise_kda

if TYPE_CHECKING:
    from pathlib import Path

    from kda_conformance.arithmetic import Arithmetic


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
    allowed = compute_budget(inputs, None, None, CLASSES["fp32"])
    o, _ = chunkwise_kda(dtype=torch.float32, **(inputs.keywords() | {"chunk_size": chunk}))
    assert judge("o", o, allowed["o"]).score < 1


# 7.2 bits a token, of a remainder next to a float32 number: few members round it to the other neighbour.
CONSTANT_GATE = "T=64 B=2 H=2 G=2 K=16 V=33 gate=bound gate_form=bounded keys=same values=sparse strengths=one state=0 scale=1 seed=879"
# Decayed keys that are subnormal in float16, beside values that are.
SUBNORMAL_KEYS = (
    "T=78 B=2 K=33 V=48 gate=holes gate_form=bounded keys=orthogonal values=tiny strengths=faint beta_max=2 "
    "sigmoid=1 v_first=1 seed=28103"
)


@pytest.mark.parametrize(
    ("variant", "tensor", "call"),
    [
        ("fp32-bits", "dk", CONSTANT_GATE),
        ("fp16-chunk64", "dbeta", SUBNORMAL_KEYS),
        ("fp16-throughout", "dbeta", SUBNORMAL_KEYS),
        ("fp16-wy", "dbeta", SUBNORMAL_KEYS),
    ],
)
def test_correct_variants_that_the_null_study_called_wrong_are_within_the_budget(
    variant: str, tensor: str, call: str
) -> None:
    entry = variants()[variant]
    implementation = FunctionImplementation(entry.function(), variant)
    (dtype,) = implementation.claims.precision
    subject = Subject(
        implementation=implementation, claims=implementation.claims, device="cpu", spec=variant, law="", test=""
    )
    found = Call(Case.parse(call), dtype)
    inputs = subject.inputs(found)
    cotangents = found.case.cotangents(inputs)
    got = subject.evaluate(found, inputs, *cotangents)
    allowed = budget_of(inputs, *cotangents, CLASSES[entry.precision])
    assert judge(tensor, got[tensor], allowed[tensor]).score < 0.8


@pytest.mark.parametrize("group", budget.GROUPS, ids=str)
def test_a_member_that_rounds_nothing_is_the_truth(group: budget.Group) -> None:
    case = Case.parse("T=150 H=2 G=4 K=5 V=3 gate=layer gate_form=softplus l2norm=1 sigmoid=1 beta_max=2 seed=7")
    inputs = case.inputs(torch.float32).replace(output_final_state=True)
    cotangents = case.cotangents(inputs)
    truth = certified_kda_vjp(inputs, *cotangents)
    nothing = Rounder(0, 1, inputs.q.device, "truncate")  # cuts tf32 operands only, which this class has none of
    found = Members(inputs, *cotangents).chunkwise(nothing, group.choose(CLASSES["fp32"]), group.chunk)
    for name, value in truth.value.items():
        torch.testing.assert_close(found[name][0], value, rtol=0, atol=1e-12 * float(value.abs().max()), msg=name)


def test_float16_beside_truncated_operands_may_round_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, int]] = []

    class Counted(Members):
        def chunkwise(self, rounder: Rounder, arithmetic: Arithmetic, chunk: int) -> dict[str, torch.Tensor]:
            runs.append((rounder.mode, chunk))
            return super().chunkwise(rounder, arithmetic, chunk)

    monkeypatch.setattr(budget, "Members", Counted)
    inputs = Case.parse("T=3 K=2 V=2 seed=1").inputs(torch.float16)
    for name, expected in (("fp16-tf32", budget.NEAREST_CHUNKS), ("fp16", budget.NEAREST_CHUNKS), ("tf32", ())):
        runs.clear()
        compute_budget(inputs, None, None, CLASSES[name])
        assert [chunk for mode, chunk in runs if mode == "nearest"] == list(expected)


def test_a_budget_is_kept_for_tensors_of_one_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    inputs = Case.parse("T=3 K=1 V=7 v_first=1").inputs(torch.float32)
    for kept in (1, 1):
        budget_of(inputs, None, None, CLASSES["fp32"])
        assert len(list(tmp_path.iterdir())) == kept

"""The time of a call on a CPU, for an implementation that is right on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance.bench import SEED
from kda_conformance.contenders import KdaContender
from kda_conformance.workloads import catalogue, select

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from kda_conformance.subject import Subject
    from kda_conformance.workloads import Workload


@pytest.mark.parametrize("workload", select(catalogue("cpu"), ["quick"]), ids=lambda workload: str(workload.name))
def test_speed(subject: Subject, benchmark: BenchmarkFixture, workload: Workload) -> None:
    """Judged first: a red gate fails here, and nothing is timed."""
    side = KdaContender(subject.spec, "cpu")
    judged = side.judge(workload)
    if judged.outcome == "unclaimed":
        pytest.skip(judged.message)
    assert judged.outcome == "measured", judged.message
    cotangents = workload.cotangents(SEED, "cpu") if workload.backward else None
    call = side.prepare(workload.inputs(SEED, "cpu"), cotangents)
    with torch.set_grad_enabled(workload.backward):
        benchmark(call)

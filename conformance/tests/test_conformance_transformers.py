"""The torch fallbacks of transformers are what is judged under their names, whatever else is installed."""

from __future__ import annotations

import functools

import pytest
import torch
from kda_conformance.cases import Case

kimi_linear = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")


@pytest.mark.parametrize("name", ["TransformersChunk", "TransformersRecurrent"])
def test_kernels_that_transformers_would_call_instead_are_not_judged(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kda_conformance.implementations import transformers  # noqa: PLC0415 - only where transformers is installed

    for function in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):

        @functools.wraps(getattr(kimi_linear, function))
        def kernel(*arguments: object, **options: object) -> None:
            pytest.fail(f"a kernel was called: {arguments}, {options}")

        monkeypatch.setattr(kimi_linear, function, kernel)
    inputs = Case.parse("T=5 K=8 V=8").inputs(torch.float32)
    assert getattr(transformers, name)().forward(inputs).o.isfinite().all()

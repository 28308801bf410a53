"""Arguments that contradict the contract are refused before any launch, with the right error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kda_optimized
import pytest
import torch
from kda_optimized import chunkwise, interpreter
from kda_reference.errors import DeviceError, DomainError, DtypeError, KdaError, PackingError, ShapeError
from optimized_calls import Calls, evaluate

if TYPE_CHECKING:
    from collections.abc import Callable

BOTH = pytest.mark.parametrize(
    "function", [kda_optimized.chunk_kda, kda_optimized.fused_recurrent_kda], ids=["chunk", "recurrent"]
)


@BOTH
@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"q": torch.zeros(1, 5, 1, 16, dtype=torch.float64)}, DtypeError, "dtype"),
        ({"g": torch.zeros(1, 5, 1, 16, dtype=torch.float64)}, DtypeError, "float32"),
        ({"beta": torch.zeros(1, 4, 1)}, ShapeError, "axis T"),
        ({"chunk_size": 0}, DomainError, "chunk_size"),
        ({"cu_seqlens": torch.tensor([0, 4])}, PackingError, "end at"),
        (
            {"q": torch.zeros(1, 5, 1, 257), "k": torch.zeros(1, 5, 1, 257), "g": torch.zeros(1, 5, 1, 257)},
            DomainError,
            "256",
        ),
    ],
    ids=["float64 q", "float64 g", "short beta", "chunk", "packing", "width"],
)
def test_contradictions_are_refused_before_any_launch(
    calls: Calls,
    function: Callable[..., Any],
    changes: dict[str, Any],
    error: type[KdaError],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[object] = []
    monkeypatch.setattr(chunkwise, "submit", launched.append)
    with pytest.raises(error, match=word):
        evaluate(calls(T=5, **changes), function)
    assert not launched


def test_all_float64_is_refused_with_the_dtype_to_use(calls: Calls) -> None:
    inputs = calls(T=3)
    with pytest.raises(DtypeError, match="convert it to float32"):
        evaluate(inputs.replace(**{name: tensor.double() for name, tensor in inputs.tensors().items()}))


@BOTH
def test_unknown_keywords_are_refused(calls: Calls, function: Callable[..., Any]) -> None:
    x = calls(T=3)
    with pytest.raises(TypeError, match="unknown"):
        function(x.q, x.k, x.v, x.g, x.beta, unknown=1)


def test_cpu_tensors_are_refused_when_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "is_interpreted", lambda: False)
    with pytest.raises(DeviceError, match="TRITON_INTERPRET=1"):
        interpreter.check_device(torch.device("cpu"))


@pytest.mark.parametrize("chunk_size", [1, 16, 17, 32, 64, 128])
def test_chunk_size_changes_nothing_beyond_rounding(calls: Calls, chunk_size: int) -> None:
    inputs = calls(T=70)
    assert torch.allclose(evaluate(inputs).o, evaluate(inputs.replace(chunk_size=chunk_size)).o, rtol=0, atol=1e-5)


def test_state_is_returned_only_when_asked_for(calls: Calls) -> None:
    assert evaluate(calls(T=3, output_final_state=False)).final_state is None

"""Calls captured in CUDA graphs and compiled by Inductor give the bits of eager calls."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import kda_optimized
import pytest
import torch
from kda_optimized import graph_capture, packing
from kda_optimized.launch import recorded
from optimized_calls import DEVICE, Calls, differentiate, evaluate, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kda_reference.contract import KdaInputs
    from torch import Tensor

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOTH = pytest.mark.parametrize(
    "function", [kda_optimized.chunk_kda, kda_optimized.fused_recurrent_kda], ids=["chunk", "recurrent"]
)


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def training_call(calls: Calls, **changes: Any) -> tuple[KdaInputs, Tensor, Tensor]:
    inputs = calls.gated(
        dtype=torch.bfloat16, T=200, H=2, K=64, V=64, initial_state=calls.normal(1, 2, 64, 64), **changes
    )
    do = calls.normal(*inputs.v.shape).to(inputs.v.dtype).to(DEVICE)
    return inputs, do, calls.normal(*inputs.state_shape).to(DEVICE)


def all_results(inputs: KdaInputs, do: Tensor, dfinal: Tensor, function: Callable[..., Any]) -> dict[str, Tensor]:
    """Return results and gradients by name."""
    result, gradients = differentiate(inputs, do, dfinal, function)
    return {"o": result.o, "final_state": state_of(result), **gradients}


@BOTH
def test_a_call_without_offsets_reads_nothing_on_the_host_and_one_with_reads_them_once(
    calls: Calls, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calls.gated(T=20, H=1, K=16, V=16, initial_state=calls.normal(1, 1, 16, 16))
    offsets = torch.tensor([0, 7, 20], device=DEVICE)
    do, dfinal = torch.ones_like(whole.v), torch.ones(whole.state_shape, device=DEVICE)
    reads: list[Tensor] = []

    def reading(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(self: Tensor, *arguments: Any, **options: Any) -> Any:
            if self.device.type == "cuda" or self is offsets or self.is_floating_point():
                reads.append(self)
            return original(self, *arguments, **options)

        return read

    with recorded():
        differentiate(whole, do, dfinal, function)  # makes the tables
        for name in ("tolist", "item", "cpu", "numpy", "to", "__bool__", "__int__", "__float__", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, reading(name))
        differentiate(whole, do, dfinal, function)
        assert not reads
        differentiate(whole.replace(cu_seqlens=offsets, initial_state=None), do, None, function)
        assert [tensor is offsets for tensor in reads] == [True]


def test_tables_are_made_by_another_thread_than_a_graph_lends_memory_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    threads = [graph_capture.outside_pools(threading.get_ident, torch.device(kind)) for kind in ("cuda", "cpu")]
    assert threads[0] != threading.get_ident()
    assert threads[1] == threading.get_ident()


def test_tables_that_a_graph_reads_are_kept_and_others_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    device, tables = torch.device("cuda"), [object(), object()]
    monkeypatch.setattr(graph_capture, "captured", {})
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)  # noqa: B023 - called in this turn
        assert graph_capture.hold(tables[capturing], device) is tables[capturing]
    assert list(graph_capture.captured.values()) == tables[1:]


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of a call that was made once before, and what the call returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


@ON_CUDA
@BOTH
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_replayed_graph_gives_the_bits_of_a_call(calls: Calls, packed: bool, function: Callable[..., Any]) -> None:  # noqa: FBT001
    # Offsets on the host can be read while a graph is captured; the graph repeats them.
    changes = {"cu_seqlens": torch.tensor([0, 200])} if packed else {}
    inputs, do, dfinal = training_call(calls)
    inputs = inputs.replace(**changes)
    graph, found = capture(lambda: all_results(inputs, do, dfinal, function))
    packing._schedule.cache_clear()  # noqa: SLF001 - as many other calls would
    packing._segments.cache_clear()  # noqa: SLF001 - likewise
    others = [torch.full((2**12,), -1, device=DEVICE) for _ in range(64)]  # where dropped tables would have been
    for name in ("q", "v", "g"):
        getattr(inputs, name).copy_(calls.normal(*getattr(inputs, name).shape))
    graph.replay()
    torch.cuda.synchronize()
    expected = all_results(inputs, do, dfinal, function)
    assert all(bool((other == -1).all()) for other in others)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@ON_CUDA
@BOTH
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice on products that the graph has none of
# The graph that torch opens to keep its pool of memory holds no kernel.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_inductor_gives_the_bits_of_a_call(
    calls: Calls,
    mode: str,
    packed: bool,  # noqa: FBT001
    function: Callable[..., Any],
) -> None:
    inputs, do, dfinal = training_call(calls)
    if packed:
        inputs = inputs.replace(cu_seqlens=torch.tensor([0, 200], device=DEVICE))
    expected = all_results(inputs, do, dfinal, function)
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(4):  # compiled, warmed up, captured, replayed
        torch.compiler.cudagraph_mark_step_begin()
        found = all_results(inputs, do, dfinal, compiled)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@ON_CUDA
def test_decoding_can_be_captured_step_by_step(calls: Calls) -> None:
    inputs = calls.gated(dtype=torch.bfloat16, B=1, T=1, H=2, K=64, V=64, initial_state=calls.normal(1, 2, 64, 64))
    with torch.no_grad():
        graph, found = capture(lambda: evaluate(inputs, kda_optimized.fused_recurrent_kda))
        graph.replay()
        expected = evaluate(inputs, kda_optimized.fused_recurrent_kda)
    assert torch.equal(found.o, expected.o)
    assert torch.equal(state_of(found), state_of(expected))

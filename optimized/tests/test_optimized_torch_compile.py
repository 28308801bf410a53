"""Under ``torch.compile`` a call is one operator, and bit for bit what it is without."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import kda_optimized
import pytest
import torch
from kda_optimized import custom_ops
from kda_optimized.derivative import arguments_of
from kda_optimized.launch import recorded
from kda_reference.contract import TENSOR_ARGUMENTS
from kda_reference.errors import PackingError
from optimized_calls import DEVICE, Calls, differentiate, evaluate, state_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kda_reference.contract import KdaInputs

BOTH = pytest.mark.parametrize(
    "function", [kda_optimized.chunk_kda, kda_optimized.fused_recurrent_kda], ids=["chunk", "recurrent"]
)


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def cases(calls: Calls) -> dict[str, KdaInputs]:
    """Return calls that differ in which arguments are present."""
    gated = calls.gated(
        dtype=torch.bfloat16, T=17, H=1, G=2, K=16, V=20, initial_state=calls.normal(1, 2, 16, 20), scale=0.3
    )
    plain = calls(B=2, T=7, output_final_state=False)
    packed = calls(
        T=40, cu_seqlens=torch.tensor([0, 3, 3, 40], dtype=torch.int32), initial_state=calls.normal(3, 1, 16, 16)
    )
    return {"gated": gated, "plain": plain, "packed": packed}


@BOTH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["gated", "plain", "packed"])
def test_compiled_calls_are_eager_calls_bit_for_bit(
    calls: Calls, function: Callable[..., Any], backend: str, case: str
) -> None:
    inputs = cases(calls)[case]
    do = calls.normal(*inputs.v.shape).to(inputs.v.dtype).to(DEVICE)
    dfinal = calls.normal(*inputs.state_shape).to(DEVICE) if inputs.output_final_state else None
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    result, gradients = differentiate(inputs, do, dfinal, compiled)
    expected, expected_gradients = differentiate(inputs, do, dfinal, function)
    assert torch.equal(result.o, expected.o)
    assert torch.equal(evaluate(inputs, compiled).o, expected.o)
    if dfinal is None:
        assert result.final_state is None
    else:
        assert torch.equal(state_of(result), state_of(expected))
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


def test_one_graph_serves_all_lengths(calls: Calls) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kda_optimized.chunk_kda, fullgraph=True, dynamic=True, backend=counter)
    for T in (20, 17, 33):
        inputs = calls(T=T)
        assert torch.equal(evaluate(inputs, compiled).o, evaluate(inputs).o)
    assert counter.frame_count == 1


def test_a_graph_reads_its_offsets_at_every_call(calls: Calls) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kda_optimized.chunk_kda, fullgraph=True, backend=counter)
    inputs = calls(T=20)
    for middle in (7, 17):
        packed = inputs.replace(cu_seqlens=torch.tensor([0, middle, 20], device=DEVICE))
        assert torch.equal(evaluate(packed, compiled).o, evaluate(packed).o)
    assert counter.frame_count == 1


@BOTH
def test_what_surrounds_a_call_is_compiled_with_it(calls: Calls, function: Callable[..., Any]) -> None:
    inputs = calls(T=20)

    def layer(x: torch.Tensor) -> torch.Tensor:
        o, _ = function(inputs.q, inputs.k, x.sin(), inputs.g, inputs.beta)
        return o.cos()  # type: ignore[no-any-return]

    x = inputs.v.detach().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (found,), (expected,) = (torch.autograd.grad(run(x).sum(), x) for run in (compiled, layer))
    assert torch.equal(found, expected)


def test_a_graph_computes_gradients_of_what_requires_them_only(calls: Calls) -> None:
    inputs = calls(T=20, initial_state=calls.normal(1, 1, 16, 16))
    v = inputs.v.detach().requires_grad_()
    compiled = torch.compile(kda_optimized.chunk_kda, fullgraph=True, backend="aot_eager")
    o = evaluate(inputs.replace(v=v), compiled).o
    with recorded() as launches:
        torch.autograd.grad(o, v, torch.ones_like(o))
    assert [launch.name for launch in launches] == ["kda_chunk_bwd_prepare_kernel", "kda_chunk_bwd_walk_kernel"]


@pytest.mark.parametrize("case", ["gated", "plain", "packed"])
def test_operators_are_what_torch_demands_of_operators(calls: Calls, case: str) -> None:
    inputs = cases(calls)[case]
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}
    prefix = "kda::" if inputs.cu_seqlens is None else "kda::packed_"
    forward = custom_ops.whole if inputs.cu_seqlens is None else custom_ops.packed
    torch.library.opcheck(forward, arguments_of(inputs.replace(**leaves), recurrent=False))
    do = torch.ones_like(inputs.v)
    needed = [name in ("k", "v", "A_log") and getattr(inputs, name) is not None for name in TENSOR_ARGUMENTS]
    backward = getattr(torch.ops.kda, f"{prefix.removeprefix('kda::')}backward").default
    torch.library.opcheck(backward, (*arguments_of(inputs, recurrent=False), do, None, needed))


def test_contradictions_are_refused_while_compiling(calls: Calls) -> None:
    compiled = torch.compile(kda_optimized.chunk_kda, fullgraph=True, backend="eager")
    with (
        recorded() as launches,
        pytest.raises(RuntimeError, match="beta must agree with q on axis T, got 19 against 20"),
    ):
        evaluate(calls(T=20, beta=calls.uniform(1, 19, 1)), compiled)
    assert not launches


def test_offsets_are_refused_by_what_they_hold_when_the_graph_runs(calls: Calls) -> None:
    compiled = torch.compile(kda_optimized.chunk_kda, fullgraph=True, backend="eager")
    with recorded() as launches, pytest.raises(PackingError, match="end at T=20, got 19"):
        evaluate(calls(T=20, cu_seqlens=torch.tensor([0, 3, 19])), compiled)
    assert not launches


@BOTH
def test_fake_tensors_give_shapes_without_a_launch(calls: Calls, function: Callable[..., Any]) -> None:
    inputs = calls(dtype=torch.bfloat16, T=20, H=1, G=2, V=24)
    with FakeTensorMode() as mode, recorded() as launches:
        fakes = {name: mode.from_tensor(tensor).requires_grad_() for name, tensor in inputs.tensors().items()}
        result = evaluate(inputs.replace(**fakes), function)
        gradients = torch.autograd.grad(result.o, list(fakes.values()), torch.ones_like(result.o))
    assert not launches
    assert (result.o.shape, result.o.dtype) == (inputs.v.shape, torch.bfloat16)
    assert tuple(state_of(result).shape) == inputs.state_shape
    for gradient, fake in zip(gradients, fakes.values(), strict=True):
        assert (gradient.shape, gradient.dtype) == (fake.shape, fake.dtype)


@BOTH
def test_an_exported_program_holds_the_call_as_one_operator(calls: Calls, function: Callable[..., Any]) -> None:
    class Layer(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return function(*tensors)[0]  # type: ignore[no-any-return]

    x = calls(T=20)
    tensors = (x.q, x.k, x.v, x.g, x.beta)
    program = torch.export.export(Layer(), tensors)
    called = [node.target for node in program.graph.nodes if node.target == torch.ops.kda.forward.default]
    assert len(called) == 1
    assert torch.equal(program.module()(*tensors), evaluate(x, function).o)


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_may_save_the_call(calls: Calls, saved: bool) -> None:  # noqa: FBT001
    x = calls(T=20)
    v = x.v.detach().requires_grad_()

    def policy(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
        wanted = saved and operator == torch.ops.kda.forward.default
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(v: torch.Tensor) -> torch.Tensor:
        return evaluate(x.replace(v=v.sin())).o.cos()

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with recorded() as launches:
        checkpoint(layer, v, use_reentrant=False, context_fn=contexts).sum().backward()
    names = [launch.name for launch in launches]
    assert names.count("kda_chunk_fwd_walk_kernel") == (1 if saved else 2)
    assert names.count("kda_chunk_bwd_walk_kernel") == 1

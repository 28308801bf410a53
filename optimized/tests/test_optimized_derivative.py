"""A call in the derivative graph: what is asked for is computed, nothing else is, and what surrounds the call changes no bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kda_optimized
import pytest
import torch
from kda_optimized.backward import chunk_backward
from kda_optimized.launch import recorded
from optimized_calls import DEVICE, Calls, differentiate, evaluate, state_of
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from kda_reference.contract import KdaInputs
    from torch import Tensor

BOTH = pytest.mark.parametrize(
    "function", [kda_optimized.chunk_kda, kda_optimized.fused_recurrent_kda], ids=["chunk", "recurrent"]
)
WALKS = ("prepare", "walk")
PAIRS = ("prepare", "states", "walk", "pairs")
CHANNELS = (*PAIRS, "channels")
LAUNCHES = {
    ("v",): WALKS,
    ("initial_state",): WALKS,
    ("v", "initial_state"): WALKS,
    ("beta",): PAIRS,
    ("beta", "v"): PAIRS,
    ("g",): CHANNELS,
    ("A_log",): CHANNELS,
    ("dt_bias", "v"): CHANNELS,
    ("q",): (*CHANNELS, "heads"),
    ("k", "beta"): (*CHANNELS, "heads"),
    ("q", "k", "v", "g", "beta"): (*CHANNELS, "heads"),
}
SUBSETS = pytest.mark.parametrize("names", LAUNCHES, ids="+".join)


def training_call(calls: Calls, **changes: Any) -> tuple[KdaInputs, Tensor, Tensor]:
    """Return a call of two spans whose value heads share queries and keys, and cotangents of both results."""
    sizes = {"T": 20, "H": 1, "G": 2, "K": 16, "V": 20, "chunk_size": 16} | changes
    inputs = calls.gated(
        dtype=torch.bfloat16, initial_state=calls.normal(1, sizes["G"], sizes["K"], sizes["V"]), **sizes
    )
    do = calls.normal(*inputs.v.shape).to(inputs.v.dtype).to(DEVICE)
    return inputs, do, calls.normal(*inputs.state_shape).to(DEVICE)


def steps(launches: list[Any]) -> tuple[str, ...]:
    """Return the steps of a backward by name, in order."""
    return tuple(launch.name.removeprefix("kda_chunk_bwd_").removesuffix("_kernel") for launch in launches)


def some_gradients(
    inputs: KdaInputs, names: tuple[str, ...], do: Tensor, dfinal: Tensor, function: Callable[..., Any]
) -> dict[str, Tensor | None]:
    """Return what autograd leaves in ``grad`` of every tensor where only the named ones require gradients."""
    leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.tensors().items()}
    result = evaluate(inputs.replace(**leaves), function)
    torch.autograd.backward((result.o, state_of(result)), (do, dfinal))
    return {name: leaf.grad for name, leaf in leaves.items()}


@BOTH
def test_gradients_do_not_depend_on_what_else_is_asked_for(calls: Calls, function: Callable[..., Any]) -> None:
    inputs, do, dfinal = training_call(calls)
    _, whole = differentiate(inputs, do, dfinal, function)
    # The backward is the same for both, so one of each kind will do for the second.
    subsets = list(LAUNCHES) if function is kda_optimized.chunk_kda else list(LAUNCHES)[2::3]
    for names in subsets:
        found = some_gradients(inputs, names, do, dfinal, function)
        for name, gradient in found.items():
            if name in names:
                assert gradient is not None
                assert torch.equal(gradient, whole[name]), (names, name)
            else:
                assert gradient is None


@SUBSETS
def test_no_kernel_is_started_and_nothing_stored_for_what_nobody_asks_for(calls: Calls, names: tuple[str, ...]) -> None:
    inputs, do, dfinal = training_call(calls)
    with recorded() as launches:
        found = chunk_backward(inputs, do, dfinal, names)
    assert set(found) == set(names)
    assert steps(launches) == LAUNCHES[names]
    stores = {
        "dv": "v",
        "dinitial_state": "initial_state",
        "dbeta": "beta",
        "dA_parts": "A_log",
        "dbias_parts": "dt_bias",
    }
    for launch in launches:
        for argument, value in launch.arguments.items():
            if argument in stores:
                assert (value is not None) == (stores[argument] in names), (launch.name, argument)
            if argument in ("states", "dstates", "dscores"):
                assert (value is not None) == ("channels" in LAUNCHES[names]), (launch.name, argument)
            if argument == "pulled":
                assert (value is not None) == ("pairs" in LAUNCHES[names]), launch.name


def test_heads_of_their_own_need_no_sum(calls: Calls) -> None:
    inputs, do, dfinal = training_call(calls, H=2)
    for names in (("q",), ("k",), ("q", "k")):
        with recorded() as launches:
            chunk_backward(inputs, do, dfinal, names)
        assert steps(launches) == CHANNELS


@BOTH
def test_a_call_without_gradients_keeps_nothing(calls: Calls, function: Callable[..., Any]) -> None:
    inputs, _, _ = training_call(calls)
    assert evaluate(inputs, function).o.grad_fn is None
    with torch.no_grad():
        assert evaluate(inputs.replace(v=inputs.v.requires_grad_()), function).o.grad_fn is None


@BOTH
def test_gradients_have_no_gradients(calls: Calls, function: Callable[..., Any]) -> None:
    inputs, do, _ = training_call(calls)
    v = inputs.v.requires_grad_()
    (dv,) = torch.autograd.grad(evaluate(inputs.replace(v=v), function).o, v, do.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dv.sum().backward()


@BOTH
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_changes_no_bit(calls: Calls, use_reentrant: bool, function: Callable[..., Any]) -> None:  # noqa: FBT001
    inputs, do, dfinal = training_call(calls)
    plain, plain_gradients = differentiate(inputs, do, dfinal, function)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        result = evaluate(inputs.replace(**dict(zip(leaves, tensors, strict=True))), function)
        return result.o, state_of(result)

    o, final_state = checkpoint(run, *leaves.values(), use_reentrant=use_reentrant)
    torch.autograd.backward((o, final_state), (do, dfinal))
    assert torch.equal(o, plain.o)
    assert torch.equal(final_state, state_of(plain))
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, plain_gradients[name]), name


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_changes_no_bit_and_no_dtype(calls: Calls, dtype: torch.dtype, function: Callable[..., Any]) -> None:
    inputs, do, dfinal = training_call(calls)
    inputs = inputs.replace(**{name: getattr(inputs, name).to(dtype) for name in ("q", "k", "v")})
    do = do.to(dtype)
    plain, plain_gradients = differentiate(inputs, do, dfinal, function)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result, gradients = differentiate(inputs, do, dfinal, function)
    assert result.o.dtype == dtype
    assert torch.equal(result.o, plain.o)
    assert torch.equal(state_of(result), state_of(plain))
    assert all(torch.equal(gradients[name], plain_gradients[name]) for name in gradients)
    assert all(gradients[name].dtype == tensor.dtype for name, tensor in inputs.tensors().items())


@BOTH
def test_a_backward_sees_the_offsets_of_its_forward(calls: Calls, function: Callable[..., Any]) -> None:
    offsets = torch.tensor([0, 7, 20], device=DEVICE)
    inputs, do, _ = training_call(calls, cu_seqlens=offsets)
    inputs = inputs.replace(initial_state=None)
    _, expected = differentiate(inputs, do, None, function)
    v = inputs.v.detach().requires_grad_()
    o = evaluate(inputs.replace(v=v), function).o
    offsets[1] = 12
    (dv,) = torch.autograd.grad(o, v, do)
    assert torch.equal(dv, expected["v"])

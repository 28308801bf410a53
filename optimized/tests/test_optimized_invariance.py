"""Bit-for-bit laws: what may not change a result at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kda_optimized
import pytest
import torch
from optimized_calls import DEVICE, Calls, differentiate, evaluate, state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kda_reference.contract import KdaInputs

BOTH = pytest.mark.parametrize(
    "function", [kda_optimized.chunk_kda, kda_optimized.fused_recurrent_kda], ids=["chunk", "recurrent"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def with_other_future(inputs: KdaInputs, token: int, calls: Calls) -> KdaInputs:
    """Return the call with everything from a token on replaced by values of other magnitudes."""
    changed = {}
    for name in ("q", "k", "v", "g", "beta"):
        tensor = getattr(inputs, name).clone()
        tail = calls.normal(*tensor[:, token:].shape).to(DEVICE) * (1e4 if name == "v" else 1)
        tensor[:, token:] = (-100 * tail.abs() if name == "g" else tail).to(tensor.dtype)
        changed[name] = tensor
    return inputs.replace(**changed)


def head_of(inputs: KdaInputs, tokens: int) -> KdaInputs:
    return inputs.replace(**{name: getattr(inputs, name)[:, :tokens] for name in ("q", "k", "v", "g", "beta")})


@BOTH
@DTYPES
@pytest.mark.parametrize("token", [1, 7, 16, 22, 33, 63, 64, 69])
def test_later_tokens_do_not_move_earlier_outputs(
    calls: Calls, dtype: torch.dtype, token: int, function: Callable[..., Any]
) -> None:
    inputs = calls(dtype=dtype, T=70, initial_state=calls.normal(1, 1, 16, 16))
    o = evaluate(inputs, function).o[:, :token]
    assert torch.equal(o, evaluate(with_other_future(inputs, token, calls), function).o[:, :token])
    assert torch.equal(o, evaluate(head_of(inputs, token), function).o)


@DTYPES
@pytest.mark.parametrize("token", [5, 22, 47, 64])
def test_later_tokens_do_not_move_gradients_of_an_earlier_loss(calls: Calls, dtype: torch.dtype, token: int) -> None:
    inputs = calls(dtype=dtype, T=70)
    do = calls.normal(*inputs.v.shape).to(dtype).to(DEVICE)
    do[:, token:] = 0
    _, found = differentiate(inputs, do, None)
    _, other = differentiate(with_other_future(inputs, token, calls), do, None)
    _, short = differentiate(head_of(inputs, token), do[:, :token], None)
    for name in ("q", "k", "v", "g", "beta"):
        assert torch.equal(found[name][:, :token], other[name][:, :token]), name
        assert torch.equal(found[name][:, :token], short[name]), name


@BOTH
@DTYPES
def test_packed_sequences_equal_separate_ones(calls: Calls, dtype: torch.dtype, function: Callable[..., Any]) -> None:
    lengths = [0, 1, 37, 0, 64, 65, 3, 0]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    packed = calls(
        dtype=dtype,
        T=offsets[-1],
        H=2,
        cu_seqlens=torch.tensor(offsets),
        initial_state=calls.normal(len(lengths), 2, 16, 16),
    )
    assert packed.initial_state is not None
    do, dfinal = calls.normal(*packed.v.shape).to(dtype).to(DEVICE), calls.normal(*packed.state_shape).to(DEVICE)
    result, gradients = differentiate(packed, do, dfinal, function)
    for i, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        alone = packed.replace(
            cu_seqlens=None,
            initial_state=packed.initial_state[i : i + 1],
            **{name: getattr(packed, name)[:, start:end] for name in ("q", "k", "v", "g", "beta")},
        )
        single, single_gradients = differentiate(alone, do[:, start:end], dfinal[i : i + 1], function)
        assert torch.equal(result.o[:, start:end], single.o)
        assert torch.equal(state_of(result)[i : i + 1], state_of(single))
        for name in ("q", "k", "v", "g", "beta"):
            assert torch.equal(gradients[name][:, start:end], single_gradients[name]), (name, i)
        assert torch.equal(gradients["initial_state"][i : i + 1], single_gradients["initial_state"])


@BOTH
def test_batch_rows_are_independent_sequences(calls: Calls, function: Callable[..., Any]) -> None:
    inputs = calls(B=3, T=20, H=2, initial_state=calls.normal(3, 2, 16, 16))
    result = evaluate(inputs, function)
    for row in range(3):
        part = {name: tensor[row : row + 1] for name, tensor in inputs.tensors().items()}
        single = evaluate(inputs.replace(**part), function)
        assert torch.equal(result.o[row : row + 1], single.o)
        assert torch.equal(state_of(result)[row : row + 1], state_of(single))


@BOTH
def test_strides_do_not_matter(calls: Calls, function: Callable[..., Any]) -> None:
    inputs = calls(B=2, T=20, H=2, K=16, V=24, initial_state=calls.normal(2, 2, 16, 24))

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """Return an equal view with its axes reversed in memory and every second element skipped, surrounded by NaN."""
        backwards = torch.full((*tensor.shape[::-1], 3), float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = backwards[..., 1].permute(*reversed(range(tensor.dim())))
        view.copy_(tensor)
        return view

    strided = inputs.replace(**{name: spread(tensor) for name, tensor in inputs.tensors().items()})
    do = calls.normal(*inputs.v.shape).to(DEVICE)
    dfinal = calls.normal(*inputs.state_shape).to(DEVICE)
    result, gradients = differentiate(inputs, do, dfinal, function)
    other, other_gradients = differentiate(strided, spread(do), spread(dfinal), function)
    assert torch.equal(result.o, other.o)
    assert torch.equal(state_of(result), state_of(other))
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@BOTH
def test_state_layouts_are_transposes(calls: Calls, function: Callable[..., Any]) -> None:
    inputs = calls(T=20, K=16, V=24, initial_state=calls.normal(1, 1, 16, 24))
    assert inputs.initial_state is not None
    swapped = inputs.replace(initial_state=inputs.initial_state.transpose(-1, -2), state_v_first=True)
    dfinal = calls.normal(*inputs.state_shape).to(DEVICE)
    result, gradients = differentiate(inputs, None, dfinal, function)
    other, other_gradients = differentiate(swapped, None, dfinal.transpose(-1, -2), function)
    assert torch.equal(state_of(result), state_of(other).transpose(-1, -2))
    assert torch.equal(gradients["initial_state"], other_gradients["initial_state"].transpose(-1, -2))


@BOTH
def test_nothing_is_left_uninitialised_and_nothing_is_changed(
    calls: Calls, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = calls.gated(T=37, H=1, G=2, K=20, V=12, initial_state=calls.normal(1, 2, 20, 12))
    do, dfinal = calls.normal(*inputs.v.shape).to(DEVICE), calls.normal(*inputs.state_shape).to(DEVICE)
    clean, clean_gradients = differentiate(inputs, do, dfinal, function)
    before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        buffer: torch.Tensor = empty(*size, **options)
        return buffer.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    result, gradients = differentiate(inputs, do, dfinal, function)
    assert torch.equal(clean.o, result.o)
    assert torch.equal(state_of(clean), state_of(result))
    assert all(torch.equal(clean_gradients[name], gradients[name]) for name in gradients)
    assert all(torch.equal(before[name], tensor) for name, tensor in inputs.tensors().items())


@BOTH
def test_no_tokens_pass_the_state_through(calls: Calls, function: Callable[..., Any]) -> None:
    inputs = calls(T=0, H=2, B=2, initial_state=calls.normal(2, 2, 16, 16))
    assert inputs.initial_state is not None
    dfinal = calls.normal(*inputs.state_shape).to(DEVICE)
    result, gradients = differentiate(inputs, None, dfinal, function)
    assert result.o.shape == inputs.v.shape
    assert torch.equal(state_of(result), inputs.initial_state)
    assert torch.equal(gradients["initial_state"], dfinal)


def test_sequence_resumes_bit_for_bit_at_a_chunk_boundary(calls: Calls) -> None:
    inputs = calls(dtype=torch.bfloat16, T=100)
    whole = evaluate(inputs)
    first = evaluate(head_of(inputs, 64))
    rest = {name: getattr(inputs, name)[:, 64:] for name in ("q", "k", "v", "g", "beta")}
    second = evaluate(inputs.replace(initial_state=first.final_state, **rest))
    assert torch.equal(whole.o, torch.cat([first.o, second.o], dim=1))
    assert torch.equal(state_of(whole), state_of(second))

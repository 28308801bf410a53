"""What stands around the operator: the short convolution with its tail, and the gated norm, against the float64 reference."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kda_optimized import gated_rms_norm, short_convolution, short_convolution_step
from kda_optimized.launch import recorded
from kda_reference import normalisation
from kda_reference import short_convolution as reference
from kda_reference.errors import DeviceError, DomainError, DtypeError, FlagError, KdaError, PackingError, ShapeError
from optimized_calls import DEVICE, Calls, relative_error
from torch.nn.functional import silu

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
NAN = float("nan")


def convolved(
    x: Tensor, weight: Tensor, tail: Tensor, offsets: list[int], activation: str | None
) -> tuple[Tensor, Tensor]:
    """Return outputs and final tails of packed or even sequences by the reference, in the dtype of its arguments."""
    flat, parts, tails = x.reshape(1, -1, x.shape[-1]), [], []
    for n, (start, end) in enumerate(pairwise(offsets)):
        y, final = reference.short_convolution(flat[:, start:end], weight, tail[n : n + 1])
        parts.append(silu(y) if activation else y)
        tails.append(final)
    return torch.cat(parts, 1).reshape(x.shape), torch.cat(tails)


def spread(tensor: Tensor) -> Tensor:
    """Return an equal view with strides of its own, surrounded by NaN."""
    backwards = torch.full((*tensor.shape[::-1], 3), NAN, dtype=tensor.dtype, device=tensor.device)
    view = backwards[..., 1].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float32, "silu"), (torch.float32, None), (torch.bfloat16, "silu")]
)
@pytest.mark.parametrize(
    ("batch", "lengths", "taps"),
    [(2, [19], 4), (1, [1, 2, 3, 0, 5, 17, 33], 4), (3, [1], 4), (2, [0], 4), (1, [20, 6], 3), (2, [5], 1)],
    ids=["batch", "packed", "one token", "no token", "three taps", "one tap"],
)
def test_the_convolution_and_its_gradients_are_the_reference(
    calls: Calls, dtype: torch.dtype, activation: str | None, batch: int, lengths: list[int], taps: int
) -> None:
    packed, tokens = len(lengths) > 1, sum(lengths)
    sequences, channels = len(lengths) if packed else batch, 40 if batch == 2 else 20
    offsets = [sum(lengths[:n]) for n in range(sequences + 1)] if packed else [n * tokens for n in range(sequences + 1)]
    shapes = ((batch, tokens, channels), (channels, taps), (sequences, taps - 1, channels))
    values = [calls.normal(*shape).to(DEVICE, dtype) for shape in shapes]
    leaves: Any = [spread(value).requires_grad_() for value in values]
    exact: Any = [value.double().requires_grad_() for value in values]
    found: Any = short_convolution(
        *leaves,
        activation=activation,
        output_final_tail=True,
        cu_seqlens=torch.tensor(offsets, device=DEVICE) if packed else None,
    )
    expected = convolved(exact[0], exact[1], exact[2], offsets, activation)
    cotangents = [spread(calls.normal(*result.shape).to(DEVICE, dtype)) for result in expected]
    assert relative_error(found[0], expected[0]) < LIMIT[dtype]
    assert found[1] is not None
    assert torch.equal(found[1].double(), expected[1])
    for chosen in ([0, 1], [0], [1]):
        gradients, wanted = (
            torch.autograd.grad(
                torch.stack([(results[i] * cotangents[i]).sum() for i in chosen]).sum(),
                tensors,
                retain_graph=True,
                allow_unused=True,
            )
            for results, tensors in ((found, leaves), (expected, exact))
        )
        for gradient, true, leaf in zip(gradients, wanted, leaves, strict=True):
            assert gradient.dtype == leaf.dtype
            assert relative_error(gradient, torch.zeros_like(leaf) if true is None else true) < LIMIT[dtype]


def test_without_a_tail_the_past_is_zero(calls: Calls) -> None:
    x, weight = calls.normal(2, 9, 8).to(DEVICE), calls.normal(8, 4).to(DEVICE)
    y, final = short_convolution(x, weight)
    assert final is None
    assert torch.equal(y, short_convolution(x, weight, torch.zeros(2, 3, 8, device=DEVICE))[0])


def test_every_tap_meets_the_token_it_is_named_after() -> None:
    weight = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], device=DEVICE)
    impulse = torch.zeros(1, 6, 1, device=DEVICE)
    impulse[0, 1] = 1
    y, _ = short_convolution(impulse, weight, activation=None)
    assert y.flatten().tolist() == [0, 1000, 100, 10, 1, 0]


@pytest.mark.parametrize("cuts", [[0, 20], [0, 1, 2, 3, 20], [0, 0, 2, 16, 17, 20], list(range(21))], ids=str)
def test_steps_go_on_where_whole_calls_stop(calls: Calls, cuts: list[int]) -> None:
    x, weight = calls.normal(1, 20, 40).to(DEVICE), calls.normal(40, 4).to(DEVICE)
    tail = calls.normal(1, 3, 40).to(DEVICE)
    y, final = short_convolution(x, weight, tail, output_final_tail=True)
    assert final is not None
    pool = tail.clone()
    stepped = torch.cat([short_convolution_step(x[:, a:b], weight, pool) for a, b in pairwise(cuts)], 1)
    assert relative_error(stepped, y) < LIMIT[torch.float32]
    assert torch.equal(pool, final)
    carried, parts = tail, list[torch.Tensor]()
    for a, b in pairwise(cuts):
        part, after = short_convolution(x[:, a:b], weight, carried, output_final_tail=True)
        assert after is not None
        parts, carried = [*parts, part], after
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(carried, final)


def test_a_step_touches_the_slots_of_its_rows_only(calls: Calls) -> None:
    x, weight = calls.normal(4, 1, 24).to(DEVICE), calls.normal(24, 4).to(DEVICE)
    memory = torch.full((6, 2, 4, 24), NAN, device=DEVICE)
    pool = memory[:, 1, :3]
    tails = calls.normal(2, 3, 24).to(DEVICE)
    pool[[4, 1]] = tails
    before = memory.clone()
    y = short_convolution_step(x, weight, pool, tail_indices=torch.tensor([4, -1, 1, 99], device=DEVICE))
    assert not y[[1, 3]].any()
    expected, final = convolved(x[[0, 2]], weight, tails, [0, 1, 2], "silu")
    assert relative_error(y[[0, 2]], expected) < LIMIT[torch.float32]
    assert torch.equal(pool[[4, 1]], final)
    pool[[4, 1]] = before[[4, 1], 1, :3]
    assert torch.equal(memory.nan_to_num(7.0), before.nan_to_num(7.0))


def test_drafts_that_are_taken_back_leave_no_tail(calls: Calls) -> None:
    x, weight = calls.normal(2, 4, 24).to(DEVICE), calls.normal(24, 4).to(DEVICE)
    pool = torch.full((8, 3, 24), NAN, device=DEVICE)
    pool[[5, 2]] = calls.normal(2, 3, 24).to(DEVICE)
    start = pool[[5, 2]].clone()
    slots = torch.tensor([[5, 0, 7, 1], [2, 3, 4, 6]], device=DEVICE)
    draft = short_convolution_step(x, weight, pool, tail_indices=slots)
    for row in range(2):
        for t in range(4):
            alone = start[row : row + 1].clone()
            y = short_convolution_step(x[row : row + 1, : t + 1], weight, alone)
            assert torch.equal(y, draft[row : row + 1, : t + 1])
            assert torch.equal(pool[slots[row, t]], alone[0])
    after = [pool[slots[0, 2]].clone(), pool[slots[1, 0]].clone()]
    y = short_convolution_step(
        x[:, :1], weight, pool, tail_indices=slots, num_accepted_tokens=torch.tensor([3, 1], device=DEVICE)
    )
    for row in range(2):
        assert torch.equal(short_convolution_step(x[row : row + 1, :1], weight, after[row][None]), y[row : row + 1])
    assert not short_convolution_step(
        x[:, :1], weight, pool, tail_indices=slots, num_accepted_tokens=torch.tensor([0, 5], device=DEVICE)
    ).any()


def test_packed_rows_new_rows_and_shared_prefixes(calls: Calls) -> None:
    lengths = [1, 6, 0, 2]
    offsets = [sum(lengths[:n]) for n in range(5)]
    x, weight = calls.normal(1, offsets[-1] + 3, 24).to(DEVICE), calls.normal(24, 4).to(DEVICE)
    pool = torch.full((6, 3, 24), NAN, device=DEVICE)
    pool[4:] = calls.normal(2, 3, 24).to(DEVICE)
    tails = torch.stack([pool[4], torch.zeros_like(pool[4]), pool[4], pool[5]])
    y = short_convolution_step(
        x,
        weight,
        pool,
        tail_indices=torch.tensor([0, 1, 2, 3], device=DEVICE),
        source_indices=torch.tensor([4, 1, 4, 5], device=DEVICE),
        has_initial_tail=torch.tensor([True, False, True, True], device=DEVICE),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=DEVICE),
    )
    expected, final = convolved(x[:, : offsets[-1]], weight, tails, offsets, "silu")
    assert relative_error(y[:, : offsets[-1]], expected) < LIMIT[torch.float32]
    assert not y[:, offsets[-1] :].any()
    assert torch.equal(pool[:4], final)
    assert torch.equal(pool[4], tails[0])


def test_the_step_reads_nothing_on_the_host() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with recorded() as started:
        short_convolution_step(
            meta(1, 7, 24),
            meta(24, 4),
            meta(9, 3, 24),
            tail_indices=meta(3, 2, dtype=torch.int32),
            num_accepted_tokens=meta(3, dtype=torch.int64),
            cu_seqlens=meta(4, dtype=torch.int32),
        )
    assert [launch.programs for launch in started] == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["sigmoid", "swish"])
@pytest.mark.parametrize("shape", [(1, 3, 2, 128), (37, 20), (0, 16), (300, 5)], ids=str)
def test_the_norm_and_its_gradients_are_the_reference(
    calls: Calls, dtype: torch.dtype, activation: str, shape: tuple[int, ...]
) -> None:
    values = [calls.normal(*size).to(DEVICE, dtype) for size in (shape, shape, shape[-1:])]
    leaves: Any = [spread(value).requires_grad_() for value in values]
    exact: Any = [value.double().requires_grad_() for value in values]
    y = gated_rms_norm(*leaves, activation=activation)
    expected = normalisation.gated_rms_norm(exact[0], exact[1], exact[2], 1e-5, activation)
    assert y.dtype == dtype
    assert relative_error(y, expected) < LIMIT[dtype]
    dy = spread(calls.normal(*shape).to(DEVICE, dtype))
    gradients = torch.autograd.grad(y, leaves, dy)
    for gradient, true, leaf in zip(gradients, torch.autograd.grad(expected, exact, dy.double()), leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient, true) < LIMIT[dtype]


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_the_constant_of_the_norm_is_on_the_mean(calls: Calls, size: float) -> None:
    x, gate = size * calls.normal(5, 16).to(DEVICE), 60 * calls.normal(5, 16).to(DEVICE)
    weight = calls.normal(16).to(DEVICE)
    expected = normalisation.gated_rms_norm(x.double(), gate.double(), weight.double(), 1e-5)
    assert relative_error(gated_rms_norm(x, gate, weight), expected) < LIMIT[torch.float32]


def test_a_row_that_is_no_number_stays_alone(calls: Calls) -> None:
    x, gate, weight = (calls.normal(*shape).to(DEVICE) for shape in ((9, 16), (9, 16), (16,)))
    clean = gated_rms_norm(x, gate, weight)
    x[4] = NAN
    found = gated_rms_norm(x, gate, weight)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda x, w: short_convolution(x, w[:, None]), ShapeError, "weight"),
        (lambda x, w: short_convolution(x.double(), w), DtypeError, "x"),
        (lambda x, w: short_convolution(x, torch.zeros(8, 17, device=DEVICE)), DomainError, "weight"),
        (lambda x, w: short_convolution(x, w, torch.zeros(2, 4, 8, device=DEVICE)), ShapeError, "tail"),
        (lambda x, w: short_convolution(x, w, torch.zeros(2, 3, 8, device=DEVICE).bfloat16()), DtypeError, "tail"),
        (lambda x, w: short_convolution(x, w.to("meta")), DeviceError, "weight"),
        (lambda x, w: short_convolution(x, w, activation="relu"), FlagError, "activation"),
        (lambda x, w: short_convolution(x, w, cu_seqlens=torch.tensor([0, 5], device=DEVICE)), PackingError, "batch"),
        (lambda x, w: short_convolution(x[:1], w, cu_seqlens=torch.tensor([0, 4], device=DEVICE)), PackingError, "cu_seqlens"),
        (lambda x, w: short_convolution(x[:1], w, cu_seqlens=torch.tensor([0, 4, 2, 5], device=DEVICE)), PackingError, "cu_seqlens"),
        (lambda x, w: short_convolution_step(x, w, torch.zeros(1, 3, 8, device=DEVICE)), ShapeError, "tail_indices"),
        (lambda x, w: short_convolution_step(x, w, torch.zeros(2, 2, 8, device=DEVICE)), ShapeError, "tails"),
        (lambda x, w: gated_rms_norm(x, x[:1], w[:, 0]), ShapeError, "gate"),
        (lambda x, w: gated_rms_norm(x, x, w[:5, 0]), ShapeError, "weight"),
        (lambda x, w: gated_rms_norm(x, x, w[:, 0], 0.0), DomainError, "eps"),
        (lambda x, w: gated_rms_norm(x, x, w[:, 0], activation="relu"), FlagError, "activation"),
    ],
    ids=[
        "three axes", "float64", "seventeen taps", "long tail", "half tail", "elsewhere", "relu", "packed batch", "short offsets",
        "falling offsets", "too few slots", "short tails", "one gate", "short weight", "no eps", "relu of the norm",
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(call: Any, error: type[KdaError], word: str) -> None:
    with pytest.raises(error, match=word):
        call(torch.zeros(2, 5, 8, device=DEVICE), torch.zeros(8, 4, device=DEVICE))

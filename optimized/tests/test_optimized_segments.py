"""A sequence cut into segments, walked side by side and joined by their affine maps, is the sequence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from kda_optimized.backward import chunk_backward
from kda_optimized.launch import recorded
from kda_optimized.launch_config import Table, architecture, table, using
from kda_optimized.packing import segments
from kda_reference.contract import TENSOR_ARGUMENTS
from optimized_calls import (
    DEVICE,
    OUTPUT_LIMIT,
    STATE_LIMIT,
    Calls,
    differentiate,
    evaluate,
    relative_error,
    state_of,
)

if TYPE_CHECKING:
    from kda_reference.contract import KdaInputs

WALK = "kda_chunk_fwd_walk_kernel"
STATES, BACK = "kda_chunk_bwd_states_kernel", "kda_chunk_bwd_walk_kernel"


def in_pieces(programs: int) -> Table:
    """Return the launch table with sequences cut until there are ``programs`` programs; 0 never cuts."""
    rules = table(architecture(torch.device(DEVICE)))
    cut = {"programs": programs, "least_chunks": 1}
    return rules | {kernel: [rule | cut for rule in rules[kernel]] for kernel in (WALK, STATES)}


def whole_and_packed(calls: Calls, dtype: torch.dtype) -> list[tuple[KdaInputs, int]]:
    """Return calls with and without packing, states and empty sequences, and how many programs to ask for."""
    whole = calls(dtype=dtype, T=150, V=24, initial_state=calls.normal(1, 1, 16, 24), output_final_state=True)
    offsets = torch.tensor([0, 1, 1, 50, 150], device=DEVICE)
    return [(whole, 14), (whole.replace(cu_seqlens=offsets, initial_state=None), 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_segments_give_what_the_whole_sequence_gives(calls: Calls, dtype: torch.dtype) -> None:
    for case, programs in whole_and_packed(calls, dtype):
        with using(in_pieces(0)):
            whole = evaluate(case)
        with using(in_pieces(programs)):
            cut = evaluate(case)
        assert relative_error(cut.o, whole.o) < OUTPUT_LIMIT[dtype]
        assert relative_error(state_of(cut), state_of(whole)) < STATE_LIMIT[dtype]


def test_a_cut_sequence_is_walked_three_times_and_a_whole_one_once(calls: Calls) -> None:
    for case, programs in whole_and_packed(calls, torch.bfloat16):
        for wanted, walks in ((programs, 3), (0, 1)):
            with using(in_pieces(wanted)), recorded() as launches:
                evaluate(case)
            assert [launch.name for launch in launches].count(WALK) == walks


def test_a_later_token_changes_no_bit_before_it_across_segments(calls: Calls) -> None:
    case, programs = whole_and_packed(calls, torch.bfloat16)[0]
    for token in (40, 64, 70):
        later = case.g.clone()
        later[:, token:] = -3.0
        with using(in_pieces(programs)):
            one, two = evaluate(case), evaluate(case.replace(g=later))
        assert torch.equal(one.o[:, :token], two.o[:, :token])
        assert not torch.equal(one.o[:, token:], two.o[:, token:])


def cotangents(case: KdaInputs, calls: Calls) -> tuple[torch.Tensor, torch.Tensor]:
    do = calls.normal(*case.v.shape).to(case.v.dtype)
    return do.to(DEVICE), calls.normal(*case.state_shape).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_size", [16, 32])
def test_gradients_of_segments_are_those_of_the_whole_sequence(
    calls: Calls, dtype: torch.dtype, chunk_size: int
) -> None:
    for case, programs in whole_and_packed(calls, dtype):
        short = case.replace(chunk_size=chunk_size)
        do, dfinal = cotangents(short, calls)
        with using(in_pieces(0)):
            _, whole = differentiate(short, do, dfinal)
        with using(in_pieces(programs)):
            _, cut = differentiate(short, do, dfinal)
        for name, gradient in whole.items():
            assert relative_error(cut[name], gradient) < OUTPUT_LIMIT[dtype], name


def test_a_cut_sequence_is_walked_back_twice_and_forth_only_for_what_is_asked_for(calls: Calls) -> None:
    for case, programs in whole_and_packed(calls, torch.bfloat16):
        short = case.replace(chunk_size=16)
        do, dfinal = cotangents(short, calls)
        for wanted, needed, walks in (
            (programs, TENSOR_ARGUMENTS, (3, 2)),
            (programs, ("v",), (1, 2)),
            (0, TENSOR_ARGUMENTS, (1, 1)),
            (0, ("v",), (0, 1)),
        ):
            with using(in_pieces(wanted)), recorded() as launches:
                chunk_backward(short, do, dfinal, needed)
            names = [launch.name for launch in launches]
            assert (names.count(STATES), names.count(BACK)) == walks


def test_maps_have_tiles_and_warps_of_their_own_and_give_the_same(calls: Calls) -> None:
    case, programs = whole_and_packed(calls, torch.bfloat16)[0]
    case = case.replace(chunk_size=16)
    do, dfinal = cotangents(case, calls)
    alike = {kernel: [rule | {"block_v": 32} for rule in rules] for kernel, rules in in_pieces(programs).items()}
    narrow = {
        kernel: [rule | {"map_block_v": 16, "map_warps": 1} for rule in alike[kernel]] for kernel in (WALK, STATES)
    }
    with using(alike):
        one, one_back = differentiate(case, do, dfinal)
    with using(alike | narrow), recorded() as launches:
        differentiate(case, do, dfinal)
    with using(alike | narrow):
        two, two_back = differentiate(case, do, dfinal)
    for kernel in (WALK, STATES):
        walks = [launch for launch in launches if launch.name == kernel]
        assert [launch.arguments["BV"] for launch in walks] == [16, 16, 32]
        assert [launch.options["num_warps"] for launch in walks] == [1, 1, alike[kernel][0]["num_warps"]]
    assert relative_error(two.o, one.o) < OUTPUT_LIMIT[torch.bfloat16]
    assert relative_error(state_of(two), state_of(one)) < STATE_LIMIT[torch.bfloat16]
    for name, gradient in one_back.items():
        assert relative_error(two_back[name], gradient) < OUTPUT_LIMIT[torch.bfloat16], name


def test_a_gradient_does_not_depend_on_which_others_are_asked_for_across_segments(calls: Calls) -> None:
    case, programs = whole_and_packed(calls, torch.bfloat16)[0]
    short = case.replace(chunk_size=16)
    do, dfinal = cotangents(short, calls)
    with using(in_pieces(programs)):
        every = chunk_backward(short, do, dfinal)
        for name in ("v", "beta", "initial_state"):
            assert torch.equal(chunk_backward(short, do, dfinal, (name,))[name], every[name]), name


def test_a_loss_on_a_prefix_does_not_see_later_tokens_across_segments(calls: Calls) -> None:
    case, programs = whole_and_packed(calls, torch.bfloat16)[0]
    short = case.replace(chunk_size=16)
    do, _ = cotangents(short, calls)
    for token in (40, 64, 70):
        prefix = do.clone()
        prefix[:, token:] = 0
        later = short.g.clone()
        later[:, token:] = -3.0
        with using(in_pieces(programs)):
            _, one = differentiate(short, prefix, None)
            _, two = differentiate(short.replace(g=later), prefix, None)
        for name in ("q", "k", "v", "g", "beta"):
            assert torch.equal(one[name][:, :token], two[name][:, :token]), name
            assert not one[name][:, token:].any(), name


@pytest.mark.parametrize("span", [1, 4])
@pytest.mark.parametrize("most_spans", [1, 2, 3, 100])
def test_segments_cover_every_chunk_once_and_in_order(calls: Calls, most_spans: int, span: int) -> None:
    lengths = [0, 1, 16, 0, 17, 160]
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], device=DEVICE)
    pieces = segments(calls(T=sum(lengths)).replace(cu_seqlens=offsets), 16, most_spans, span)
    starts = pieces.cu_seqlens.tolist()
    assert starts[-1] == sum(lengths)
    assert pieces.num_segments == len(starts) - 1 == pieces.first_segments[-1]
    chunks_before = spans_before = 0
    for i, length in enumerate(lengths):
        mine = range(pieces.first_segments[i], pieces.first_segments[i + 1])
        spans = math.ceil(length / (16 * span))
        assert len(mine) == math.ceil(spans / most_spans)
        for piece in mine:
            assert (starts[piece] - offsets[i]) % (16 * span) == 0
            before = (starts[piece] - offsets[i]) // 16
            assert pieces.chunk_offsets[piece] == chunks_before + before
            assert pieces.span_offsets[piece] == spans_before + before // span
            assert 0 < math.ceil((starts[piece + 1] - starts[piece]) / (16 * span)) <= most_spans
        chunks_before += math.ceil(length / 16)
        spans_before += spans

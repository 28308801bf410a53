"""Decoding through a pool: a step is the recurrence, and touches the slots of its rows and nothing else."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kda_optimized import kda_decode_step
from kda_optimized.launch import recorded
from kda_reference import recurrent_kda
from kda_reference.errors import DeviceError, DomainError, DtypeError, FlagError, KdaError, PackingError, ShapeError
from optimized_calls import DEVICE, OUTPUT_LIMIT, STATE_LIMIT, Calls, relative_error, state_of

if TYPE_CHECKING:
    from kda_reference.contract import KdaInputs
    from torch import Tensor

TOKENS = ("q", "k", "v", "g", "beta")
FLAGS = (
    "scale", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "lower_bound",
    "state_v_first", "A_log", "dt_bias", "cu_seqlens",
)  # fmt: skip
NAN = float("nan")


def step(inputs: KdaInputs, pool: Tensor, slots: Any = None, **options: Any) -> Tensor:
    """Run a step with the arguments of ``inputs``; lists of indices become tensors."""
    tables = {"state_indices": slots, **options}
    placed = {
        name: torch.tensor(table, device=DEVICE) if isinstance(table, list) else table for name, table in tables.items()
    }
    flags = {name: getattr(inputs, name) for name in FLAGS}
    arguments: dict[str, Any] = {name: getattr(inputs, name) for name in TOKENS} | flags | placed
    o, written = kda_decode_step(state=pool, **arguments)
    assert written is (options.get("final_state", pool))
    return o


def span(inputs: KdaInputs, start: int, end: int) -> KdaInputs:
    """Return the call on some of its tokens."""
    return inputs.replace(cu_seqlens=None, **{name: getattr(inputs, name)[:, start:end] for name in TOKENS})


def pool_of(calls: Calls, slots: int, inputs: KdaInputs, dtype: torch.dtype = torch.float32) -> Tensor:
    return calls.normal(slots, *inputs.state_shape[1:]).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {"G": 2, "K": 20, "V": 12},
        {"lower_bound": -4.0, "allow_neg_eigval": True, "state_v_first": True, "V": 40},
        {"T": 3, "H": 2, "V": 24, "scale": 0.5},
    ],
    ids=["softplus", "bounded", "three tokens"],
)
def test_a_step_is_the_recurrence(calls: Calls, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    inputs = calls.gated(dtype=dtype, **{"B": 3, "T": 1, **changes})
    pool = pool_of(calls, 5, inputs)
    slots = [4, 0, 2]
    expected = recurrent_kda(inputs.replace(initial_state=pool[slots].clone()))
    o = step(inputs, pool, slots)
    assert o.dtype == dtype
    assert relative_error(o, expected.o) < OUTPUT_LIMIT[dtype]
    assert relative_error(pool[slots], state_of(expected)) < STATE_LIMIT[torch.float32]


def test_activations_outside_the_kernel_are_taken_as_they_are(calls: Calls) -> None:
    inputs = calls(B=2, T=1, initial_state=None)
    pool = pool_of(calls, 2, inputs)
    expected = recurrent_kda(inputs.replace(initial_state=pool.clone()))
    assert relative_error(step(inputs, pool), expected.o) < OUTPUT_LIMIT[torch.float32]


@pytest.mark.parametrize("cuts", [[0, 20], [0, 1, 2, 3, 20], [0, 0, 7, 16, 17, 20], list(range(21))], ids=str)
def test_calls_can_be_cut_anywhere(calls: Calls, cuts: list[int]) -> None:
    inputs = calls.gated(T=20)
    whole, pool = pool_of(calls, 1, inputs), torch.empty(0)
    pool = whole.clone()
    o = step(inputs, whole)
    parts = [step(span(inputs, *cut), pool) for cut in pairwise(cuts)]
    assert torch.equal(torch.cat(parts, 1), o)
    assert torch.equal(pool, whole)


def packed(calls: Calls, lengths: list[int], spare: int = 0, **changes: Any) -> KdaInputs:
    offsets = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    return calls.gated(T=offsets[-1] + spare, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), **changes)


def test_prompts_and_single_tokens_in_one_call_are_each_as_alone(calls: Calls) -> None:
    lengths = [1, 37, 0, 1, 5, 1]
    inputs = packed(calls, lengths, G=2)
    assert inputs.cu_seqlens is not None
    slots = [3, 6, 0, 2, 7, 5]
    pool = pool_of(calls, 9, inputs)
    before = pool.clone()
    o = step(inputs, pool, slots)
    for (start, end), slot in zip(pairwise(inputs.cu_seqlens.tolist()), slots, strict=True):
        alone = before.clone()
        assert torch.equal(step(span(inputs, start, end), alone, [slot]), o[:, start:end])
        assert torch.equal(alone[slot], pool[slot])
    unused = [1, 4, 8]
    assert torch.equal(pool[unused], before[unused])
    assert torch.equal(pool[0], before[0])


def test_tokens_behind_the_last_row_are_zero_and_offsets_are_kept_within_the_tokens(calls: Calls) -> None:
    inputs = packed(calls, [2, 1], spare=4)
    pool = pool_of(calls, 2, inputs)
    same = pool.clone()
    o = step(inputs, pool)
    assert not o[:, 3:].any()
    assert inputs.cu_seqlens is not None
    beyond = torch.tensor([-5, 2, 900], device=DEVICE)
    whole = step(inputs.replace(cu_seqlens=beyond), same)
    assert torch.equal(whole[:, :3], o[:, :3])
    assert whole[:, 3:].any()


@pytest.mark.parametrize("layout", [{"state_v_first": False}, {"state_v_first": True}], ids=["K first", "V first"])
def test_padding_and_the_slots_of_others_are_left_alone(calls: Calls, layout: dict[str, bool]) -> None:
    inputs = calls.gated(B=5, T=1, G=2, V=24, **layout)
    # A pool of strides of its own, in memory that holds NaN wherever no row has a slot.
    memory = torch.full((7, 3, *inputs.state_shape[1:-1], 2 * inputs.state_shape[-1]), NAN, device=DEVICE)
    pool = memory[:, 1, ..., ::2]
    live = {0: 5, 2: 1, 4: 3}
    dense = pool_of(calls, 7, inputs)
    for slot in live.values():
        pool[slot] = dense[slot]
    before = memory.clone()
    o = step(inputs, pool, [5, -1, 1, -7, 3])
    assert not o[[1, 3]].any()
    for row, slot in live.items():
        # A compiler adds up in the order that suits a pool's strides, so the same bits need the same strides.
        alone, packed_up = before.clone()[:, 1, ..., ::2], dense.clone()
        tokens = inputs.replace(**{name: getattr(inputs, name)[row : row + 1] for name in TOKENS})
        assert torch.equal(step(tokens, alone, [slot]), o[row : row + 1])
        assert torch.equal(alone[slot], pool[slot])
        o_packed_up = step(tokens, packed_up, [slot])
        if DEVICE == "cuda":
            assert relative_error(o_packed_up, o[row : row + 1]) < OUTPUT_LIMIT[torch.float32]
            assert relative_error(packed_up[slot], pool[slot]) < STATE_LIMIT[torch.float32]
        else:
            assert torch.equal(o_packed_up, o[row : row + 1])
            assert torch.equal(packed_up[slot], pool[slot])
        pool[slot] = before[slot, 1, ..., ::2]
    assert torch.equal(memory.nan_to_num(7.0), before.nan_to_num(7.0))


def test_an_index_that_is_too_large_is_padding(calls: Calls) -> None:
    inputs = calls.gated(B=2, T=1)
    pool = pool_of(calls, 2, inputs)
    before = pool.clone()
    assert not step(inputs, pool, [2, 900]).any()
    assert torch.equal(pool, before)


def test_a_draft_that_is_taken_back_never_was(calls: Calls) -> None:
    inputs = calls.gated(B=2, T=9)
    serial = pool_of(calls, 2, inputs)
    pool = torch.full((6, *serial.shape[1:]), NAN, device=DEVICE)
    slots = [[4, 1, 3], [0, 5, 2]]
    pool[[4, 0]] = serial
    accepted, done = [1, 1], [0, 0]
    for take in ([3, 1], [1, 2], [2, 3], [1, 1]):
        # Rows have come to different tokens; what is not accepted is drafted again.
        rows = [span(inputs, at, at + 3) for at in done]
        draft = inputs.replace(
            **{
                name: torch.stack([getattr(part, name)[row] for row, part in enumerate(rows)]).clone()
                for name in TOKENS
            }
        )
        for row, count in enumerate(take):
            draft.v[row, count:] += 100.0
        o = step(draft, pool, slots, num_accepted_tokens=accepted)
        for row, count in enumerate(take):
            mine = serial[row : row + 1].clone()
            tokens = inputs.replace(
                **{name: getattr(inputs, name)[row : row + 1, done[row] : done[row] + count] for name in TOKENS}
            )
            assert torch.equal(step(tokens, mine), o[row : row + 1, :count])
            serial[row] = mine[0]
            assert torch.equal(pool[slots[row][count - 1]], serial[row])
        done, accepted = [at + count for at, count in zip(done, take, strict=True)], take


@pytest.mark.parametrize("accepted", [-1, 0, 4])
def test_a_number_of_accepted_tokens_that_cannot_be_is_padding(calls: Calls, accepted: int) -> None:
    inputs = calls.gated(B=1, T=2)
    pool = pool_of(calls, 3, inputs)
    before = pool.clone()
    assert not step(inputs, pool, [[0, 1, 2]], num_accepted_tokens=[accepted]).any()
    assert torch.equal(pool, before)


def test_a_prompt_among_drafts_leaves_its_last_state_in_its_first_slot(calls: Calls) -> None:
    inputs = packed(calls, [5, 2, 0])
    pool = pool_of(calls, 6, inputs)
    before = pool.clone()
    step(inputs, pool, [[0, 1], [2, 3], [4, 5]])
    alone = before[:1].clone()
    step(span(inputs, 0, 5), alone)
    assert torch.equal(pool[0], alone[0])
    assert torch.equal(pool[[1, 4, 5]], before[[1, 4, 5]])
    assert not torch.equal(pool[2], pool[3])


def test_a_new_sequence_sees_nothing_of_the_one_before(calls: Calls) -> None:
    inputs = calls.gated(B=2, T=1)
    pool = pool_of(calls, 2, inputs)
    pool[1] = NAN
    clean = torch.zeros_like(pool)
    clean[0] = pool[0]
    expected = step(inputs, clean)
    assert torch.equal(step(inputs, pool, has_initial_state=[True, False]), expected)
    assert torch.equal(pool, clean)


def test_snapshots_are_the_states_of_prefixes_and_resume_as_if_never_left(calls: Calls) -> None:
    inputs = packed(calls, [21, 8, 3])
    pool = torch.full((8, *inputs.state_shape[1:]), NAN, device=DEVICE)
    pool[:3] = pool_of(calls, 3, inputs)
    start = pool.clone()
    o = step(inputs, pool, [0, 1, 2], snapshot_indices=[[3, -1, 99], [5, 6, 7], [7, 7, 7]], snapshot_every=8)
    prefix = start[:1].clone()
    step(span(inputs, 0, 8), prefix)
    assert torch.equal(pool[3], prefix[0])
    assert torch.equal(pool[5], pool[1])
    assert pool[[4, 6, 7]].isnan().all()
    last = pool[0].clone()
    # Two rows resume from one snapshot, each into a slot of its own.
    rest = span(inputs, 8, 21)
    twice = rest.replace(**{name: getattr(rest, name).expand(2, *getattr(rest, name).shape[1:]) for name in TOKENS})
    resumed = step(twice, pool, [4, 6], source_indices=[3, 3])
    for row, slot in enumerate((4, 6)):
        assert torch.equal(resumed[row], o[0, 8:21])
        assert torch.equal(pool[slot], last)
    assert torch.equal(pool[3], prefix[0])


@pytest.mark.parametrize("slots", [[0, 1], [[0, 2], [1, 3]]], ids=["one slot", "drafts"])
def test_another_pool_may_be_written(calls: Calls, slots: list[Any]) -> None:
    inputs = packed(calls, [1, 0])
    pool, target = pool_of(calls, 4, inputs), torch.full((5, *inputs.state_shape[1:]), NAN, device=DEVICE)
    before = pool.clone()
    o = step(inputs, pool, slots, final_state=target)
    assert torch.equal(pool, before)
    assert torch.equal(target[1], before[1])
    assert torch.equal(step(inputs, pool, slots), o)
    assert torch.equal(target[0], pool[0])
    assert target[2:].isnan().all()


def test_a_bfloat16_pool_stays_within_its_bound(calls: Calls) -> None:
    tokens = 60
    inputs = calls(T=tokens, K=16, V=24, g=-0.05 * calls.uniform(1, tokens, 1, 16))
    pool = pool_of(calls, 1, inputs, torch.bfloat16)
    exact, bound = pool.double(), 0.0
    for t in range(tokens):
        here = span(inputs, t, t + 1)
        exact = state_of(recurrent_kda(here.replace(initial_state=exact.float()))).double()
        step(here, pool)
        bound = bound * float(here.g.exp().max()) + 2**-8 * float(pool.double().norm())
        assert float((pool.double() - exact).norm()) <= bound
    assert relative_error(pool, exact) > 1e-4


def test_nothing_is_read_by_the_host(calls: Calls) -> None:
    inputs = packed(calls, [2, 2, 1])

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shapeless = inputs.replace(
        **{name: tensor.to("meta") for name, tensor in inputs.tensors().items()}, cu_seqlens=meta(4)
    )
    pool = meta(9, *inputs.state_shape[1:], dtype=torch.float32)
    with recorded() as started:
        step(shapeless, pool, meta(3, 2), num_accepted_tokens=meta(3), has_initial_state=meta(3, dtype=torch.bool))
        step(shapeless, pool, meta(3), source_indices=meta(3), snapshot_indices=meta(3, 4))
    assert [launch.programs for launch in started] == [3, 3]


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are CUDA's")
def test_a_replayed_graph_takes_other_slots_lengths_and_acceptances(calls: Calls) -> None:
    inputs = packed(calls, [1, 3, 2], K=64, V=64)
    assert inputs.cu_seqlens is not None
    pool = pool_of(calls, 9, inputs)
    slots = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]], device=DEVICE)
    accepted = torch.tensor([1, 1, 1], device=DEVICE)
    options = {"num_accepted_tokens": accepted}
    step(inputs, pool.clone(), slots, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(inputs, pool, slots, **options)
    for offsets, order, taken in (([0, 2, 2, 6], [2, 0, 1], [1, 2, 3]), ([0, 1, 2, 3], [1, 2, 0], [3, 1, 0])):
        inputs.cu_seqlens.copy_(torch.tensor(offsets, dtype=torch.int32))
        slots.copy_(slots[torch.tensor(order, device=DEVICE)])
        slots[1, 1] = -1
        accepted.copy_(torch.tensor(taken))
        eager = pool.clone()
        expected = step(inputs, eager, slots.clone(), num_accepted_tokens=accepted.clone())
        graph.replay()
        assert torch.equal(o, expected)
        assert torch.equal(pool, eager)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"pool": torch.zeros(4, 1, 16, 17)}, ShapeError, "state"),
        ({"pool": torch.zeros(4, 1, 16, 16, dtype=torch.float16)}, DtypeError, "state"),
        ({"pool": torch.zeros(1, 1, 16, 16)}, ShapeError, "state_indices"),
        ({"final_state": torch.zeros(4, 2, 16, 16)}, ShapeError, "final_state"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, ShapeError, "state_indices"),
        ({"slots": torch.zeros(2, 0, dtype=torch.int64)}, ShapeError, "state_indices"),
        ({"slots": torch.zeros(2)}, DtypeError, "state_indices"),
        ({"num_accepted_tokens": torch.zeros(3, dtype=torch.int64)}, ShapeError, "num_accepted_tokens"),
        ({"has_initial_state": torch.zeros(2, dtype=torch.int64)}, DtypeError, "has_initial_state"),
        ({"source_indices": [0, 1], "num_accepted_tokens": [1, 1]}, FlagError, "source_indices"),
        ({"snapshot_indices": torch.zeros(2, dtype=torch.int64)}, ShapeError, "snapshot_indices"),
        ({"snapshot_every": 0}, DomainError, "snapshot_every"),
        ({"cu_seqlens": [0, 1, 2]}, PackingError, "batch"),
        ({"slots": torch.zeros(2, dtype=torch.int64, device="meta")}, DeviceError, "state_indices"),
    ],
)
def test_contradictions_are_refused_by_name(
    calls: Calls, options: dict[str, Any], error: type[KdaError], word: str
) -> None:
    inputs = calls(B=2, T=1)
    pool = options.pop("pool", torch.zeros(4, 1, 16, 16)).to(DEVICE)
    with pytest.raises(error, match=word) as raised:
        step(inputs, pool, **options)
    assert not isinstance(raised.value.__cause__, KdaError)

"""Decoding: rows of one or a few tokens, whose states lie in a pool of slots that others use too.

What a serving engine does to states is stated here: it moves them on, leaves those of others alone, skips padding, takes drafts
back, and resumes from snapshots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kda_conformance import relations
from kda_conformance.cases import Case
from kda_conformance.decoding import PADDING, Step, pool_with, scattered

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor

    from kda_conformance.subject import Call, Subject

SINGLE = (
    "T=1 B=5 H=1 G=2 K=32 V=16 gate=layer gate_form=softplus l2norm=1 sigmoid=1 gate_dtype=input seed=90",
    "T=1 B=4 H=2 G=2 K=16 V=16 gate=mixed v_first=1 seed=91",
    "T=1 B=4 H=1 G=3 K=20 V=24 gate=uniform gate_form=bounded bound=-4.0 l2norm=1 sigmoid=1 beta_max=2 seed=92",
    "T=1 B=3 K=33 V=12 gate=cliffs scale=0.5 values=big seed=93",
)
MIXED = (
    "T=1,9,1,0,4,1 H=1 G=2 K=16 V=24 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=94",
    "T=18,1,1,2 K=16 V=16 gate=mixed v_first=1 seed=95",
)
LONG = (
    "T=70 G=2 K=16 V=24 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=96",
    "T=70 K=16 V=16 gate=mixed v_first=1 seed=97",
)
SHORT = (
    "T=8 B=2 G=2 K=16 V=24 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=98",
    "T=8 B=2 K=16 V=16 gate=holes v_first=1 seed=99",
)
RESIDUES = {"quick": (0, 1, 16), "wide": (0, 1, 16), "standard": tuple(range(17)), "exhaustive": tuple(range(65))}
DRIFT = {"quick": 200, "wide": 10_000, "standard": 400, "exhaustive": 3000}


def single(effort: str) -> tuple[Case, ...]:
    """Return calls of one token a row."""
    return _some(SINGLE, effort)


def single_and_mixed(effort: str) -> tuple[Case, ...]:
    """Return calls of one token a row, and packed rows of several lengths."""
    return (*_some(SINGLE, effort), *_some(MIXED, effort))


def mixed(effort: str) -> tuple[Case, ...]:
    """Return packed rows of several lengths."""
    return _some(MIXED, effort)


def long(effort: str) -> tuple[Case, ...]:
    """Return single sequences longer than a chunk."""
    return _some(LONG, effort)


def short(effort: str) -> tuple[Case, ...]:
    """Return two rows of a few tokens."""
    return _some(SHORT, effort)


def endless(effort: str) -> tuple[Case, ...]:
    """Return long sequences with decays next to one, by which nothing is forgotten, and with those of a layer."""
    tokens = DRIFT[effort]
    return (
        Case.parse(f"T={tokens} K=16 V=16 gate=slow strengths=faint l2norm=1 sigmoid=1 seed=100"),
        Case.parse(f"T={tokens} K=16 V=16 gate=layer gate_form=softplus l2norm=1 sigmoid=1 gate_dtype=input seed=101"),
    )


def _some(texts: tuple[str, ...], effort: str) -> tuple[Case, ...]:
    return tuple(Case.parse(text) for text in (texts[:2] if effort in ("quick", "wide") else texts))


def need(subject: Subject, *claims: str) -> None:
    """Skip the running test unless all of these are claimed."""
    for claim in ("decode", *claims):
        if not getattr(subject.claims, claim):
            pytest.skip(f"unclaimed: {claim}")


def opened(inputs: KdaInputs) -> tuple[KdaInputs, Tensor]:
    """Return the tokens of a call without its state, and that state."""
    assert inputs.initial_state is not None
    return inputs.replace(initial_state=None), inputs.initial_state


def deviations(subject: Subject, call: Call) -> dict[str, Tensor]:
    """Return how far apart two correct results of the call may be."""
    return {name: entry.variance.sqrt() for name, entry in subject.budget(call, backward=False).items()}


@pytest.mark.law("step-is-the-recurrence", cases=single_and_mixed)
def test_a_step_is_the_recurrence(subject: Subject, call: Call) -> None:
    """Outputs and the states left in the slots are those of the recurrence [KL eq. 1], for rows of any lengths in one call."""
    need(subject)
    inputs, states = opened(subject.inputs(call))
    slots = scattered(inputs.num_sequences, subject.device)
    pool = pool_with(states, slots, 2 * len(slots))
    o = subject.step(call, Step(inputs=inputs, slots=slots), pool)
    subject.judge(call, {"o": o, "final_state": pool[slots]}, subject.budget(call, backward=False))


@pytest.mark.law("prefill-and-steps-are-one-prefill", cases=long)
def test_steps_go_on_where_a_prefill_ends(subject: Subject, call: Call, effort: str) -> None:
    """A prefill of any length, then a step a token, is a correct evaluation of the whole; likewise steps alone."""
    need(subject)
    whole = subject.inputs(call)
    budget = subject.budget(call, backward=False)
    total = call.case.num_tokens
    slots = torch.tensor([1], device=subject.device)
    for residue in RESIDUES[effort]:
        at = total - residue
        head = subject.forward(call, relations.tokens(whole, slice(0, at)))
        assert head.final_state is not None
        pool, parts = pool_with(head.final_state, slots, 3), [head.o]
        for t in range(at, total):
            inputs, _ = opened(relations.tokens(whole, slice(t, t + 1)))
            parts.append(subject.step(call, Step(inputs=inputs, slots=slots), pool))
        subject.judge(call, {"o": torch.cat(parts, 1), "final_state": pool[slots]}, budget)


@pytest.mark.law("steps-do-not-drift", cases=endless)
def test_many_steps_stay_within_the_budget(subject: Subject, call: Call) -> None:
    """Nothing but steps, from the first token to the last, is a correct evaluation of the whole."""
    need(subject)
    whole, states = opened(subject.inputs(call))
    slots = torch.tensor([1], device=subject.device)
    pool = pool_with(states, slots, 3)
    parts = [
        subject.step(call, Step(inputs=relations.tokens(whole, slice(t, t + 1)), slots=slots), pool)
        for t in range(call.case.num_tokens)
    ]
    found = {"o": torch.cat(parts, 1), "final_state": pool[slots]}
    subject.judge(call, found, subject.budget(call, backward=False))


@pytest.mark.law("slots-are-isolated", cases=single_and_mixed)
def test_slots_of_no_row_are_left_alone(subject: Subject, call: Call) -> None:
    """No slot that is no row's changes by one bit, nor does the memory between slots."""
    need(subject)
    inputs, states = opened(subject.inputs(call))
    slots = scattered(inputs.num_sequences, subject.device)
    pool = pool_with(states, slots, 2 * len(slots) + 1)
    memory = pool._base  # noqa: SLF001 - the memory that the pool is a view of
    assert memory is not None
    # Numbers: what is written where it should not be must not hide in NaN.
    memory.nan_to_num_(nan=3.0)
    before = memory.clone()
    subject.step(call, Step(inputs=inputs, slots=slots), pool)
    memory[slots, 1] = before[slots, 1]
    subject.same_bits(call, "final_state", memory.flatten(0, 1), before.flatten(0, 1), "it is in the slot of no row")


@pytest.mark.law("not-a-number-stays-in-its-slot", cases=single_and_mixed)
def test_a_state_that_is_no_number_stays_in_its_slot(subject: Subject, call: Call) -> None:
    """NaN in the state and the tokens of one row changes no bit of the outputs and states of the others."""
    need(subject)
    inputs, states = opened(subject.inputs(call))
    slots = scattered(inputs.num_sequences, subject.device)
    pool, sick = (pool_with(states, slots, 2 * len(slots)) for _ in range(2))
    clean = subject.step(call, Step(inputs=inputs, slots=slots), pool)
    sick[slots[0]] = torch.nan
    row, _, span = next(iter(inputs.segments()))
    first = (0, span) if inputs.cu_seqlens is not None else (slice(0, 1), slice(None))
    assert row.start == 0
    poisoned = inputs.v.clone()
    poisoned[first] = torch.nan
    found = subject.step(call, Step(inputs=inputs.replace(v=poisoned), slots=slots), sick).clone()
    found[first] = clean[first]
    what = "another row holds NaN"
    subject.same_bits(call, "o", found, clean, what)
    subject.same_bits(call, "final_state", sick[slots[1:]], pool[slots[1:]], what)


@pytest.mark.law("padding-rows-do-nothing", cases=single_and_mixed)
def test_padding_rows_change_nothing(subject: Subject, call: Call) -> None:
    """Rows that start at -1 change no slot, the first and the last included, and no bit of the other rows."""
    need(subject)
    inputs, states = opened(subject.inputs(call))
    count = inputs.num_sequences
    slots = scattered(count, subject.device)
    whole, pool = (pool_with(states, slots, 2 * count + 1) for _ in range(2))
    whole[[0, -1]] = pool[[0, -1]] = states[:2] + 1
    before = pool.clone()
    clean = subject.step(call, Step(inputs=inputs, slots=slots), whole)
    padded = torch.arange(count, device=subject.device) % 2 == 1
    found = subject.step(call, Step(inputs=inputs, slots=slots.masked_fill(padded, PADDING)), pool).clone()
    offsets = range(count + 1) if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    for n in range(1, count, 2):
        place = (0, slice(offsets[n], offsets[n + 1])) if inputs.cu_seqlens is not None else (n,)
        found[place] = clean[place]
    expected = before.clone()
    expected[slots[~padded]] = whole[slots[~padded]]
    what = "other rows are padding"
    subject.same_bits(call, "o", found, clean, what)
    subject.same_bits(call, "final_state", pool, expected, what)


@pytest.mark.law("row-order-is-free", cases=mixed)
def test_rows_in_another_order_give_the_same_result(subject: Subject, call: Call) -> None:
    """Single tokens before prompts or behind them: each row's result goes with it."""
    need(subject)
    inputs, states = opened(subject.inputs(call))
    assert inputs.cu_seqlens is not None
    slots = scattered(inputs.num_sequences, subject.device)
    pool, other = (pool_with(states, slots, 2 * len(slots)) for _ in range(2))
    o = subject.step(call, Step(inputs=inputs, slots=slots), pool)
    offsets, lengths = inputs.cu_seqlens.tolist(), call.case.T
    order = sorted(range(len(lengths)), key=lambda n: (lengths[n], -n))
    places = torch.cat([torch.arange(offsets[n], offsets[n + 1]) for n in order]).to(subject.device)
    starts = [0]
    for n in order:
        starts.append(starts[-1] + lengths[n])
    moved = inputs.replace(
        cu_seqlens=torch.tensor(starts, device=subject.device),
        **{name: getattr(inputs, name)[:, places] for name in relations.PER_TOKEN},
    )
    rows = torch.tensor(order, device=subject.device)
    found = subject.step(call, Step(inputs=moved, slots=slots[rows]), other)
    deviation = deviations(subject, call)
    subject.compare(call, "o", found, o[:, places], deviation["o"][:, places])
    subject.compare(call, "final_state", other[slots], pool[slots], deviation["final_state"])


@pytest.mark.law("a-freed-slot-is-clean", cases=single_and_mixed)
def test_a_new_row_sees_nothing_of_the_one_before(subject: Subject, call: Call) -> None:
    """A row without an initial state starts from zeros, though its slot holds NaN."""
    need(subject, "new_rows")
    inputs, states = opened(subject.inputs(call))
    slots = scattered(inputs.num_sequences, subject.device)
    fresh = torch.arange(len(slots), device=subject.device) % 2 == 0
    states[fresh] = torch.nan
    pool = pool_with(states, slots, 2 * len(slots))
    o = subject.step(call, Step(inputs=inputs, slots=slots, has_initial_state=~fresh), pool)
    clean = inputs.replace(initial_state=states.masked_fill(fresh[:, None, None, None], 0))
    subject.judge(call, {"o": o, "final_state": pool[slots]}, subject.budget(call, clean, backward=False))


@pytest.mark.law("drafts-taken-back-never-were", cases=short)
def test_drafts_that_are_not_accepted_leave_nothing_behind(subject: Subject, call: Call) -> None:
    """Drafts of three tokens, of which each row accepts one to three, are a correct evaluation of the accepted ones."""
    need(subject, "drafts")
    whole, states = opened(subject.inputs(call))
    slots = torch.tensor([[4, 1, 3], [6, 5, 2]], device=subject.device)
    pool = pool_with(states, slots[:, 0], 8)
    accepted, done = torch.ones(2, dtype=torch.int64, device=subject.device), [0, 0]
    o = torch.full_like(whole.v, torch.nan)
    for take in ([3, 1], [1, 3], [2, 2], [2, 2]):
        draft = relations.tokens(whole, slice(0, 3))
        draft = draft.replace(
            **{
                name: torch.stack([_from(getattr(whole, name)[row], done[row]) for row in range(2)])
                for name in relations.PER_TOKEN
            }
        )
        for row, count in enumerate(take):
            draft.v[row, count:] = 100.0
        found = subject.step(call, Step(inputs=draft, slots=slots, num_accepted_tokens=accepted), pool)
        for row, count in enumerate(take):
            o[row, done[row] : done[row] + count] = found[row, :count]
            done[row] += count
        accepted = torch.tensor(take, device=subject.device)
    last = pool[slots[torch.arange(2, device=subject.device), accepted - 1]]
    subject.judge(call, {"o": o, "final_state": last}, subject.budget(call, backward=False))


def _from(x: Tensor, at: int) -> Tensor:
    """Return three tokens from ``at`` on; behind the last, the first again."""
    return torch.cat([x[at : at + 3], x[: max(0, at + 3 - len(x))]])


@pytest.mark.law("resuming-a-snapshot-is-a-cold-run", cases=long)
def test_a_prompt_resumes_from_a_snapshot_as_if_run_from_the_start(subject: Subject, call: Call) -> None:
    """A prefix's state, kept in a slot while a longer prompt ran, continues to a correct evaluation, more than once."""
    need(subject, "snapshots")
    whole, states = opened(subject.inputs(call))
    every, total = 16, call.case.num_tokens
    device = subject.device
    kept = torch.tensor([[5, 2, PADDING, 3, 0]], device=device)
    pool = pool_with(states, torch.tensor([1], device=device), 8)
    first = Step(inputs=whole, slots=torch.tensor([1], device=device), snapshots=kept, snapshot_every=every)
    cold = subject.step(call, first, pool)
    if not bool(pool[0].isnan().all()):
        subject.fail(call, f"slot 0 must not be written, got a snapshot after {5 * every} of {total} tokens")
    budget = subject.budget(call, backward=False)
    for number, slot in ((1, 5), (2, 2), (4, 3), (2, 2)):
        before = pool[slot].clone()
        step = Step(
            inputs=relations.tokens(whole, slice(number * every, total)),
            slots=torch.tensor([6], device=device),
            sources=torch.tensor([slot], device=device),
        )
        warm = subject.step(call, step, pool)
        found = {"o": torch.cat([cold[:, : number * every], warm], 1), "final_state": pool[6:7]}
        subject.judge(call, found, budget)
        subject.same_bits(call, "final_state", pool[slot : slot + 1], before[None], "a row resumes from it")


@pytest.mark.law("graph-replay-is-eager", cases=mixed)
def test_a_replayed_graph_reads_its_tables_anew(subject: Subject, call: Call) -> None:
    """A captured step, replayed with other slots, lengths and padding, gives the bits of the step itself."""
    need(subject)
    if subject.device != "cuda":
        pytest.skip("not about this device: it has no graphs")
    inputs, states = opened(subject.inputs(call))
    assert inputs.cu_seqlens is not None
    slots = scattered(inputs.num_sequences, subject.device)
    pool = pool_with(states, slots, 2 * len(slots))
    step, start = Step(inputs=inputs, slots=slots), pool.clone()
    subject.step(call, step, pool)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = subject.step(call, step, pool)
    rows = len(slots)
    for order, padded in (([*range(1, rows), 0], 1), ([*range(rows)][::-1], rows - 1)):
        slots.copy_(scattered(rows, subject.device)[torch.tensor(order, device=subject.device)])
        slots[padded] = PADDING
        inputs.cu_seqlens[1:-1] = inputs.cu_seqlens[1:-1].sub(1).clamp(min=0)
        pool.copy_(start)
        graph.replay()
        eager = pool_with(states, slots, 2 * len(slots))
        eager.copy_(start)
        expected = subject.step(call, step, eager)
        subject.same_bits(call, "o", o, expected, "it is replayed")
        subject.same_bits(call, "final_state", pool, eager, "it is replayed")

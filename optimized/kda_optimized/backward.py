"""From a checked call to the launches of the backward: buffers, grids and constants.

Dimension letters: B batch, T tokens, H query/key heads, G value heads (where not said otherwise), K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from kda_reference.contract import TENSOR_ARGUMENTS

from kda_optimized.backward_channels import kda_chunk_bwd_channels_kernel
from kda_optimized.backward_heads import kda_chunk_bwd_heads_kernel
from kda_optimized.backward_pairs import kda_chunk_bwd_pairs_kernel
from kda_optimized.backward_prepare import kda_chunk_bwd_prepare_kernel
from kda_optimized.backward_states import kda_chunk_bwd_states_kernel
from kda_optimized.backward_walk import kda_chunk_bwd_walk_kernel
from kda_optimized.chunks import TOKEN_ROWS
from kda_optimized.chunkwise import CHUNK, Call
from kda_optimized.launch import beside, strides
from kda_optimized.launch_config import padded, tile
from kda_optimized.packing import Schedule, Segments, schedule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kda_reference.contract import KdaInputs
    from torch import Tensor

    from kda_optimized.launch_config import LaunchConfig

SPANS = (64, 32, 16)
# A cut sequence is walked twice more in either direction and once for both: fewer pieces do not pay.
LEAST_PIECES = 5
# Gradients that the last kernel makes, and those for which errors and pulled cotangents are needed.
BY_CHANNEL = frozenset(("q", "k", "g", "A_log", "dt_bias"))
BY_PAIR = BY_CHANNEL | {"beta"}
ROWS_PER_PROGRAM = 32
# Gradients of pairs, and of q and k where they are staged, are written and read back at once: as many spans at a time as fill a device
# several times and hardly outgrow its cache.
SCRATCH_BYTES = 2**26


class Rows(NamedTuple):
    """What the first kernel writes that the last reads as well, one entry per chunk and value head; see ``backward_prepare``."""

    q_rows: Tensor
    k_rows: Tensor
    rest_rows: Tensor
    tokens: Tensor
    decay: Tensor


class Scaled(NamedTuple):
    """A tensor as the walks write it: in the operand dtype, with the scales of each tile of value channels beside it; or neither."""

    values: Tensor | None
    scales: Tensor | None

    def arguments(self, name: str, scales: str) -> dict[str, Tensor | None]:
        """Return both as kernel arguments."""
        return {name: self.values, scales: self.scales}


class Walked(NamedTuple):
    """What the two walks leave for gradients by pair and by channel; see ``backward_states`` and ``backward_walk``."""

    states: Scaled
    dstates: Scaled
    errors: Scaled
    pulled: Scaled


NOTHING = Walked(*(Scaled(None, None) for _ in Walked._fields))


@dataclass(frozen=True)
class Backward:
    """One backward: a call, its cotangents and what its kernels share.

    Attributes
    ----------
    call
        The checked call.
    do, dfinal_state
        Cotangents of the results; ``None`` counts as zero.
    spans
        The sequences cut into spans, before each of which the state is kept.
    needed
        Names of the arguments whose gradients are asked for, in no order. No kernel is started, nothing stored and nothing allocated for
        the others alone; what is computed is the same bit for bit.
    """

    call: Call
    do: Tensor | None
    dfinal_state: Tensor | None
    spans: Schedule
    needed: frozenset[str]

    @property
    def by_pair(self) -> bool:
        """Return whether errors and pulled cotangents are needed."""
        return not BY_PAIR.isdisjoint(self.needed)

    @property
    def by_channel(self) -> bool:
        """Return whether states, their cotangents and gradients of scores are needed, too."""
        return not BY_CHANNEL.isdisjoint(self.needed)

    def new_gradients(self, *names: str) -> dict[str, Tensor]:
        """Return uninitialised gradients of those arguments that need one, in their shapes and dtypes."""
        tensors = self.call.inputs.tensors()
        return {
            name: self.call.new(*tensors[name].shape, dtype=tensors[name].dtype)
            for name in names
            if name in self.needed
        }

    def value_tile(self) -> int:
        """Return the value channels of a tile, the same in all kernels, since scales belong to tiles."""
        return tile(self.call.config(kda_chunk_bwd_states_kernel).block_v, self.call.sizes["V"])

    def common(self) -> dict[str, Any]:
        """Return what most kernels take."""
        call = self.call
        return {
            "T": call.inputs.q.shape[1], "EXACT": call.exact, "BK": padded(call.sizes["K"]),
            "BV": self.value_tile(), **call.pick("G", "K", "V"),
        }  # fmt: skip

    def cotangent(self) -> dict[str, Any]:
        """Return the cotangent of the outputs."""
        return {"do": self.do, **strides("o", "bthv", self.do), "HAS_DO": self.do is not None}

    def scaled(self, *shape: int, scales: tuple[int, ...], needed: bool) -> Scaled:
        """Return uninitialised buffers of values and scales, or none."""
        if not needed:
            return Scaled(None, None)
        return Scaled(self.call.new(*shape, dtype=self.operand()), self.call.new(*scales))

    def operand(self) -> torch.dtype:
        """Return the dtype of scaled operands."""
        return torch.float32 if self.call.exact else torch.float16

    def walked(self) -> Walked:
        """Return buffers for states at the spans, ``[spans, G, V, BK]``, and for value channels token by token, ``[B T, G, V]``."""
        sizes, width, x = self.call.sizes, padded(self.call.sizes["K"]), self.call.inputs
        spans, tokens = (self.spans.num_chunks, sizes["G"]), (x.q.shape[0] * x.q.shape[1], sizes["G"])
        states, dstates = (
            self.scaled(*spans, sizes["V"], width, scales=(*spans, self._tiles(), width), needed=self.by_channel)
            for _ in range(2)
        )
        errors, pulled = (
            self.scaled(*tokens, sizes["V"], scales=(*tokens, self._tiles()), needed=self.by_pair) for _ in range(2)
        )
        return Walked(states, dstates, errors, pulled)

    def _tiles(self) -> int:
        return -(-self.call.sizes["V"] // self.value_tile())


def gradients(**found: Tensor | None) -> dict[str, Any]:
    """Return gradients as kernel arguments, and whether they are asked for."""
    named = {f"d{name}": tensor for name, tensor in found.items()}
    return named | {f"HAS_{name.upper()}": tensor is not None for name, tensor in named.items()}


def chunk_backward(
    inputs: KdaInputs, do: Tensor | None, dfinal_state: Tensor | None, needed: Iterable[str] = TENSOR_ARGUMENTS
) -> dict[str, Tensor]:
    """Return the gradients of ``<do, o> + <dfinal_state, final_state>`` by argument name, in the dtype of each argument.

    ``needed`` names the arguments whose gradients are returned, where the call has them; all of them unless given.
    Nothing of the forward pass is kept but its inputs: preparing the chunks again costs less than reading what would be stored.
    """
    call = Call.of(inputs)
    length = next(length for length in SPANS if length <= max(CHUNK, inputs.chunk_size))
    names = frozenset(needed).intersection(inputs.tensors())
    run = Backward(call, do, dfinal_state, schedule(inputs, length), names)
    found: dict[str, Tensor] = {}
    rows, walked = _walk(run, found)
    if run.by_pair:
        # Only now, when what the walks alone read is free again.
        _gradients(run, found, rows, walked)
    return found


def _walk(run: Backward, found: dict[str, Tensor]) -> tuple[Rows, Walked]:
    """Prepare the chunks and walk along them in both directions; fill in the gradients of v and of the initial state."""
    call, x, sizes = run.call, run.call.inputs, run.call.sizes
    width, planes = padded(sizes["K"]), 1 if call.exact else 2
    plane = torch.float32 if call.exact else torch.bfloat16
    q_rows, k_rows, rest_rows, pull_rows = (call.per_chunk(CHUNK, width, dtype=run.operand()) for _ in range(4))
    mix, solve = (call.per_chunk(planes, CHUNK, CHUNK, dtype=plane) for _ in range(2))
    rows = Rows(
        q_rows, k_rows, rest_rows, tokens=call.per_chunk(TOKEN_ROWS.value, CHUNK), decay=call.per_chunk(2, width)
    )
    common = run.common()
    arguments = {
        **call.tensors("q", "k", "g", "beta"), **call.gate(), **call.strength(), **rows._asdict(), **call.pick("H", "G", "K"),
        **{name: common[name] for name in ("T", "EXACT", "BK")}, "BC": tile(call.config(kda_chunk_bwd_prepare_kernel).block_k, width),
        "pull_rows": pull_rows, "mix": mix, "solve": solve,
        "chunk_table": call.schedule.chunk_table, "scale": x.effective_scale, "RAISED": call.raised,
        "USE_L2NORM": x.use_qk_l2norm_in_kernel,
    }  # fmt: skip
    call.start(kda_chunk_bwd_prepare_kernel, call.schedule.num_chunks * sizes["G"], arguments)

    walked, span = run.walked(), run.spans.chunk_len // CHUNK
    walks = Walks(run, rows, pull_rows, mix, solve, call.cut(kda_chunk_bwd_states_kernel, LEAST_PIECES, span))
    found |= run.new_gradients("v")
    if "initial_state" in run.needed:
        found["initial_state"] = call.new_state()
    start, end = x.initial_state, run.dfinal_state
    dinitial = found.get("initial_state")
    if walks.pieces is not None:
        start, end = walks.joined(walks.pieces, dinitial)
        dinitial = None
    with beside(call.device) as second:
        if run.by_pair:
            # Neither walk needs the other.
            with torch.cuda.stream(second):
                walks.states(start, None, walked)
        walks.back(end, dinitial, walked, found.get("v"))
    return rows, walked


@dataclass(frozen=True)
class Walks:
    """The walks along the chunks of a backward, over whole sequences or over pieces of them.

    Attributes
    ----------
    run
        The backward.
    rows, pull_rows, mix, solve
        What the first kernel wrote.
    pieces
        What is walked side by side, ``None`` for whole sequences. States of pieces are ``[num_segments, G, K, V]``.
    """

    run: Backward
    rows: Rows
    pull_rows: Tensor
    mix: Tensor
    solve: Tensor
    pieces: Segments | None

    def joined(self, pieces: Segments, dinitial: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Return the state before each piece, where it is needed, and the cotangent of the state after each; fill in ``dinitial``."""
        run, call = self.run, self.run.call
        k, v = call.sizes["K"], call.sizes["V"]
        maps, shifts, dshifts = (call.new(pieces.num_segments, call.sizes["G"], k, width) for width in (k, v, v))
        self.states(None, maps, NOTHING, V=k, IDENTITY=True, HAS_VALUES=False)
        starts = None
        if run.by_pair:
            self.states(None, shifts, NOTHING)
            starts = call.join(pieces, maps, shifts, call.inputs.initial_state, None)
        self.back(None, dshifts, NOTHING, None)
        return starts, call.join(pieces, maps, dshifts, run.dfinal_state, dinitial, back=True)

    def states(self, start: Tensor | None, end: Tensor | None, walked: Walked, **changes: Any) -> None:  # noqa: ANN401 - a kernel's arguments
        """Walk from the state ``start``, or from zero, to the state ``end``; fill in what is asked for of ``walked``."""
        config = self.run.call.config(kda_chunk_bwd_states_kernel)
        if walked is NOTHING:
            # Scales belong to tiles, and so all tiles are alike, only where something is kept.
            config = config.for_maps()
        arguments = {
            **self._shared(walked.states.values), **self.run.call.tensors("v"), "solve": self.solve,
            **walked.states.arguments("states", "state_scales"), **walked.errors.arguments("errors", "error_scales"),
            "initial_state": start, **self._strides("i", start), "HAS_INITIAL": start is not None,
            "final_state": end, **self._strides("f", end), "HAS_FINAL": end is not None,
            "IDENTITY": False, "HAS_VALUES": True, "HAS_ERRORS": walked.errors.values is not None, **changes,
        }  # fmt: skip
        arguments["BV"] = tile(config.block_v, self.run.call.sizes["V"])
        self._start(kda_chunk_bwd_states_kernel, arguments, config)

    def back(self, end: Tensor | None, start: Tensor | None, walked: Walked, dv: Tensor | None) -> None:
        """Walk from the cotangent of the state ``end``, or from zero, to that of ``start``; fill in what is asked for of the others."""
        arguments = {
            **self._shared(walked.dstates.values), **self.run.cotangent(), "q_rows": self.rows.q_rows, "mix": self.mix,
            "dv": dv, "HAS_DV": dv is not None,
            "dfinal_state": end, **self._strides("f", end), "HAS_DFINAL": end is not None,
            "dinitial_state": start, **self._strides("i", start), "HAS_DINITIAL": start is not None,
            **walked.dstates.arguments("dstates", "dstate_scales"), **walked.pulled.arguments("pulled", "pulled_scales"),
            "HAS_PULLED": walked.pulled.values is not None,
            "WHOLE": self.run.do is not None and self.run.do.dtype == torch.bfloat16 and not self.run.call.exact,
        }  # fmt: skip
        self._start(kda_chunk_bwd_walk_kernel, arguments, self.run.call.config(kda_chunk_bwd_walk_kernel))

    def _shared(self, states: Tensor | None) -> dict[str, Any]:
        run, call, pieces = self.run, self.run.call, self.pieces
        tables = {
            "cu_seqlens": call.schedule.cu_seqlens, "chunk_offsets": call.schedule.chunk_offsets,
            "span_offsets": run.spans.chunk_offsets,
        }  # fmt: skip
        if pieces is not None:
            tables = {
                "cu_seqlens": pieces.cu_seqlens, "chunk_offsets": pieces.chunk_offsets, "span_offsets": pieces.span_offsets,
            }  # fmt: skip
        return {
            **run.common(), **tables, "k_rows": self.rows.k_rows, "pull_rows": self.pull_rows, "tokens": self.rows.tokens,
            "decay": self.rows.decay, "SPAN": run.spans.chunk_len // CHUNK, "HAS_STATES": states is not None,
        }  # fmt: skip

    def _strides(self, letter: str, state: Tensor | None) -> dict[str, int]:
        return self.run.call.state_strides(letter, state) if self.pieces is None else strides(letter, "ngkv", state)

    def _start(self, kernel: Any, arguments: dict[str, Any], config: LaunchConfig) -> None:  # noqa: ANN401 - a Triton function
        call = self.run.call
        count = call.inputs.num_sequences if self.pieces is None else self.pieces.num_segments
        call.start(kernel, count * call.sizes["G"] * -(-arguments["V"] // arguments["BV"]), arguments, config)


def _written(run: Backward, found: dict[str, Tensor], staged: int | None) -> dict[str, Tensor]:
    """Return what the kernel of channels writes of q, k and g: their gradients, or of q and k those of ``staged`` spans in float32.

    All three are written whoever asks: without one of these stores the compiler lays the sums for A_log and dt_bias out anew, and so adds
    in another order.
    """
    call, x, sizes = run.call, run.call.inputs, run.call.sizes
    names = ("q", "k", "g") if staged is None else ("g",)
    own = {name: found[name] if name in found else call.new(*x.g.shape, dtype=getattr(x, name).dtype) for name in names}
    if staged is not None:
        own |= {name: call.new(staged, run.spans.chunk_len, sizes["G"], sizes["K"]) for name in ("q", "k")}
    return own


def _gradients(run: Backward, found: dict[str, Tensor], rows: Rows, walked: Walked) -> None:
    """Fill in the gradients of q, k, beta, the gate and its parameters, some spans at a time."""
    call, x, sizes, spans = run.call, run.call.inputs, run.call.sizes, run.spans
    width, config = padded(sizes["K"]), call.config(kda_chunk_bwd_channels_kernel)
    slab = tile(config.block_k, width)
    slabs = min(config.num_warps, width // slab)
    parts = width // (slab * slabs)
    staged = sizes["H"] != sizes["G"] or (parts > 1 and x.use_qk_l2norm_in_kernel)
    per_token = 8 * spans.chunk_len + (8 * sizes["K"] if staged else 0)
    at_once = max(1, min(spans.num_chunks, SCRATCH_BYTES // (per_token * sizes["G"] * spans.chunk_len)))
    found |= run.new_gradients("q", "k", "g", "beta")
    written = _written(run, found, at_once if staged else None) if run.by_channel else {}
    dscores = call.new(at_once, sizes["G"], 2, spans.chunk_len, spans.chunk_len) if run.by_channel else None
    slope_parts = call.per_chunk(parts) if "A_log" in run.needed else None
    bias_parts = call.per_chunk(sizes["K"]) if "dt_bias" in run.needed else None
    shared = {
        **run.common(), **run.cotangent(), **walked.errors.arguments("errors", "error_scales"),
        **walked.pulled.arguments("pulled", "pulled_scales"), "dscores": dscores, "span_table": spans.chunk_table, "BT": spans.chunk_len,
    }  # fmt: skip
    pairs = {
        **{name: value for name, value in shared.items() if name not in ("BK", "K")},
        **call.tensors("beta"), **call.strength(), **gradients(beta=found.get("beta")), "HAS_DSCORES": run.by_channel,
    }  # fmt: skip
    channels = {
        **shared, **rows._asdict(), **call.tensors("q", "k", "g"), **call.gate(), **walked.states.arguments("states", "state_scales"),
        **walked.dstates.arguments("dstates", "dstate_scales"), **call.pick("H"),
        **{f"d{name}": tensor for name, tensor in written.items()},
        "dA_parts": slope_parts, "HAS_DA": slope_parts is not None, "dbias_parts": bias_parts, "HAS_DBIAS": bias_parts is not None,
        "chunk_offsets": call.schedule.chunk_offsets, "BC": slab, "W": slabs, "STAGED": staged,
        "scale": x.effective_scale, "USE_L2NORM": x.use_qk_l2norm_in_kernel,
    }  # fmt: skip
    rows_at_once = min(ROWS_PER_PROGRAM, spans.chunk_len)
    heads = {
        **call.tensors("q", "k"), **call.pick("H", "G", "K"), "dq_G": written.get("q"), "dk_G": written.get("k"),
        **gradients(q=found.get("q"), k=found.get("k")),
        "span_table": spans.chunk_table, "T": x.q.shape[1], "BT": spans.chunk_len, "BR": rows_at_once, "BK": width,
        "USE_L2NORM": x.use_qk_l2norm_in_kernel,
    }  # fmt: skip
    for first in range(0, spans.num_chunks, at_once):
        count, place = min(at_once, spans.num_chunks - first), {"first_span": first}
        call.start(kda_chunk_bwd_pairs_kernel, count * sizes["G"], pairs | place)
        if run.by_channel:
            call.start(kda_chunk_bwd_channels_kernel, count * sizes["G"] * parts, channels | place)
        if staged and ("q" in found or "k" in found):
            programs = count * sizes["H"] * (spans.chunk_len // rows_at_once)
            call.start(kda_chunk_bwd_heads_kernel, programs, heads | place)
    # The second stage of these sums runs in a fixed order too.
    if slope_parts is not None:
        found["A_log"] = slope_parts.sum((0, 2))
    if bias_parts is not None:
        found["dt_bias"] = bias_parts.sum(0).flatten()

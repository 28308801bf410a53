"""From a checked call to kernel launches: buffers, grids and constants of the chunkwise form and of the recurrence.

Dimension letters: B batch, T tokens, H query/key heads, G value heads, K key width, V value width, N sequences, C chunk length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kda_optimized.chunks import TOKEN_ROWS
from kda_optimized.forward_prepare import kda_chunk_fwd_prepare_kernel
from kda_optimized.forward_segments import kda_chunk_fwd_segments_kernel
from kda_optimized.forward_walk import kda_chunk_fwd_walk_kernel
from kda_optimized.launch import Launch, strides, submit
from kda_optimized.launch_config import LaunchConfig, config_of, padded, tile
from kda_optimized.packing import Schedule, Segments, offsets_of, schedule, segments
from kda_optimized.recurrent import kda_recurrent_fwd_kernel
from kda_optimized.strips import RAISE, RAISE_UNIT, STRIP

if TYPE_CHECKING:
    from kda_reference.contract import KdaInputs
    from torch import Tensor

CHUNK = STRIP.value
# A cut sequence is walked three times, and its first two walks only start the third: few pieces do not pay.
LEAST_PIECES = 6


class Prepared(NamedTuple):
    """What the first kernel writes, one entry per chunk and value head; see ``forward_prepare``."""

    q_rows: Tensor
    k_rows: Tensor
    rest_rows: Tensor
    tokens: Tensor
    scores: Tensor
    decay: Tensor


@dataclass(frozen=True)
class Call:
    """A checked call as kernels see it.

    Attributes
    ----------
    inputs
        The call, detached.
    exact
        Whether products run in float32 (float32 inputs) or on 16-bit operands.
    """

    inputs: KdaInputs
    exact: bool

    @classmethod
    def of(cls, inputs: KdaInputs) -> Call:
        """Take a checked call; the parameters of the gate become contiguous, everything else stays where it is."""
        changes = {name: tensor.detach() for name, tensor in inputs.tensors().items()}
        changes |= {name: changes[name].contiguous() for name in ("A_log", "dt_bias") if name in changes}
        return cls(inputs.replace(**changes), inputs.q.dtype == torch.float32)

    @property
    def device(self) -> torch.device:
        """Return the device of every tensor of the call."""
        return self.inputs.q.device

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Return the constants H, G, K and V."""
        q, v = self.inputs.q, self.inputs.v
        return {"H": q.shape[2], "G": v.shape[2], "K": q.shape[3], "V": v.shape[3]}

    @cached_property
    def schedule(self) -> Schedule:
        """Return the chunks of the call."""
        return schedule(self.inputs, CHUNK)

    def cut(self, kernel: Any, least_pieces: int, span: int = 1) -> Segments | None:  # noqa: ANN401 - a Triton function
        """Return the pieces of whole spans that a walk takes side by side, ``None`` where whole sequences fill the device."""
        config, offsets = self.config(kernel), offsets_of(self.inputs)
        programs = _value_programs(self, tile(config.block_v, self.sizes["V"]))
        pieces = config.programs // max(programs, 1)
        longest = -(-max(end - start for start, end in pairwise(offsets)) // self.schedule.chunk_len)
        if pieces < least_pieces or longest < least_pieces * config.least_chunks:
            return None
        most_chunks = max(-(-longest // pieces), config.least_chunks)
        return segments(self.inputs, self.schedule.chunk_len, -(-most_chunks // span), span)

    def join(
        self,
        pieces: Segments,
        maps: Tensor,
        shifts: Tensor,
        first: Tensor | None,
        last: Tensor | None,
        *,
        back: bool = False,
    ) -> Tensor:
        """Return the state ``[num_segments, G, K, V]`` before each piece, given its map and shift, from ``first`` on; write the ``last``.

        With ``back``, the cotangent of the state after each piece: ``first`` is that of the final state, ``last`` that of the initial one.
        """
        starts = torch.empty_like(shifts)
        bv = tile(self.config(kda_chunk_fwd_segments_kernel).block_v, self.sizes["V"])
        arguments = {
            **self.pick("G", "K", "V"), "maps": maps, "shifts": shifts, "starts": starts, "first_segments": pieces.first_segments,
            "initial_state": first, **self.state_strides("i", first), "HAS_INITIAL": first is not None,
            "final_state": last, **self.state_strides("f", last), "HAS_FINAL": last is not None,
            "BK": padded(self.sizes["K"]), "BV": bv, "EXACT": self.exact, "BACK": back,
        }  # fmt: skip
        self.start(kda_chunk_fwd_segments_kernel, _value_programs(self, bv), arguments)
        return starts

    def config(self, kernel: Any) -> LaunchConfig:  # noqa: ANN401 - a Triton function
        """Return how a kernel is launched."""
        width = max(padded(self.sizes["K"]), padded(self.sizes["V"]))
        return config_of(kernel.__name__, self.device, 4 if self.exact else 2, width)

    def pick(self, *names: str) -> dict[str, int]:
        """Return some of the constants H, G, K and V."""
        return {name: self.sizes[name] for name in names}

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised buffer."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def per_chunk(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised buffer ``[num_chunks, G, *shape]``."""
        return self.new(self.schedule.num_chunks, self.sizes["G"], *shape, dtype=dtype)

    def new_state(self) -> Tensor:
        """Return an uninitialised state in the layout of the call."""
        return self.new(*self.inputs.state_shape)

    def state_strides(self, letter: str, state: Tensor | None) -> dict[str, int]:
        """Return the strides of a state as kernel arguments, whatever its layout."""
        return strides(letter, "ngvk" if self.inputs.state_v_first else "ngkv", state)

    def tensors(self, *names: str) -> dict[str, Any]:
        """Return input tensors and their strides as kernel arguments."""
        axes = {"q": "bthk", "k": "bthk", "v": "bthv", "g": "bthk", "beta": "bth"}
        found: dict[str, Any] = {}
        for name in names:
            tensor = getattr(self.inputs, name)
            found |= {name: tensor, **strides(name[0], axes[name], tensor)}
        return found

    def gate(self) -> dict[str, Any]:
        """Return the arguments of the gate; a kernel never reads a stand-in for an absent parameter."""
        x = self.inputs
        return {
            "A_log": x.g if x.A_log is None else x.A_log,
            "dt_bias": x.g if x.dt_bias is None else x.dt_bias,
            "lower_bound": 0.0 if x.lower_bound is None else float(x.lower_bound),
            "USE_GATE": x.use_gate_in_kernel,
            "BOUNDED": x.lower_bound is not None,
            "HAS_A_LOG": x.A_log is not None,
            "HAS_DT_BIAS": x.dt_bias is not None,
        }

    @property
    def raised(self) -> float:
        """Return by how many binary orders of magnitude rows that carry a decay are raised."""
        if self.exact:
            return 0.0
        return float((RAISE_UNIT if self.inputs.use_qk_l2norm_in_kernel else RAISE).value)

    def strength(self) -> dict[str, Any]:
        """Return the constants of the write strength."""
        return {
            "USE_SIGMOID": self.inputs.use_beta_sigmoid_in_kernel,
            "CEILING": 2.0 if self.inputs.allow_neg_eigval else 1.0,
        }

    def walk(self, done: Prepared) -> dict[str, Any]:
        """Return the arguments that the kernels share which walk along the chunks from the first to the last."""
        x = self.inputs
        return {
            **self.tensors("v"), "k_rows": done.k_rows, "rest_rows": done.rest_rows, "tokens": done.tokens, "decay": done.decay,
            **self.pick("G", "K", "V"), "initial_state": x.initial_state, **self.state_strides("i", x.initial_state),
            "HAS_INITIAL": x.initial_state is not None, "cu_seqlens": self.schedule.cu_seqlens,
            "chunk_offsets": self.schedule.chunk_offsets, "T": x.q.shape[1], "BT": self.schedule.chunk_len,
            "BK": padded(self.sizes["K"]), "EXACT": self.exact,
        }  # fmt: skip

    def start(self, kernel: Any, programs: int, arguments: dict[str, Any], config: LaunchConfig | None = None) -> None:  # noqa: ANN401
        """Submit a launch with the options of the launch table, or with those of another ``config``."""
        options = (config or self.config(kernel)).options()
        submit(Launch(kernel=kernel, programs=programs, arguments=arguments, options=options))


def chunk_forward(inputs: KdaInputs) -> tuple[Tensor, Tensor | None]:
    """Return ``o`` and the final state, the latter ``None`` unless asked for."""
    call = Call.of(inputs)
    o = torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=call.device)
    final = call.new_state() if inputs.output_final_state else None
    done, pieces = prepare(call), call.cut(kda_chunk_fwd_walk_kernel, LEAST_PIECES)
    if pieces is None:
        _walk(call, done, {}, o=o, final_state=final, programs=inputs.num_sequences)
        return o, final
    k, v = call.sizes["K"], call.sizes["V"]
    maps, shifts = (call.new(pieces.num_segments, call.sizes["G"], k, width) for width in (k, v))
    tables = {
        "cu_seqlens": pieces.cu_seqlens, "chunk_offsets": pieces.chunk_offsets, "initial_state": None, "HAS_INITIAL": False,
    }  # fmt: skip
    _walk(
        call,
        done,
        {**tables, "V": k, "IDENTITY": True, "HAS_VALUES": False},
        final_state=maps,
        programs=pieces.num_segments,
    )
    _walk(call, done, tables, final_state=shifts, programs=pieces.num_segments)
    starts = call.join(pieces, maps, shifts, inputs.initial_state, final)
    starting = {"initial_state": starts, **strides("i", "ngkv", starts), "HAS_INITIAL": True}
    _walk(call, done, {**tables, **starting}, o=o, programs=pieces.num_segments)
    return o, final


def _walk(
    call: Call,
    done: Prepared,
    changes: dict[str, Any],
    *,
    programs: int,
    o: Tensor | None = None,
    final_state: Tensor | None = None,
) -> None:
    """Run the second kernel over sequences or segments; ``final_state`` of segments is ``[M, G, K, V]``."""
    arguments = {
        **call.walk(done), "q_rows": done.q_rows, "scores": done.scores, "IDENTITY": False, "HAS_VALUES": True,
        "WHOLE_VALUES": call.inputs.v.dtype == torch.bfloat16, "o": o, "HAS_OUTPUT": o is not None,
        "final_state": final_state, "HAS_FINAL": final_state is not None, **changes,
    }  # fmt: skip
    whole = "cu_seqlens" not in changes
    arguments |= call.state_strides("f", final_state) if whole else strides("f", "ngkv", final_state)
    config = call.config(kda_chunk_fwd_walk_kernel)
    if o is None:
        config = config.for_maps()
    arguments["BV"] = tile(config.block_v, arguments["V"])
    tiles = -(-arguments["V"] // arguments["BV"])
    call.start(kda_chunk_fwd_walk_kernel, programs * call.sizes["G"] * tiles, arguments, config)


def prepare(call: Call) -> Prepared:
    """Run the first kernel."""
    bk, planes = padded(call.sizes["K"]), 1 if call.exact else 2
    operand = torch.float32 if call.exact else torch.float16
    plane = torch.float32 if call.exact else torch.bfloat16
    done = Prepared(
        q_rows=call.per_chunk(CHUNK, bk, dtype=operand),
        k_rows=call.per_chunk(CHUNK, bk, dtype=operand),
        rest_rows=call.per_chunk(planes, CHUNK, bk, dtype=plane),
        tokens=call.per_chunk(TOKEN_ROWS.value, CHUNK),
        scores=call.per_chunk(planes, CHUNK, CHUNK, dtype=plane),
        decay=call.per_chunk(2, bk),
    )
    arguments = {
        **call.tensors("q", "k", "g", "beta"), **call.gate(), **call.strength(), **done._asdict(), **call.pick("H", "G", "K"),
        "chunk_table": call.schedule.chunk_table, "scale": call.inputs.effective_scale, "T": call.inputs.q.shape[1], "BK": bk,
        "BC": tile(call.config(kda_chunk_fwd_prepare_kernel).block_k, bk), "EXACT": call.exact,
        "RAISED": call.raised, "USE_L2NORM": call.inputs.use_qk_l2norm_in_kernel,
    }  # fmt: skip
    call.start(kda_chunk_fwd_prepare_kernel, call.schedule.num_chunks * call.sizes["G"], arguments)
    return done


def _value_programs(call: Call, bv: int) -> int:
    return call.inputs.num_sequences * call.sizes["G"] * -(-call.sizes["V"] // bv)


def recurrent_forward(inputs: KdaInputs) -> tuple[Tensor, Tensor | None]:
    """Return ``o`` and the final state by the recurrence, in float32 whatever the inputs."""
    call = Call.of(inputs)
    x = call.inputs
    o = torch.empty(x.v.shape, dtype=x.v.dtype, device=call.device)
    final = call.new_state() if x.output_final_state else None
    bv = tile(call.config(kda_recurrent_fwd_kernel).block_v, call.sizes["V"])
    arguments = {
        **call.tensors("q", "k", "v", "g", "beta"), **call.gate(), **call.strength(), **call.sizes,
        "initial_state": x.initial_state, **call.state_strides("i", x.initial_state),
        "final_state": final, **call.state_strides("f", final),
        "o": o, "cu_seqlens": call.schedule.cu_seqlens, "scale": x.effective_scale,
        "T": x.q.shape[1], "BK": padded(call.sizes["K"]), "BV": bv,
        "HAS_INITIAL": x.initial_state is not None, "HAS_FINAL": final is not None, "USE_L2NORM": x.use_qk_l2norm_in_kernel,
    }  # fmt: skip
    call.start(kda_recurrent_fwd_kernel, _value_programs(call, bv), arguments)
    return o, final

"""From a checked call to kernel launches: buffers, grids, constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from triton import knobs

from kda_optimized.backward_chunk import kda_chunk_bwd_chunk_kernel
from kda_optimized.backward_walk import kda_chunk_bwd_walk_kernel
from kda_optimized.forward_prepare import kda_chunk_fwd_prepare_kernel
from kda_optimized.forward_walk import kda_chunk_fwd_walk_kernel
from kda_optimized.launch_config import chunk_length, config_of
from kda_optimized.packing import Packing, pack
from kda_optimized.recurrent import kda_recurrent_fwd_kernel

if TYPE_CHECKING:
    from kda_reference import KdaInputs
    from torch import Tensor

SMALLEST_TILE = 16


class Saved(NamedTuple):
    """What the forward keeps for the backward; see ``forward_prepare`` and ``forward_walk``."""

    q_decayed: Tensor
    k_decayed: Tensor
    k_rest: Tensor
    scores: Tensor
    inverse: Tensor
    chunk_decay: Tensor
    states: Tensor
    pseudo: Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """A call as kernels see it: contiguous tensors, sizes, constants.

    Attributes
    ----------
    operand_dtype
        Dtype of the operands of dots, and of what is written between kernels.
    precision, score_precision, sum_precision
        ``input_precision`` of dots: with stored operands, of scores, and of the inverse and sums of log decays.
    """

    inputs: KdaInputs
    packing: Packing
    bt: int
    bk: int
    operand_dtype: torch.dtype
    precision: str
    score_precision: str
    sum_precision: str

    @property
    def device(self) -> torch.device:
        return self.inputs.q.device

    @property
    def heads(self) -> tuple[int, int]:
        return self.inputs.q.shape[2], self.inputs.v.shape[2]

    @property
    def widths(self) -> tuple[int, int]:
        return self.inputs.k.shape[3], self.inputs.v.shape[3]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised buffer on the call's device, float32 unless a dtype is given."""
        return torch.empty(shape, dtype=dtype or torch.float32, device=self.device)

    def per_token(self, width: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer ``[B, T, G, width]``."""
        batch, length = self.inputs.q.shape[:2]
        return self.empty(batch, length, self.heads[1], width, dtype=dtype)

    def gate_parameters(self) -> tuple[Tensor, Tensor]:
        """Return ``A_log`` and ``dt_bias``; a kernel never reads the tensor that stands in for an absent one."""
        inputs = self.inputs
        return (
            inputs.g if inputs.A_log is None else inputs.A_log,
            inputs.g if inputs.dt_bias is None else inputs.dt_bias,
        )

    def gate_constants(self) -> dict[str, Any]:
        """Return the compile-time flags of the gate."""
        inputs = self.inputs
        return {
            "USE_GATE": inputs.use_gate_in_kernel,
            "BOUNDED": inputs.lower_bound is not None,
            "HAS_A": inputs.A_log is not None,
            "HAS_BIAS": inputs.dt_bias is not None,
        }

    def strength_constants(self) -> dict[str, Any]:
        """Return the compile-time flags of beta."""
        return {"SIGMOID": self.inputs.use_beta_sigmoid_in_kernel, "CEILING": 2.0 if self.inputs.allow_neg_eigval else 1.0}

    def state_strides(self) -> dict[str, int]:
        """Return the strides of K and V in the call's state layout."""
        k_width, v_width = self.widths
        by_k, by_v = (1, k_width) if self.inputs.state_v_first else (v_width, 1)
        return {"STATE_STRIDE_K": by_k, "STATE_STRIDE_V": by_v}

    def value_tiles(self, kernel: str) -> tuple[dict[str, int], dict[str, int]]:
        """Return the constants and launch options of a kernel that splits V."""
        config = config_of(kernel, self.device, self.operand_dtype.itemsize, self.bk)
        bv = min(config.bv, padded(self.widths[1]))
        return {"BV": bv, "NV": triton.cdiv(self.widths[1], bv)}, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


def padded(width: int) -> int:
    """Return the tile width of a head width: a power of two that dots accept."""
    return max(SMALLEST_TILE, triton.next_power_of_2(width))


def problem_of(inputs: KdaInputs) -> Problem:
    """Prepare a checked call for the kernels."""
    names = [*inputs.tensors()]
    inputs = inputs.replace(**{name: getattr(inputs, name).detach().contiguous() for name in names})
    half = inputs.q.dtype == torch.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    bk = padded(inputs.k.shape[3])
    bt = chunk_length(inputs.chunk_size, inputs.q.device, dtype.itemsize, max(bk, padded(inputs.v.shape[3])))
    # float16 holds neither v nor the state, so its operands stay float32 and its dots are those of float32.
    plain, sums = ("tf32", "tf32x3") if half else ("ieee", "ieee")
    return Problem(inputs, pack(inputs, bt), bt, bk, dtype, plain, plain, sums)


def chunk_forward(inputs: KdaInputs, *, save: bool) -> tuple[Tensor, Tensor | None, Saved]:
    """Run the two forward kernels."""
    call = problem_of(inputs)
    inputs = call.inputs
    (heads, value_heads), (k_width, v_width), bt = call.heads, call.widths, call.bt
    dtype, chunks = call.operand_dtype, call.packing.num_chunks
    saved = Saved(
        *(call.per_token(k_width, dtype) for _ in range(3)),
        *(call.per_token(bt, dtype) for _ in range(2)),
        call.empty(chunks, value_heads, k_width),
        call.empty(chunks if save else 0, value_heads, k_width, v_width, dtype=dtype),
        call.per_token(v_width if save else 0, dtype),
    )
    o = torch.empty_like(inputs.v)
    final_state = call.empty(*inputs.state_shape) if inputs.output_final_state else None
    if chunks:
        config = config_of("prepare", call.device, dtype.itemsize, call.bk)
        kda_chunk_fwd_prepare_kernel[(chunks * value_heads,)](
            inputs.q, inputs.k, inputs.g, inputs.beta, *call.gate_parameters(), *saved[:6],
            call.packing.chunk_table, call.packing.cu_seqlens, inputs.effective_scale, inputs.lower_bound or 0.0,
            H=heads, G=value_heads, K=k_width, BT=bt, BK=call.bk, LEVELS=bt.bit_length() - 1,
            L2NORM=inputs.use_qk_l2norm_in_kernel, **call.gate_constants(), **call.strength_constants(),
            SCORE_PRECISION=call.score_precision, SUM_PRECISION=call.sum_precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    tiles, options = call.value_tiles("walk")
    programs = inputs.num_sequences * value_heads * tiles["NV"]
    if programs:
        kda_chunk_fwd_walk_kernel[(programs,)](
            saved.q_decayed, saved.k_decayed, saved.k_rest, inputs.v, inputs.beta, saved.scores, saved.inverse, saved.chunk_decay,
            o, inputs.initial_state, final_state, saved.states, saved.pseudo,
            call.packing.cu_seqlens, call.packing.chunk_offsets, inputs.effective_scale,
            G=value_heads, K=k_width, V=v_width, BT=bt, BK=call.bk, **tiles, **call.state_strides(),
            HAS_INITIAL=inputs.initial_state is not None, STORE_FINAL=final_state is not None, STORE_STATES=save,
            **call.strength_constants(), PRECISION=call.precision, **options,
        )  # fmt: skip
    return o, final_state, saved


def chunk_backward(inputs: KdaInputs, saved: Saved, do: Tensor | None, dfinal_state: Tensor | None) -> dict[str, Tensor]:
    """Run the two backward kernels and the reductions over chunks and head groups; return gradients by argument name."""
    call = problem_of(inputs)
    inputs = call.inputs
    (heads, value_heads), (k_width, v_width), bt = call.heads, call.widths, call.bt
    dtype, chunks = call.operand_dtype, call.packing.num_chunks
    do = torch.zeros_like(inputs.v) if do is None else do.contiguous()
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    x, dstates, dv = call.per_token(v_width, dtype), torch.empty_like(saved.states), torch.empty_like(inputs.v)
    dinitial = None if inputs.initial_state is None else torch.empty_like(inputs.initial_state)
    tiles, options = call.value_tiles("backward_walk")
    programs = inputs.num_sequences * value_heads * tiles["NV"]
    if programs:
        kda_chunk_bwd_walk_kernel[(programs,)](
            saved.q_decayed, saved.k_decayed, saved.k_rest, inputs.beta, saved.scores, saved.inverse, saved.chunk_decay,
            do, dfinal_state, dv, x, dstates, dinitial, call.packing.cu_seqlens, call.packing.chunk_offsets, inputs.effective_scale,
            G=value_heads, K=k_width, V=v_width, BT=bt, BK=call.bk, **tiles, **call.state_strides(),
            HAS_DFINAL=dfinal_state is not None, STORE_DINITIAL=dinitial is not None,
            **call.strength_constants(), PRECISION=call.precision, **options,
        )  # fmt: skip
    grouped = heads != value_heads
    head_dtype = torch.float32 if grouped else inputs.q.dtype
    dq, dk = (call.per_token(k_width, head_dtype) for _ in range(2))
    dg, dbeta = torch.empty_like(inputs.g), torch.empty_like(inputs.beta)
    da_parts = call.empty(chunks, value_heads)
    dbias_parts = call.empty(chunks if inputs.dt_bias is not None else 0, value_heads, k_width)
    if chunks:
        tiles, options = call.value_tiles("backward_chunk")
        kda_chunk_bwd_chunk_kernel[(chunks * value_heads,)](
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, *call.gate_parameters(),
            saved.k_decayed, saved.states, saved.pseudo, do, x, dstates, dq, dk, dg, dbeta, da_parts, dbias_parts,
            call.packing.chunk_table, call.packing.cu_seqlens, inputs.effective_scale, inputs.lower_bound or 0.0,
            H=heads, G=value_heads, K=k_width, V=v_width, BT=bt, BK=call.bk, BV=tiles["BV"], LEVELS=bt.bit_length() - 1,
            L2NORM=inputs.use_qk_l2norm_in_kernel, **call.gate_constants(), **call.strength_constants(),
            PRECISION=call.precision, SCORE_PRECISION=call.score_precision, SUM_PRECISION=call.sum_precision, **options,
        )  # fmt: skip
    if grouped:
        dq, dk = (gradient.unflatten(2, (heads, -1)).sum(3).to(inputs.q.dtype) for gradient in (dq, dk))
    gradients = {"q": dq, "k": dk, "v": dv, "g": dg, "beta": dbeta}
    if inputs.A_log is not None:
        gradients["A_log"] = da_parts.sum(0)
    if inputs.dt_bias is not None:
        gradients["dt_bias"] = dbias_parts.sum(0).flatten()
    if dinitial is not None:
        gradients["initial_state"] = dinitial
    return gradients


def recurrent_forward(inputs: KdaInputs) -> tuple[Tensor, Tensor | None]:
    """Run the token-by-token kernel."""
    call = problem_of(inputs)
    inputs = call.inputs
    (heads, value_heads), (k_width, v_width) = call.heads, call.widths
    o = torch.empty_like(inputs.v)
    final_state = call.empty(*inputs.state_shape) if inputs.output_final_state else None
    tiles, options = call.value_tiles("recurrent")
    programs = inputs.num_sequences * value_heads * tiles["NV"]
    if programs:
        kda_recurrent_fwd_kernel[(programs,)](
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, *call.gate_parameters(), o, inputs.initial_state, final_state,
            call.packing.cu_seqlens, inputs.effective_scale, inputs.lower_bound or 0.0,
            H=heads, G=value_heads, K=k_width, V=v_width, BK=call.bk, **tiles, **call.state_strides(),
            HAS_INITIAL=inputs.initial_state is not None, STORE_FINAL=final_state is not None,
            L2NORM=inputs.use_qk_l2norm_in_kernel, **call.gate_constants(), **call.strength_constants(), **options,
        )  # fmt: skip
    return o, final_state

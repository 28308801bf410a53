"""The call contract of Kimi Delta Attention: what an argument means and what is refused.

One call computes, for every sequence and value head, the gated delta rule [KL eq. 1] on the
tensors named below. The argument names are those of the public ``fla.ops.kda`` interface, so that
an implementation of that interface can stand in for any other.

=======================  =======================  ================================================
argument                 shape                    meaning
=======================  =======================  ================================================
``q, k``                 ``[B, T, H, K]``         queries and keys
``v``                    ``[B, T, G, V]``         values; value head ``j`` reads q/k head
                                                  ``j // (G // H)``
``g``                    ``[B, T, G, K]``         log decay in nats (<= 0), or gate logit with
                                                  ``use_gate_in_kernel``
``beta``                 ``[B, T, G]``            write strength, or its logit with
                                                  ``use_beta_sigmoid_in_kernel``
``A_log``                ``[G]``                  log gate slope per value head
``dt_bias``              ``[G * K]``              gate bias per value head and channel
``initial_state``        ``[N, G, K, V]``         ``[N, G, V, K]`` with ``state_v_first``
``cu_seqlens``           ``[N + 1]``              packs N sequences into one row (B = 1)
=======================  =======================  ================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from kda_reference.errors import (
    DeviceError,
    DomainError,
    DtypeError,
    FlagError,
    PackingError,
    ShapeError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

LOWEST_LOWER_BOUND = -5.0
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TENSOR_ARGUMENTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaInputs:
    """The arguments of one call, under the names of the public interface.

    Attributes
    ----------
    q, k
        Queries and keys ``[B, T, H, K]``; unit length unless ``use_qk_l2norm_in_kernel``.
    v
        Values ``[B, T, G, V]``, ``G`` a multiple of ``H``.
    g
        Natural log of the per-channel decay per token ``[B, T, G, K]``, in ``(-inf, 0]`` (nats), or
        any finite gate logit when ``use_gate_in_kernel``.
    beta
        Write strength ``[B, T, G]``, in ``[0, 2]``, or any finite logit when
        ``use_beta_sigmoid_in_kernel``.
    A_log
        Log of the gate slope ``[G]`` (dimensionless). ``None`` is legal only with a bounded gate and
        means slope one.
    dt_bias
        Gate bias ``[G * K]``; ``None`` means zero.
    initial_state
        State before the first token of each sequence, float32 ``[N, G, K, V]``; ``None`` means zero.
        float64 where q is float64.
    cu_seqlens
        Integer ``[N + 1]`` offsets of the packed sequences; ``None`` means one sequence per batch row.
    scale
        Factor on the queries (dimensionless); ``None`` means ``K ** -0.5``.
    output_final_state
        Whether the call returns the state after the last token.
    use_qk_l2norm_in_kernel
        Normalise q and k over K first: ``x * rsqrt(sum(x^2) + 1e-6)``.
    use_gate_in_kernel
        ``g`` is a logit; the decay is the softplus gate, or the bounded gate when ``lower_bound`` is set.
    use_beta_sigmoid_in_kernel
        ``beta`` is a logit.
    allow_neg_eigval
        Doubles ``sigmoid(beta)``, so that a transition may have the eigenvalue -1.
    safe_gate
        The caller promises ``g >= lower_bound``, which an implementation may exploit.
    lower_bound
        Bound of the bounded gate, in ``[-5, 0)`` nats per token; ``None`` means the softplus gate.
    state_v_first
        States are ``[N, G, V, K]``.
    chunk_size
        Tokens per chunk of a chunkwise implementation; it must not change the result beyond rounding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    output_final_state: bool = True
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    lower_bound: float | None = None
    state_v_first: bool = False
    chunk_size: int = 64

    @property
    def effective_scale(self) -> float:
        """Return the factor on the queries, ``K ** -0.5`` unless given."""
        return self.k.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def num_sequences(self) -> int:
        """Return N, the number of independent sequences of the call."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the initial and final state of this call."""
        num_heads, k_width, v_width = self.v.shape[2], self.k.shape[3], self.v.shape[3]
        last = (v_width, k_width) if self.state_v_first else (k_width, v_width)
        return (self.num_sequences, num_heads, *last)

    def segments(self) -> Iterator[tuple[slice, slice, slice]]:
        """Yield ``(state rows, batch rows, tokens)`` of the parts that can be computed at once."""
        if self.cu_seqlens is None:
            batch = self.q.shape[0]
            yield slice(0, batch), slice(0, batch), slice(0, self.q.shape[1])
            return
        offsets = self.cu_seqlens.tolist()
        for row, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            yield slice(row, row + 1), slice(0, 1), slice(start, end)

    def keywords(self) -> dict[str, Any]:
        """Return the arguments as keywords of a callable with the public signature."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the floating-point tensor arguments that are present, by name."""
        named = {name: getattr(self, name) for name in TENSOR_ARGUMENTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replace(self, **changes: Any) -> KdaInputs:  # noqa: ANN401 - any field may change
        """Return a copy with some arguments replaced."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaResult:
    """What one call returns.

    Attributes
    ----------
    o
        Outputs ``[B, T, G, V]``.
    final_state
        State after the last token of each sequence, in the layout of ``initial_state``; ``None``
        unless ``output_final_state``.
    """

    o: Tensor
    final_state: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaGradients:
    """Gradients of ``<do, o> + <dfinal_state, final_state>``, each shaped like its input.

    An input that was not given has gradient ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None


def check_inputs(inputs: KdaInputs, *, read_offsets: bool = True) -> None:
    """Refuse a call whose arguments contradict the contract, before any work is done.

    Only metadata and ``cu_seqlens`` are read; use :func:`check_values` for the domains of values. Without ``read_offsets`` no element of
    any tensor is read, so that tensors without values can be checked.

    Raises
    ------
    ShapeError
        If two arguments disagree on an axis; names both.
    DtypeError
        If an argument has a dtype that is not allowed in its place.
    DeviceError
        If the arguments are on more than one device.
    PackingError
        If ``cu_seqlens`` does not start at 0, decreases, or does not end at T.
    FlagError
        If a flag misses its argument or excludes another.
    DomainError
        If ``lower_bound``, ``scale`` or ``chunk_size`` is out of range.
    """
    _check_shapes(inputs)
    _check_dtypes_and_devices(inputs)
    _check_flags(inputs)
    if inputs.cu_seqlens is not None:
        _check_packing(inputs.cu_seqlens, inputs.q.shape[0])
        if read_offsets:
            _check_offsets(inputs.cu_seqlens, inputs.q.shape[1])
    _check_state(inputs)


def check_values(inputs: KdaInputs) -> None:
    """Refuse values outside their domain; this reads every element.

    Raises
    ------
    DomainError
        If any tensor holds a NaN or infinity, or a pre-activated ``g`` is positive; names the first place.
    """
    for name, tensor in inputs.tensors().items():
        bad = ~torch.isfinite(tensor)
        if name == "g" and not inputs.use_gate_in_kernel:
            bad |= tensor > 0
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            rule = "be finite and <= 0 (a log decay)" if name == "g" and not inputs.use_gate_in_kernel else "be finite"
            message = f"{name} must {rule}, got {tensor[index].item()} at index {index}; mask or repair the input"
            raise DomainError(message)


def _check_shapes(inputs: KdaInputs) -> None:
    for name, axes in (("q", "BTHK"), ("k", "BTHK"), ("v", "BTGV"), ("g", "BTGK"), ("beta", "BTG")):
        shape = tuple(getattr(inputs, name).shape)
        if len(shape) != len(axes):
            message = f"{name} must have the axes [{', '.join(axes)}], got shape {shape}; add or drop an axis"
            raise ShapeError(message)
    sizes: dict[str, tuple[str, int]] = {}
    for name, axes in (("q", "BTHK"), ("k", "BTHK"), ("v", "BTGV"), ("g", "BTGK"), ("beta", "BTG")):
        for axis, size in zip(axes, getattr(inputs, name).shape, strict=True):
            owner, expected = sizes.setdefault(axis, (name, size))
            if size != expected:
                message = (
                    f"{name} must agree with {owner} on axis {axis}, got {size} against {expected}; "
                    "pass tensors of one call"
                )
                raise ShapeError(message)
    (_, num_heads), (_, num_value_heads) = sizes["H"], sizes["G"]
    if num_heads == 0 or num_value_heads % num_heads:
        message = f"v must have a multiple of q's {num_heads} heads, got {num_value_heads}; repeat or regroup heads"
        raise ShapeError(message)
    if sizes["K"][1] == 0 or sizes["V"][1] == 0:
        message = f"head widths must be positive, got K={sizes['K'][1]} and V={sizes['V'][1]}; pass a non-empty head"
        raise ShapeError(message)
    per_head = {"A_log": (num_value_heads,), "dt_bias": (num_value_heads * sizes["K"][1],)}
    for name, expected_shape in per_head.items():
        tensor = getattr(inputs, name)
        if tensor is not None and tuple(tensor.shape) != expected_shape:
            message = f"{name} must have shape {expected_shape}, got {tuple(tensor.shape)}; flatten it over heads"
            raise ShapeError(message)


def _check_dtypes_and_devices(inputs: KdaInputs) -> None:
    for name, tensor in inputs.tensors().items():
        if tensor.dtype not in FLOAT_DTYPES:
            message = f"{name} must be a floating-point tensor, got {tensor.dtype}; convert it"
            raise DtypeError(message)
        if name in ("k", "v") and tensor.dtype != inputs.q.dtype:
            message = f"{name} must have q's dtype {inputs.q.dtype}, got {tensor.dtype}; convert one of them"
            raise DtypeError(message)
        if tensor.device != inputs.q.device:
            message = f"{name} must be on q's device {inputs.q.device}, got {tensor.device}; move it"
            raise DeviceError(message)
    parameter_dtypes = {torch.float32, torch.float64 if inputs.q.dtype == torch.float64 else torch.float32}
    for name in ("A_log", "dt_bias"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in parameter_dtypes:
            message = f"{name} must be float32, got {tensor.dtype}; keep gate parameters in float32"
            raise DtypeError(message)


def _check_flags(inputs: KdaInputs) -> None:
    if inputs.use_gate_in_kernel:
        if inputs.A_log is None and inputs.lower_bound is None:
            message = "A_log must be given with use_gate_in_kernel unless lower_bound is set, got None; pass A_log [G]"
            raise FlagError(message)
        if inputs.safe_gate and inputs.lower_bound is None:
            message = "lower_bound must be given with safe_gate and use_gate_in_kernel, got None; pass one in [-5, 0)"
            raise FlagError(message)
    else:
        for name in ("A_log", "dt_bias"):
            if getattr(inputs, name) is not None:
                message = f"{name} must be None unless use_gate_in_kernel, got a tensor; set the flag or drop it"
                raise FlagError(message)
    if inputs.allow_neg_eigval and not inputs.use_beta_sigmoid_in_kernel:
        message = (
            "allow_neg_eigval must come with use_beta_sigmoid_in_kernel, got it alone; "
            "pass beta = 2 sigmoid(logit) or set the flag"
        )
        raise FlagError(message)
    bound = inputs.lower_bound
    if bound is not None and not LOWEST_LOWER_BOUND <= bound < 0:
        message = f"lower_bound must lie in [{LOWEST_LOWER_BOUND:g}, 0), got {bound}; -5 is the usual choice"
        raise DomainError(message)
    if inputs.scale is not None and not math.isfinite(inputs.scale):
        message = f"scale must be finite, got {inputs.scale}; None means K ** -0.5"
        raise DomainError(message)
    if inputs.chunk_size < 1:
        message = f"chunk_size must be positive, got {inputs.chunk_size}; 64 is the usual choice"
        raise DomainError(message)


def _check_packing(cu_seqlens: Tensor, batch: int) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        message = f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}; convert it"
        raise DtypeError(message)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        message = f"cu_seqlens must have shape [N + 1], got {tuple(cu_seqlens.shape)}; pass the N + 1 offsets"
        raise PackingError(message)
    if batch != 1:
        message = f"q must have batch size 1 with cu_seqlens, got {batch}; flatten the batch into the token axis"
        raise PackingError(message)


def _check_offsets(cu_seqlens: Tensor, num_tokens: int) -> None:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        message = f"cu_seqlens must start at 0, got {offsets[0]}; prepend the first offset"
        raise PackingError(message)
    for index, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if end < start:
            message = f"cu_seqlens must not decrease, got {start} then {end} at n={index + 1}; sort the offsets"
            raise PackingError(message)
    if offsets[-1] != num_tokens:
        message = f"cu_seqlens must end at T={num_tokens}, got {offsets[-1]}; cover every token"
        raise PackingError(message)


def _check_state(inputs: KdaInputs) -> None:
    state = inputs.initial_state
    if state is None:
        return
    if tuple(state.shape) != inputs.state_shape:
        layout = "[N, G, V, K]" if inputs.state_v_first else "[N, G, K, V]"
        message = (
            f"initial_state must have shape {layout} = {inputs.state_shape}, got {tuple(state.shape)}; "
            "check state_v_first"
        )
        raise ShapeError(message)
    allowed = (torch.float32, torch.float64) if inputs.q.dtype == torch.float64 else (torch.float32,)
    if state.dtype not in allowed:
        message = f"initial_state must be float32, got {state.dtype}; a rounded state loses small decays"
        raise DtypeError(message)

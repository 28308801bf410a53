"""Run the Triton kernels on a CPU, and repair what Triton's interpreter gets wrong.

Triton's interpreter keeps bfloat16 as 16-bit words and, as shipped in 3.6 and 3.7, computes on those words: products,
sums and comparisons of bfloat16 are meaningless, conversions from float32 truncate instead of rounding to nearest even,
tf32 products are not emulated, and under numpy >= 2.4 loop bounds read from memory fail. :func:`repair` replaces exactly
these operations. It changes nothing outside interpreted mode, and refuses to load on a Triton whose interpreter lacks the
places it repairs, because a silent half repair would make every CPU result worthless.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from kda_reference.errors import DeviceError

from kda_optimized.interpreter_speed import quicken

if TYPE_CHECKING:
    from collections.abc import Callable

Array: TypeAlias = np.ndarray[Any, Any]
TF32_MASK = np.uint32(0xFFFFE000)
QUIET_NAN = np.uint16(0x7FC0)
SWITCH = "TRITON_INTERPRET"
LAUNCH_OPTIONS = {"num_warps", "num_stages", "maxnreg"}


def choose_mode() -> None:
    """Select the interpreter on a machine without CUDA, unless the user has chosen or Triton is already loaded."""
    if SWITCH not in os.environ and "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ[SWITCH] = "1"


def is_interpreted() -> bool:
    """Return whether Triton was loaded in interpreted mode, which is decided once per process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)


def check_device(device: torch.device) -> None:
    """Refuse tensors on a device that this process cannot run kernels on.

    Raises
    ------
    DeviceError
        If the tensors are on a CPU but Triton was loaded to compile.
    """
    if device.type == "cpu" and not is_interpreted():
        message = (
            f"q must be on a CUDA device, got {device} with Triton loaded to compile; "
            f"set {SWITCH}=1 before triton is first imported to run kernels on a CPU"
        )
        raise DeviceError(message)


def decode(words: Array) -> Array:
    """Return the float32 values of bfloat16 words; exact."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: Array) -> Array:
    """Return the bfloat16 words nearest to float32 values, ties to even; every NaN becomes the quiet NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    words = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), QUIET_NAN, words)


HOOKS = {
    "InterpreterBuilder": ("cast_impl", "create_dot", "binary_op", "unary_op", "ternary_op", "create_fma"),
    "ReduceOps": ("sum", "min_max"),
    "ScanOps": ("cumsum",),
    "GridExecutor": ("__call__",),
    "InterpretedFunction": ("__call__", "rewrite"),
}
FUNCTIONS = ("TensorHandle", "_patch_lang", "_patch_lang_tensor", "_get_np_dtype")


def repair() -> None:
    """Replace the broken operations of Triton's interpreter; idempotent.

    Raises
    ------
    ImportError
        If this Triton's interpreter lacks a place to repair.
    """
    import triton.runtime.interpreter as shipped

    if getattr(shipped, "kda_repaired", False):
        return
    require_hooks(shipped)
    _repair_conversion(shipped)
    _repair_elementwise(shipped)
    _repair_dot(shipped)
    _repair_reductions(shipped)
    _repair_execution(shipped)
    quicken(shipped)
    shipped.kda_repaired = True


def require_hooks(shipped: Any) -> None:  # noqa: ANN401 - a module, of whatever Triton version
    """Check that every place to repair is there.

    Raises
    ------
    ImportError
        Naming what is missing.
    """
    import triton

    missing = [name for name in FUNCTIONS if not hasattr(shipped, name)]
    for owner, methods in HOOKS.items():
        missing += [f"{owner}.{name}" for name in methods if name not in vars(getattr(shipped, owner, object))]
    if missing:
        message = (
            f"Triton's interpreter must have {missing} to be repaired for bfloat16, got Triton {triton.__version__} without; "
            "use a Triton version this package is tested with, or a CUDA device"
        )
        raise ImportError(message)


def _repair_conversion(shipped: Any) -> None:  # noqa: ANN401
    import triton.language as tl

    handle, cast = shipped.TensorHandle, shipped.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:  # noqa: ANN401
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return handle(decode(src.data).astype(shipped._get_np_dtype(target), copy=False), target)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(encode(src.data.astype(np.float32, copy=False)), tl.bfloat16)
        return cast(self, src, dst_type)

    shipped.InterpreterBuilder.cast_impl = cast_impl


def _repair_elementwise(shipped: Any) -> None:  # noqa: ANN401
    import triton.language as tl

    builder, handle = shipped.InterpreterBuilder, shipped.TensorHandle
    binary, unary, ternary, fma = builder.binary_op, builder.unary_op, builder.ternary_op, builder.create_fma

    def is_bf16(operand: Any) -> bool:  # noqa: ANN401
        return bool(operand.dtype.scalar == tl.bfloat16)

    def rounded(values: Array) -> Any:  # noqa: ANN401
        return handle(encode(values), tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:  # noqa: ANN401
        if not (is_bf16(lhs) and is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        found = op(decode(lhs.data), decode(rhs.data))
        return handle(found, tl.int1) if found.dtype == np.bool_ else rounded(found)

    def unary_op(self: Any, arg: Any, op: Callable[..., Array]) -> Any:  # noqa: ANN401
        return rounded(op(decode(arg.data))) if is_bf16(arg) else unary(self, arg, op)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Callable[..., Array]) -> Any:  # noqa: ANN401
        # A selection moves words and needs no repair; its first operand is the condition.
        if not (is_bf16(lhs) and is_bf16(rhs) and is_bf16(other)):
            return ternary(self, lhs, rhs, other, op)
        return rounded(op(decode(lhs.data), decode(rhs.data), decode(other.data)))

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:  # noqa: ANN401
        return rounded(decode(x.data) * decode(y.data) + decode(z.data)) if is_bf16(z) else fma(self, x, y, z)

    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.ternary_op, builder.create_fma = ternary_op, create_fma


def _repair_dot(shipped: Any) -> None:  # noqa: ANN401
    import triton.language as tl

    dot = shipped.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:  # noqa: ANN401
        kind = a.dtype.scalar
        if kind not in (tl.bfloat16, tl.float16, tl.float32):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        x, y = (decode(m.data) if kind == tl.bfloat16 else m.data.astype(np.float32, copy=False) for m in (a, b))
        if kind == tl.float32 and str(input_precision).rpartition(".")[2] == "TF32":
            x, y = ((np.ascontiguousarray(m).view(np.uint32) & TF32_MASK).view(np.float32) for m in (x, y))
        return shipped.TensorHandle(np.matmul(x, y).astype(d.data.dtype, copy=False) + d.data, d.dtype.scalar)

    shipped.InterpreterBuilder.create_dot = create_dot


def _repair_reductions(shipped: Any) -> None:  # noqa: ANN401
    import triton.language as tl

    reduce_sum, min_max, cumsum = shipped.ReduceOps.sum, shipped.ReduceOps.min_max, shipped.ScanOps.cumsum

    def in_float32(self: Any, value: Any, compute: Callable[..., Any]) -> Any:  # noqa: ANN401
        """Apply ``compute`` to a bfloat16 tensor as float32 and round what comes back."""
        found = compute(self, self.to_tensor(decode(value.handle.data), tl.float32))
        outputs = found if isinstance(found, (list, tuple)) else (found,)
        rounded = [item.to(tl.bfloat16) if item.dtype == tl.float32 else item for item in outputs]
        return type(found)(rounded) if isinstance(found, (list, tuple)) else rounded[0]

    def repaired_sum(self: Any, value: Any) -> Any:  # noqa: ANN401
        return in_float32(self, value, reduce_sum) if value.dtype == tl.bfloat16 else reduce_sum(self, value)

    def repaired_min_max(self: Any, value: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:  # noqa: ANN401
        # As on a GPU a NaN loses against a number; unlike nanmax, fmax does not warn where there is nothing but NaN.
        quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}.get(val_reduce_op, val_reduce_op)

        def compute(ops: Any, plain: Any) -> Any:  # noqa: ANN401
            return min_max(ops, plain, quiet, idx_reduce_op)

        value = value[0] if isinstance(value, tuple) else value
        return in_float32(self, value, compute) if value.dtype == tl.bfloat16 else compute(self, value)

    def repaired_cumsum(self: Any, value: Any) -> Any:  # noqa: ANN401
        return in_float32(self, value, cumsum) if value.dtype == tl.bfloat16 else cumsum(self, value)

    shipped.ReduceOps.sum, shipped.ReduceOps.min_max, shipped.ScanOps.cumsum = (
        repaired_sum,
        repaired_min_max,
        repaired_cumsum,
    )


def _repair_execution(shipped: Any) -> None:  # noqa: ANN401
    import triton.language as tl

    execute, patch_tensor, patch_lang = shipped.GridExecutor.__call__, shipped._patch_lang_tensor, shipped._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    kept: list[Any] = []

    def quiet_call(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        # As shipped, an argument that the kernel does not have is dropped, which a compiled kernel refuses.
        if unknown := kwargs.keys() - set(self.arg_names) - LAUNCH_OPTIONS:
            message = f"{self.fn.__name__} must be given its own arguments, got {sorted(unknown)}"
            raise TypeError(message)
        # A GPU does not warn of an infinity or a NaN; the kernels mask what they must.
        with np.errstate(all="ignore"):
            execute(self, *args, **kwargs)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:  # noqa: ANN401
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(()).item()))

    def patch_once(fn: Any) -> Any:  # noqa: ANN401
        # As shipped, the whole language is patched at each launch and, for good, at each inner call, which takes most of the
        # time of a small kernel. Nothing else uses the language in this mode, so once is enough.
        del fn
        if not kept:
            kept.append(patch_lang(everything))
        return SimpleNamespace(restore=lambda: None)

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return self.rewrite()(*args, **kwargs)

    shipped.GridExecutor.__call__ = quiet_call
    shipped._patch_lang_tensor, shipped._patch_lang = patch_lang_tensor, patch_once
    shipped.InterpretedFunction.__call__ = call_device_function

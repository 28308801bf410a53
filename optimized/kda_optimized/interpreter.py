"""Repairs of Triton's interpreter, without which bfloat16 results on a CPU mean nothing.

As shipped it keeps bfloat16 as raw 16-bit words: ``tl.dot`` multiplies the words as integers, and casts from float32 truncate instead of
rounding to nearest even. The kernels of this package touch bfloat16 in loads, stores, casts and dots only, so these two are what is repaired.
Only bfloat16 changes; every other dtype takes the shipped path.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BF16_SHIFT = 16
QUIET_BIT = 0x0040


class InterpreterChangedError(RuntimeError):
    """This Triton's interpreter has no place for the repair; bfloat16 on a CPU would be silently wrong."""


def widen(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the float32 values of bfloat16 words."""
    return (words.astype(np.uint32) << BF16_SHIFT).view(np.float32)


def narrow(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the bfloat16 words nearest to float32 values, ties to even; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> BF16_SHIFT) & 1)) >> BF16_SHIFT
    quiet = (bits >> BF16_SHIFT) | QUIET_BIT
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).reshape(np.shape(values))


def repair() -> None:
    """Repair the interpreter when kernels run in it; otherwise do nothing.

    Raises
    ------
    InterpreterChangedError
        If this version of Triton lacks a method the repair replaces.
    """
    from triton import knobs

    if not knobs.runtime.interpret:
        return
    import triton.language as tl
    from triton.runtime import interpreter as shipped

    builder = shipped.InterpreterBuilder
    lacking = [name for name in ("create_dot", "cast_impl") if not hasattr(builder, name)]
    if lacking:
        message = f"Triton's interpreter must have {lacking} to be repaired for bfloat16; use a tested Triton version"
        raise InterpreterChangedError(message)
    if getattr(builder.create_dot, "repaired", False):
        return
    shipped_dot, shipped_cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:  # noqa: ANN401 - handles of the interpreter
        if a.dtype.scalar != tl.bfloat16:
            return shipped_dot(self, a, b, d, *options)
        return shipped.TensorHandle(np.matmul(widen(a.data), widen(b.data)) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:  # noqa: ANN401
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return shipped.TensorHandle(narrow(source.data), target.scalar)
        return shipped_cast(self, source, target)

    create_dot.repaired = True  # type: ignore[attr-defined]
    builder.create_dot, builder.cast_impl = create_dot, cast_impl

"""Arithmetic classes: which roundings a correct implementation may make, and where.

A class is a claim. Judged as ``bf16``, an implementation may round the operands of its matrix products to bfloat16;
judged as ``fp32``, the same rounding is a bug. The unit roundoff ``u`` of a format with ``p`` significand bits is
``2^-p``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FLOAT64_BITS = 53
FP16_QUANTUM = 2.0**-24
FP16_SMALLEST_NORMAL = 2.0**-14
SMALLEST_NORMAL = 2.0**-126
SIGNIFICAND_BITS = {"bf16": 8, "fp16": 11, "tf32": 11, "fp32": 24, "fp64": 53}
DTYPE_OF_FORMAT = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
U32 = 2.0**-24
U64 = 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Where the members of the budget's ensemble round, and to what format.

    Attributes
    ----------
    name
        The class as claims name it.
    storage
        Format of intermediate tensors: normalised q and k, the inverse, W, U, pseudo-values.
    operand
        Format that matrix products round their operands to, cotangents in the backward included; ``None`` means they take them as stored.
    score_operand
        Format of the decayed rows that the score matrices are products of; ``None`` means as stored.
    diagonal_operand
        The same for tokens of one strip of 16, which some implementations treat apart.
    merge_operand
        Format of the blocks that the inverse is put together from.
    state
        Format of the state carried between chunks.
    truncates
        Whether operands are truncated rather than rounded, as tensor cores may do with tf32.
    residual
        Whether pseudo-values are the inverse times ``beta (v - (E k) S)`` instead of ``U - W S``: then decayed keys are rounded before beta
        multiplies them, and beta's gradient is a product with a residual that has their error.
    """

    name: str
    storage: str
    operand: str | None
    score_operand: str | None
    diagonal_operand: str | None
    merge_operand: str | None = "tf32"
    state: str = "fp32"
    truncates: bool = False
    residual: bool = False

    def throughout(self) -> Arithmetic:
        """Return the arithmetic in which every product takes operands of the operand format, scores and the inverse included."""
        fmt = self.operand
        return replace(self, score_operand=fmt, diagonal_operand=fmt, merge_operand=fmt)

    @property
    def input_dtype(self) -> torch.dtype:
        """Return the dtype of q, k and v that a bare claim of this class is run with."""
        return DTYPE_OF_FORMAT[self.name.partition("-")[0]]


CLASSES = {
    arithmetic.name: arithmetic
    for arithmetic in (
        Arithmetic(
            name="fp64", storage="fp32", operand=None, score_operand=None, diagonal_operand=None, merge_operand=None
        ),
        Arithmetic(
            name="fp32", storage="fp32", operand=None, score_operand=None, diagonal_operand=None, merge_operand=None
        ),
        Arithmetic(
            name="tf32", storage="fp32", operand="tf32", score_operand="tf32", diagonal_operand="tf32", truncates=True
        ),
        Arithmetic(name="bf16", storage="bf16", operand="bf16", score_operand="tf32", diagonal_operand="tf32"),
        Arithmetic(name="fp16", storage="fp16", operand="fp16", score_operand="tf32", diagonal_operand="tf32"),
        Arithmetic(
            name="fp16-tf32",
            storage="fp16",
            operand="fp16",
            score_operand="tf32",
            diagonal_operand="tf32",
            truncates=True,
        ),
        Arithmetic(
            name="bf16-state16",
            storage="bf16",
            operand="bf16",
            score_operand="bf16",
            diagonal_operand="bf16",
            state="bf16",
        ),
        Arithmetic(
            name="fp16-state16",
            storage="fp16",
            operand="fp16",
            score_operand="fp16",
            diagonal_operand="fp16",
            state="fp16",
        ),
    )
}
"""Every class a claim may name. The members of ``fp64`` are those of ``fp32``: its budget is theirs times ``2^-29``,
since a first-order rounding error is linear in the unit roundoff."""

DEFAULT_CLASS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
"""The class an implementation is judged by when it claims none for an input dtype."""

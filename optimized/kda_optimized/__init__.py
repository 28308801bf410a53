"""Kimi Delta Attention in Triton: chunkwise forward and backward, and a fused recurrence.

Both functions take the arguments of ``fla.ops.kda`` and meet the contract of :mod:`kda_reference.contract`. On a machine
without a CUDA device the same kernels run in Triton's interpreter, which has to be chosen before Triton is imported;
importing this package does so, and repairs what the interpreter gets wrong about bfloat16.
"""

from kda_optimized import interpreter

interpreter.choose_mode()
if interpreter.is_interpreted():
    interpreter.repair()

from kda_optimized.api import chunk_kda, fused_recurrent_kda  # noqa: E402 - Triton's mode is decided first

__all__ = ["chunk_kda", "fused_recurrent_kda"]

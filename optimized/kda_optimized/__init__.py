"""Triton kernels of Kimi Delta Attention, call-compatible with ``fla.ops.kda``.

On a CUDA device they run natively. Where there is none they run in Triton's interpreter, which has to be chosen before Triton is
imported; importing this package does so, and repairs what the interpreter gets wrong about bfloat16.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kda_optimized import interpreter
from kda_optimized.api import chunk_kda, fused_recurrent_kda

interpreter.repair()

__all__ = ["chunk_kda", "fused_recurrent_kda"]

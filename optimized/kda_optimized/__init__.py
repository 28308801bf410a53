"""Kimi Delta Attention in Triton: by chunks, token by token and through a pool of states, and what stands around it in a layer.

``chunk_kda`` and ``fused_recurrent_kda`` take the arguments of ``fla.ops.kda`` and meet the contract of
:mod:`kda_reference.contract`; ``kda_decode_step`` is what a serving engine calls. The short convolution and the gated norm are kernels of
their own. On a machine without a CUDA device the same kernels run in Triton's interpreter, which has to be chosen before Triton
is imported; importing this package does so, and repairs what the interpreter gets wrong about bfloat16.
"""

from kda_optimized import interpreter

interpreter.choose_mode()
if interpreter.is_interpreted():
    interpreter.repair()

from kda_optimized.api import chunk_kda, fused_recurrent_kda  # noqa: E402 - Triton's mode is decided first
from kda_optimized.convolution import short_convolution, short_convolution_step  # noqa: E402 - likewise
from kda_optimized.decoding import kda_decode_step  # noqa: E402 - likewise
from kda_optimized.gated_norm import gated_rms_norm  # noqa: E402 - likewise
from kda_optimized.latent_attention import latent_decode  # noqa: E402 - likewise

# Where the conformance suite looks for the step of a recurrence.
fused_recurrent_kda.step = kda_decode_step  # type: ignore[attr-defined]

__all__ = [
    "chunk_kda",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "kda_decode_step",
    "latent_decode",
    "short_convolution",
    "short_convolution_step",
]

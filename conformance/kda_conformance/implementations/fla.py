"""The Triton kernels of ``fla-core``, where it is installed and a CUDA device is there."""

from __future__ import annotations

from importlib.metadata import version

from fla.ops.kda import chunk_kda, fused_recurrent_kda

from kda_conformance.claims import narrow
from kda_conformance.implementation import FunctionImplementation

CLAIMS = {"devices": ["cuda"], "empty": False, "checks_arguments": False}


class FlaChunk(FunctionImplementation):
    """``fla.ops.kda.chunk_kda``; its float32 products run in tf32."""

    def __init__(self) -> None:
        super().__init__(chunk_kda, "fla-chunk", version("fla-core"))
        precision = {"float32": "tf32", "bfloat16": "bf16", "float16": "fp16"}
        self.claims = narrow(self.claims, {**CLAIMS, "precision": precision, "chunk_size": True}, self.name)


class FlaRecurrent(FunctionImplementation):
    """``fla.ops.kda.fused_recurrent_kda``; forward only."""

    def __init__(self) -> None:
        super().__init__(fused_recurrent_kda, "fla-recurrent", version("fla-core"))
        precision = {"float32": "fp32", "bfloat16": "fp32", "float16": "fp32"}
        self.claims = narrow(self.claims, {**CLAIMS, "precision": precision, "backward": False}, self.name)

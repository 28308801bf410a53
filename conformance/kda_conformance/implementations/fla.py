"""``fla-core`` on a CUDA device: its chunk kernels, whole and in each of their three gate modes, and its recurrent kernel."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from fla.ops.kda import chunk_kda, fused_recurrent_kda

from kda_conformance.claims import narrow
from kda_conformance.implementation import FunctionImplementation

if TYPE_CHECKING:
    from collections.abc import Callable

CLAIMS = {"devices": ["cuda"], "empty": False, "checks_arguments": False}


class FlaChunk(FunctionImplementation):
    """``fla.ops.kda.chunk_kda``; its float32 products run in tf32, those of intermediates of float16 inputs among them."""

    function: Callable[..., Any] = staticmethod(chunk_kda)
    label = "fla-chunk"
    precision: ClassVar = {"float32": "tf32", "bfloat16": "bf16", "float16": "fp16-tf32"}
    further: ClassVar[dict[str, Any]] = {"chunk_size": True}

    def __init__(self) -> None:
        super().__init__(type(self).function, self.label, version("fla-core"))
        self.claims = narrow(self.claims, {**CLAIMS, "precision": self.precision, **self.further}, self.name)


class FlaChunkLogDecay(FlaChunk):
    """``chunk_kda`` on log decays computed outside it, with and without the promise ``safe_gate``."""

    label = "fla-chunk-log-decay"
    further: ClassVar = {"chunk_size": True, "gate_in_kernel": False}


class FlaChunkSoftplus(FlaChunk):
    """``chunk_kda`` with the softplus gate in its kernels."""

    label = "fla-chunk-softplus"
    further: ClassVar = {"chunk_size": True, "only_in_kernel": ["gate"], "bounded_gate": False}


class FlaChunkBounded(FlaChunk):
    """``chunk_kda`` with the bounded gate in its kernels."""

    label = "fla-chunk-bounded"
    further: ClassVar = {"chunk_size": True, "only_in_kernel": ["gate"], "unbounded_decay": False}


class FlaRecurrent(FlaChunk):
    """``fla.ops.kda.fused_recurrent_kda``: float32 arithmetic, forward only."""

    function = staticmethod(fused_recurrent_kda)
    label = "fla-recurrent"
    precision: ClassVar = {"float32": "fp32", "bfloat16": "fp32", "float16": "fp32"}
    further: ClassVar = {"backward": False}

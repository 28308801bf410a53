"""The plain torch forms that ``fla-core`` tests its kernels against; they run on a CPU and compute in float32."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from fla.ops.kda.naive import naive_chunk_kda, naive_recurrent_kda

from kda_conformance.claims import narrow
from kda_conformance.implementation import FunctionImplementation

if TYPE_CHECKING:
    from torch import Tensor

CLAIMS = {
    "precision": {"float32": "fp32", "bfloat16": "fp32", "float16": "fp32"},
    "empty": False,
    "checks_arguments": False,
    "chunk_size": False,
}
LARGEST_CHUNK = 64


class FlaNaiveRecurrent(FunctionImplementation):
    """``fla.ops.kda.naive.naive_recurrent_kda``."""

    def __init__(self) -> None:
        super().__init__(naive_recurrent_kda, "fla-naive-recurrent", version("fla-core"))
        self.claims = narrow(self.claims, CLAIMS, self.name)


class FlaNaiveChunk(FunctionImplementation):
    """``fla.ops.kda.naive.naive_chunk_kda``, which takes whole chunks only: here the longest that divide the call."""

    def __init__(self) -> None:
        super().__init__(_whole_chunks, "fla-naive-chunk", version("fla-core"))
        self.claims = narrow(self.claims, CLAIMS, self.name)


def _whole_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    *,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    length = next(size for size in range(min(LARGEST_CHUNK, q.shape[1]), 0, -1) if q.shape[1] % size == 0)
    found: tuple[Tensor, Tensor | None] = naive_chunk_kda(
        q, k, v, g, beta, scale, initial_state, output_final_state, chunk_size=length
    )
    return found

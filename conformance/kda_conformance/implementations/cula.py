"""cuLA's fused forward for Hopper, where it is installed: bfloat16, K = V = 128, bounded decays, forward only.

Written against the interface that its repository publishes (``cula.kda.hopper_fused_fwd``); no wheel could be had, and it has not run here.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from cula.kda.hopper_fused_fwd import cula_kda_prefill

from kda_conformance.claims import narrow
from kda_conformance.implementation import FunctionImplementation

if TYPE_CHECKING:
    from torch import Tensor

UNCLAIMED = (
    "backward",
    "grouped_values",
    "state_v_first",
    "beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "unbounded_decay",
    "empty",
    "checks_arguments",
)
CLAIMS = dict.fromkeys(UNCLAIMED, False) | {
    "precision": {"bfloat16": "bf16"},
    "devices": ["cuda"],
    "head_widths": [128],
}


class CulaHopper(FunctionImplementation):
    """``cula_kda_prefill``; it wants beta in float32 and offsets in int32, to which both are widened or narrowed without loss."""

    def __init__(self) -> None:
        super().__init__(_prefill, "cula-hopper", version("cuda-linear-attention"))
        self.claims = narrow(self.claims, CLAIMS, self.name)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    **options: Any,  # noqa: ANN401 - the public keywords
) -> tuple[Tensor, Tensor | None]:
    if (offsets := options.get("cu_seqlens")) is not None:
        options["cu_seqlens"] = offsets.to(torch.int32)
    if options.get("use_gate_in_kernel"):
        options.setdefault("A_log", torch.zeros(q.shape[2], device=q.device))
    found: tuple[Tensor, Tensor | None] = cula_kda_prefill(q, k, v, g, beta.float(), **options)
    return found

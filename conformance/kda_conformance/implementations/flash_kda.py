"""FlashKDA, where it is installed: bfloat16 throughout, K = V = 128, everything in the kernel, forward only.

Written against the interface that its repository publishes (``flash_kda.fwd``); no index offers it, and it has not run here.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import flash_kda
import torch

from kda_conformance.claims import narrow
from kda_conformance.implementation import FunctionImplementation

if TYPE_CHECKING:
    from torch import Tensor

UNCLAIMED = (
    "backward",
    "grouped_values",
    "allow_neg_eigval",
    "unbounded_decay",
    "wide_gate",
    "empty",
    "checks_arguments",
)
CLAIMS = dict.fromkeys(UNCLAIMED, False) | {
    "precision": {"bfloat16": "bf16"},
    "devices": ["cuda"],
    "head_widths": [128],
    "only_in_kernel": ["gate", "l2norm", "beta_sigmoid"],
}


class FlashKda(FunctionImplementation):
    """``flash_kda.fwd``."""

    def __init__(self) -> None:
        super().__init__(_forward, "flash-kda", version("flash-kda"))
        self.claims = narrow(self.claims, CLAIMS, self.name)


def _forward(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401 - the public keywords
    q, k, v, g, beta = (tensor.contiguous() for tensor in tensors)
    heads, width, offsets = q.shape[2], q.shape[3], options.get("cu_seqlens")
    slope, bias, state = (options.get(name) for name in ("A_log", "dt_bias", "initial_state"))
    slope = torch.zeros(heads, device=q.device) if slope is None else slope
    bias = torch.zeros(heads, width, device=q.device) if bias is None else bias.reshape(heads, width)
    v_first, count = options.get("state_v_first", False), q.shape[0] if offsets is None else len(offsets) - 1
    state = state if state is None or v_first else state.transpose(-1, -2).contiguous()
    o, final = torch.empty_like(v), torch.empty(count, heads, v.shape[-1], width, device=q.device)
    scale = options.get("scale") or width**-0.5
    flash_kda.fwd(q, k, v, g, beta, scale, o, slope, bias, options["lower_bound"], state, final, offsets)
    return o, final if v_first else final.transpose(-1, -2)

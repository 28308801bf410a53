"""The KDA of ``mlx-lm`` in its array form, which runs on a CPU, composed of its functions as its ``kimi_linear.py`` does."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models import gated_delta

from kda_conformance.claims import narrow
from kda_conformance.implementation import FunctionImplementation
from kda_conformance.implementations.mlx_bridge import run

if TYPE_CHECKING:
    from torch import Tensor

UNCLAIMED = dict.fromkeys(("packed", "scale", "empty", "checks_arguments"), False)
CLAIMS = UNCLAIMED | {"precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}, "devices": ["cpu"]}


class MlxLm(FunctionImplementation):
    """``gated_delta_ops`` behind the package's gates and its normalisation, which rounds q and k, and ``K ** -0.5``, to the input dtype."""

    def __init__(self) -> None:
        super().__init__(_kda, "mlx-lm", version("mlx-lm"))
        self.claims = narrow(self.claims, CLAIMS, self.name)


def _kda(*given: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401 - the public keywords
    tensors = dict(zip(("q", "k", "v", "g", "beta"), given, strict=True))
    tensors |= {name: options[name] for name in ("initial_state", "A_log", "dt_bias") if options.get(name) is not None}
    o, state = run(lambda *arrays: _arrays(dict(zip(tensors, arrays, strict=True)), options), *tensors.values())
    return o, state if options.get("output_final_state") else None


def _arrays(given: dict[str, mx.array], options: dict[str, Any]) -> tuple[mx.array, mx.array]:
    q, k, g, beta = (given[name] for name in ("q", "k", "g", "beta"))
    width, heads, v_first = q.shape[-1], g.shape[2], options.get("state_v_first", False)
    if options.get("use_qk_l2norm_in_kernel"):
        q, k = gated_delta.normalize_qk(q, k, inv_scale=width**-0.5, eps=1e-6)
    else:
        q = q.astype(mx.float32) * width**-0.5
    slope = given.get("A_log", mx.zeros(heads)).reshape(heads, 1)
    bias = given.get("dt_bias", mx.zeros(heads * width)).reshape(heads, width)
    if not options.get("use_gate_in_kernel"):
        decay = mx.exp(g.astype(mx.float32))
    elif (bound := options.get("lower_bound")) is None:
        decay = gated_delta.compute_g(slope, g, bias)
    else:
        decay = gated_delta.compute_lower_bound_g(slope, g, bias, bound)
    if options.get("use_beta_sigmoid_in_kernel"):
        beta = mx.sigmoid(beta) * (2.0 if options.get("allow_neg_eigval") else 1.0)
    if (state := given.get("initial_state")) is not None and not v_first:
        state = state.swapaxes(-1, -2)
    o, state = gated_delta.gated_delta_ops(q, k, given["v"], decay, beta, state)
    return o.astype(given["v"].dtype), state if v_first else state.swapaxes(-1, -2)

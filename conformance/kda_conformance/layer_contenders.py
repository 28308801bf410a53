"""What is timed around the operator: modules that offer a part of the layer, each judged before its time counts.

A module offers a part by a function named and called as in :mod:`kda_optimized`; what it does not have it is not timed on.
"""

from __future__ import annotations

import importlib
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from kda_conformance.contenders import Judged
from kda_conformance.layer_workloads import (
    CONVOLUTION,
    CONVOLUTION_STEP,
    LATENT_SCALE,
    LATENTS,
    NORM,
    NORM_EPSILON,
    LayerWorkload,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

FUNCTIONS = {
    CONVOLUTION: "short_convolution",
    CONVOLUTION_STEP: "short_convolution_step",
    NORM: "gated_rms_norm",
    LATENTS: "latent_decode",
}
# By name: module, distribution whose version counts, whether it needs a GPU.
MODULES = {
    "kda-optimized": ("kda_optimized", "kda-suite", False),
    "fla": ("kda_conformance.implementations.fla_layer", "fla-core", True),
}
# Relative errors (Frobenius) of results and gradients: twice the unit of the inputs' dtype, and float32 arithmetic.
LIMITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-5}
JUDGED_SEED = 1


class LayerContender:
    """A module that offers parts of the layer.

    Parameters
    ----------
    name
        A key of ``MODULES``.
    device
        Device type.

    Raises
    ------
    ImportError
        If what it needs is not installed.
    """

    judged = True
    operator = "layer"

    def __init__(self, name: str, device: str) -> None:
        place, distribution, _ = MODULES[name]
        self.name, self.device = name, device
        self._module = importlib.import_module(place)
        try:
            self.version = version(distribution)
        except PackageNotFoundError:
            self.version = "unknown"

    def takes(self, workload: object) -> bool:
        """Only the parts that the module has a function for."""
        return isinstance(workload, LayerWorkload) and hasattr(self._module, FUNCTIONS[workload.part])

    def judge(self, workload: LayerWorkload) -> Judged:
        """Compare result and gradients of a small call with the reference in float64."""
        small = workload.judged_call
        inputs = small.inputs(JUDGED_SEED, self.device)
        cotangent = small.cotangents(JUDGED_SEED, self.device) if workload.backward else None
        names = small.differentiable if workload.backward else ()
        exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        leaves = [exact[name].requires_grad_() for name in names]
        expected: list[Tensor] = [small.expected(exact)]
        if cotangent is not None:
            expected += torch.autograd.grad(expected[0], leaves, cotangent.double())
        try:
            with torch.set_grad_enabled(workload.backward):
                found = self._results(small, inputs, cotangent)
        except Exception as error:  # noqa: BLE001 - whatever a side raises is its result
            return Judged(outcome="error", message=f"{type(error).__name__}: {error}")
        score = 0.0
        for name, mine, true in zip(("result", *names), found, expected, strict=True):
            distance = ((mine.double() - true).norm() / true.norm()).detach()
            ratio = float(distance) / LIMITS[workload.dtype]
            if not ratio <= 1:
                message = (
                    f"{name} must be within {LIMITS[workload.dtype]:.2g} of the reference, got {float(distance):.3g}"
                )
                return Judged(outcome="red", message=message, score=ratio)
            score = max(score, ratio)
        return Judged(outcome="measured", score=score)

    def prepare_calls(
        self, workload: LayerWorkload, inputs: list[dict[str, Tensor]], cotangents: list[Tensor | None]
    ) -> list[Callable[[], object]]:
        """Return the calls that are timed."""
        pairs = zip(inputs, cotangents, strict=True)
        return [partial(self._results, workload, arguments, cotangent) for arguments, cotangent in pairs]

    def _results(
        self, workload: LayerWorkload, inputs: dict[str, Tensor], cotangent: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the result, and the gradients where there is a cotangent."""
        leaves = [inputs[name].requires_grad_() for name in workload.differentiable] if cotangent is not None else []
        options: dict[str, Any] = (
            {"latent_width": workload.width, "scale": LATENT_SCALE} if workload.part == LATENTS else {}
        )
        if workload.part == NORM:
            options["eps"] = NORM_EPSILON
        result = getattr(self._module, FUNCTIONS[workload.part])(**inputs, **options)
        result = result[0] if isinstance(result, tuple) else result
        return (result, *torch.autograd.grad(result, leaves, cotangent)) if leaves else (result,)


def installed_layers(device: str) -> list[LayerContender]:
    """Return the modules that can be timed on a device type here."""
    found = []
    for name, (_, _, needs_gpu) in MODULES.items():
        if device == "cpu" and needs_gpu:
            continue
        try:
            found.append(LayerContender(name, device))
        except ImportError:
            continue
    return found

"""Judge an implementation of the operator by the published vectors, as their files say, with no other source of truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kda_reference import KdaInputs

import kda_conformance
from kda_conformance.budget import TensorBudget
from kda_conformance.cases import Case, move
from kda_conformance.claims import DTYPES, UsageError
from kda_conformance.judge import Z_LIMIT, Judgement, judge
from kda_conformance.members import GRADIENT_OF
from kda_conformance.vectors.files import differing_files, read_group, read_index
from kda_conformance.vectors.vector import arguments_of, in_arithmetic

if TYPE_CHECKING:
    from torch import Tensor

    from kda_conformance.implementation import Implementation
    from kda_conformance.vectors.vector import Vector

PUBLISHED = Path(kda_conformance.__file__).parents[1] / "vectors"
COTANGENTS = ("do", "dfinal_state")


@dataclass
class Standing:
    """What became of the vectors: numbers of calls, and one line for each failure."""

    passed: int = 0
    unclaimed: int = 0
    failures: list[str] = field(default_factory=list)


def check(implementation: Implementation, folder: Path, device: str) -> Standing:
    """Run every vector of the operator in every input format that is claimed.

    Parameters
    ----------
    implementation
        What is judged.
    folder
        The set: published vectors, or ones built elsewhere.
    device
        Where it runs, ``cpu`` or ``cuda``.

    Raises
    ------
    UsageError
        If the set is missing, or a file of it is not what its checksum says.
    """
    listed = read_index(folder)
    if wrong := differing_files(folder):
        message = (
            f"vectors in {folder} must be those of SHA256SUMS, got other contents of {wrong}; build or clone them again"
        )
        raise UsageError(message)
    standing = Standing()
    for group in listed["groups"]:
        if group["kind"] == "kda":
            for vector in read_group(folder, group["name"]):
                for dtype, arithmetic in implementation.claims.precision.items():
                    _check_one(implementation, vector, dtype, arithmetic, device, standing)
    return standing


def call_of(vector: Vector, dtype: torch.dtype) -> KdaInputs | None:
    """Return a vector as a call with q, k and v of a dtype, or ``None`` where it cannot hold them."""
    tensors = {name: x for name, x in vector.inputs.items() if name not in COTANGENTS}
    arguments: dict[str, Any] = tensors | arguments_of(vector.options)
    return in_arithmetic(KdaInputs(**arguments), dtype)


def _check_one(
    implementation: Implementation, vector: Vector, dtype: str, arithmetic: str, device: str, standing: Standing
) -> None:
    inputs = call_of(vector, DTYPES[dtype])
    claimed = Case.parse(vector.recipe).unclaimed(implementation.claims) is None
    backward = "dq" in vector.value
    if inputs is None or arithmetic not in vector.permitted or not claimed:
        standing.unclaimed += 1
        return
    backward = backward and implementation.claims.backward
    try:
        found = _evaluate(implementation, vector, move(inputs, device), backward=backward)
    except Exception as error:  # noqa: BLE001 - whatever the implementation raises is its failure
        standing.failures.append(f"{vector.id} {dtype}: {type(error).__name__}: {error}")
        return
    judged = [_judge(vector, arithmetic, name, tensor) for name, tensor in found.items()]
    wrong = [judgement for judgement in judged if not judgement.score <= 1]
    if not wrong:
        standing.passed += 1
        return
    worst = max(wrong, key=lambda judgement: judgement.score)
    index = ", ".join(f"{axis}={i}" for axis, i in worst.index.items())
    standing.failures.append(
        f"{vector.id} {dtype}: {worst.tensor} {worst.score:.3g} times its limit at {index}, got {worst.got!r}, expected "
        f"{worst.expected!r} within {worst.bound:.3g} ({vector.comment}; {', '.join(vector.flags)})"
    )


def _evaluate(
    implementation: Implementation, vector: Vector, inputs: KdaInputs, *, backward: bool
) -> dict[str, Tensor]:
    if not backward:
        result = implementation.forward(inputs)
        found = {"o": result.o, "final_state": result.final_state}
    else:
        do, dfinal_state = (vector.inputs.get(name) for name in COTANGENTS)
        wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
        do = None if do is None else do.to(inputs.v.device, inputs.v.dtype)
        dfinal_state = None if dfinal_state is None else dfinal_state.to(inputs.v.device, wide)
        result, gradients = implementation.vjp(inputs, do, dfinal_state)
        found = {"o": result.o, "final_state": result.final_state}
        found |= {GRADIENT_OF[name]: getattr(gradients, name) for name in inputs.tensors()}
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape != vector.value[name].shape:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            message = f"{name} must have shape {tuple(vector.value[name].shape)}, got {got}"
            raise TypeError(message)
    return {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}


def _judge(vector: Vector, arithmetic: str, name: str, tensor: Tensor) -> Judgement:
    variance = (vector.permitted[arithmetic][name] / Z_LIMIT).square().clamp(min=torch.finfo(torch.float64).tiny)
    budget = TensorBudget(
        value=vector.value[name], variance=variance, gain_rms=vector.gain[arithmetic][name], strict_variance=variance
    )
    return judge(name, tensor, budget)

"""A vector: one call with its certified results and what each arithmetic may err; and how a case becomes one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from kda_reference import certified_kda, certified_kda_vjp

from kda_conformance import service
from kda_conformance.arithmetic import CLASSES
from kda_conformance.judge import Z_LIMIT
from kda_conformance.vectors.catalogue import cases_of
from kda_conformance.vectors.flags import flags_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kda_reference import KdaInputs
    from torch import Tensor

    from kda_conformance.cases import Case

CLASS_NAMES = ("bf16", "fp16", "tf32", "fp32", "fp64")
OPERANDS = ("q", "k", "v")
WITH_GRADIENTS = ("gradients", "grouped", "varlen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """One published call.

    Attributes
    ----------
    id, comment, flags
        Its name, what it is, and why it exists.
    inputs
        Tensors by name, each in the dtype it is published in; ``do`` and ``dfinal_state`` are cotangents.
    options
        What is no tensor, as plain JSON values.
    value, bound
        Certified float64 results by name, and the largest error they may have.
    permitted
        By arithmetic and result: the largest error of a correct computation, before the result is rounded to its format.
    gain
        By arithmetic and result: the root mean square of the relative gain error of correct computations.
    recipe
        The text of the case that the call was drawn from; empty for what is no call of the operator.
    """

    id: str
    comment: str
    flags: list[str]
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    value: dict[str, Tensor]
    bound: dict[str, Tensor]
    permitted: dict[str, dict[str, Tensor]]
    gain: dict[str, dict[str, float]] = field(default_factory=dict)
    recipe: str = ""


def vectors_of(group: str) -> Iterator[Vector]:
    """Make the vectors of a group of calls of the operator."""
    number = 0
    for case in cases_of(group):
        calls = _steps(case) if group == "decode" else [(case, narrowed(case.inputs(torch.bfloat16)), "")]
        for described, inputs, comment in calls:
            yield _vector(f"{group}-{number:03d}", described, inputs, comment, backward=group in WITH_GRADIENTS)
            number += 1


def narrowed(inputs: KdaInputs) -> KdaInputs:
    """Return the call with q, k and v that bfloat16, float16 and every wider format hold exactly, where float16 has the range."""
    return inputs.replace(**{name: narrow(getattr(inputs, name)) for name in OPERANDS})


def narrow(x: Tensor) -> Tensor:
    """Round to bfloat16, and to float16 where it has the range: what is left are numbers that both formats hold."""
    half = x.bfloat16().half()
    return (
        half.bfloat16()
        if bool(half.isfinite().all()) and bool((half != 0).eq(x.bfloat16() != 0).all())
        else x.bfloat16()
    )


def in_arithmetic(inputs: KdaInputs, dtype: torch.dtype) -> KdaInputs | None:
    """Return the same numbers as a call with inputs of a dtype, or ``None`` where it does not hold them."""
    changes = {name: getattr(inputs, name).to(dtype) for name in OPERANDS}
    if any(not torch.equal(x.double(), getattr(inputs, name).double()) for name, x in changes.items()):
        return None
    if dtype == torch.float64:
        changes |= {name: x.double() for name, x in inputs.tensors().items()}
    return inputs.replace(**changes)


def _steps(case: Case) -> Iterator[tuple[Case, KdaInputs, str]]:
    """Yield a call for each token; each begins with the float32 rounding of the state that the one before it ends with."""
    inputs = narrowed(case.inputs(torch.bfloat16))
    for t in range(case.num_tokens):
        cut = {name: getattr(inputs, name)[:, t : t + 1] for name in ("q", "k", "v", "g", "beta")}
        step = inputs.replace(**cut)
        yield case.replace(T=(1,)), step, f", step {t + 1} of {case.num_tokens}"
        inputs = inputs.replace(initial_state=certified_kda(step).value["final_state"].float())


def _vector(name: str, case: Case, inputs: KdaInputs, comment: str, *, backward: bool) -> Vector:
    do, dfinal_state = case.cotangents(inputs) if backward else (None, None)
    do = None if do is None else narrow(do)
    certified = certified_kda_vjp(inputs, do, dfinal_state) if backward else certified_kda(inputs)
    activated = inputs.use_gate_in_kernel or inputs.use_beta_sigmoid_in_kernel
    permitted, gain = {}, {}
    for arithmetic in CLASS_NAMES:
        # The fp64 budget is the fp32 one scaled, which gradients through saturated activations do not follow.
        if arithmetic == "fp64" and backward and activated:
            continue
        dtype = CLASSES[arithmetic].input_dtype
        call, cotangent = in_arithmetic(inputs, dtype), None if do is None else do.to(dtype)
        if call is None or (
            do is not None and cotangent is not None and not torch.equal(cotangent.double(), do.double())
        ):
            continue
        state = dfinal_state if dfinal_state is None or dtype != torch.float64 else dfinal_state.double()
        budget = service.budget_of(call, cotangent, state, CLASSES[arithmetic])
        permitted[arithmetic] = {tensor: Z_LIMIT * entry.variance.sqrt() for tensor, entry in budget.items()}
        gain[arithmetic] = {tensor: entry.gain_rms for tensor, entry in budget.items()}
    cotangents = {"do": do, "dfinal_state": dfinal_state}
    flags = flags_of(case)
    if backward and (do is None or dfinal_state is None):
        flags.append("StateGradientOnly" if do is None else "OutputGradientOnly")
    return Vector(
        id=name,
        comment=f"{'forward and gradients' if backward else 'forward'} of {case}{comment}",
        flags=["KnownAnswer"] if name == "forward-000" else flags,
        inputs=inputs.tensors() | {key: x for key, x in cotangents.items() if x is not None},
        options=options_of(inputs),
        value=certified.value,
        bound=certified.bound,
        permitted=permitted,
        gain=gain,
        recipe=str(case),
    )


def options_of(inputs: KdaInputs) -> dict[str, Any]:
    """Return the arguments that are no tensors of numbers, as plain JSON values."""
    return {
        "scale": inputs.effective_scale,
        "normalise_qk": inputs.use_qk_l2norm_in_kernel,
        "gate": "log_decay"
        if not inputs.use_gate_in_kernel
        else "softplus"
        if inputs.lower_bound is None
        else "bounded",
        "lower_bound": inputs.lower_bound if inputs.use_gate_in_kernel else None,
        "beta": "strength"
        if not inputs.use_beta_sigmoid_in_kernel
        else "doubled_sigmoid"
        if inputs.allow_neg_eigval
        else "sigmoid",
        "state_v_first": inputs.state_v_first,
        "cu_seqlens": None if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist(),
    }


def arguments_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as arguments of the operator: the inverse of :func:`options_of`."""
    offsets = options["cu_seqlens"]
    return {
        "scale": options["scale"],
        "use_qk_l2norm_in_kernel": options["normalise_qk"],
        "use_gate_in_kernel": options["gate"] != "log_decay",
        "safe_gate": options["gate"] == "bounded",
        "lower_bound": options["lower_bound"],
        "use_beta_sigmoid_in_kernel": options["beta"] != "strength",
        "allow_neg_eigval": options["beta"] == "doubled_sigmoid",
        "state_v_first": options["state_v_first"],
        "cu_seqlens": None if offsets is None else torch.tensor(offsets),
    }

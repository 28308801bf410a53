"""The equations once more, in multiple precision, as directly as they can be written: the judge of the judge.

Nothing is shared with the float64 code but the contract: plain loops over sequences, heads and tokens on ``mpmath``
numbers. Slow; for a few dozen tokens. ``float(x)`` of a result is its correctly rounded double.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mpmath  # type: ignore[import-untyped]
import numpy as np

from kda_reference.contract import check_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from kda_reference.contract import KdaInputs

    Exact = NDArray[np.object_]

DIGITS = 60
L2_EPSILON = "1e-6"

exp = np.frompyfunc(mpmath.exp, 1, 1)
log1p = np.frompyfunc(mpmath.log1p, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleResult:
    """What one call returns, or its derivative, as object arrays of ``mpmath.mpf`` in the layout of the call.

    Attributes
    ----------
    o
        Outputs ``[B, T, G, V]``.
    final_state
        State after the last token of each sequence, always.
    """

    o: Exact
    final_state: Exact


def oracle_kda(inputs: KdaInputs, *, digits: int = DIGITS) -> OracleResult:
    """Evaluate a call in multiple precision on the very numbers it was given.

    Parameters
    ----------
    inputs
        The arguments of the call.
    digits
        Decimal digits of all arithmetic.

    Raises
    ------
    KdaError
        If the arguments contradict the contract.

    References
    ----------
    [KL] Kimi Linear technical report, Eqs. (1), (10).
    """
    check_inputs(inputs)
    with mpmath.workdps(digits):
        return _evaluate(inputs, _exact_tensors(inputs))


def oracle_jvp(inputs: KdaInputs, direction: Mapping[str, Exact], *, digits: int = DIGITS) -> OracleResult:
    """Return the derivative of the outputs along a direction of the inputs, by a central difference.

    Parameters
    ----------
    inputs
        The arguments of the call.
    direction
        How far each tensor argument moves, by name; the others stay.
    digits
        Decimal digits of all arithmetic. The step is ``10 ** (-digits / 3)``, so two thirds of the digits are right.
    """
    check_inputs(inputs)
    with mpmath.workdps(digits):
        step = mpmath.mpf(10) ** (-(digits // 3))
        values = _exact_tensors(inputs)
        above, below = (
            _evaluate(inputs, values | {name: values[name] + sign * step * move for name, move in direction.items()})
            for sign in (1, -1)
        )
        return OracleResult(
            o=(above.o - below.o) / (2 * step), final_state=(above.final_state - below.final_state) / (2 * step)
        )


def oracle_gradient(
    inputs: KdaInputs,
    do: Tensor,
    dfinal_state: Tensor,
    name: str,
    index: tuple[int, ...],
    *,
    digits: int = DIGITS,
) -> Any:  # noqa: ANN401 - mpmath has no types
    """Return one element of a gradient of ``<do, o> + <dfinal_state, final_state>`` as ``mpmath.mpf``.

    Parameters
    ----------
    inputs
        The arguments of the call.
    do, dfinal_state
        Cotangents of the outputs, in their layouts.
    name, index
        Which input, and which element of it.
    digits
        As for :func:`oracle_jvp`.
    """
    unit = np.full(tuple(inputs.tensors()[name].shape), mpmath.mpf(0), dtype=object)
    unit[index] = mpmath.mpf(1)
    derivative = oracle_jvp(inputs, {name: unit}, digits=digits)
    with mpmath.workdps(digits):
        return (exact(do) * derivative.o).sum() + (exact(dfinal_state) * derivative.final_state).sum()


def exact(tensor: Tensor) -> Exact:
    """Return a tensor's very values as ``mpmath.mpf``."""
    return np.frompyfunc(mpmath.mpf, 1, 1)(tensor.detach().double().cpu().numpy().astype(object))  # type: ignore[no-any-return]


def _exact_tensors(inputs: KdaInputs) -> dict[str, Exact]:
    return {name: exact(tensor) for name, tensor in inputs.tensors().items()}


def _evaluate(inputs: KdaInputs, x: dict[str, Exact]) -> OracleResult:
    q, k, g, beta = _activated(inputs, x)
    num_heads, k_width = q.shape[2:]
    num_value_heads, v_width = x["v"].shape[2:]
    scale = mpmath.sqrt(mpmath.mpf(k_width)) ** -1 if inputs.scale is None else mpmath.mpf(inputs.scale)
    o = np.full(x["v"].shape, mpmath.mpf(0), dtype=object)
    shape = (inputs.num_sequences, num_value_heads, k_width, v_width)
    states: Exact = np.full(shape, mpmath.mpf(0), dtype=object)
    if "initial_state" in x:
        states = x["initial_state"].swapaxes(2, 3).copy() if inputs.state_v_first else x["initial_state"].copy()
    for n, row, first, last in _sequences(inputs):
        for j in range(num_value_heads):
            i, state = j // (num_value_heads // num_heads), states[n, j]
            for t in range(first, last):
                decayed = exp(g[row, t, j])[:, None] * state
                error = x["v"][row, t, j] - decayed.T @ k[row, t, i]
                state = decayed + beta[row, t, j] * np.outer(k[row, t, i], error)
                o[row, t, j] = scale * (state.T @ q[row, t, i])
            states[n, j] = state
    return OracleResult(o=o, final_state=states.swapaxes(2, 3) if inputs.state_v_first else states)


def _sequences(inputs: KdaInputs) -> list[tuple[int, int, int, int]]:
    """Return (state, batch row, first token, end) of every sequence."""
    batch, num_tokens = inputs.q.shape[:2]
    if inputs.cu_seqlens is None:
        return [(n, n, 0, num_tokens) for n in range(batch)]
    offsets = inputs.cu_seqlens.tolist()
    return [(n, 0, offsets[n], offsets[n + 1]) for n in range(len(offsets) - 1)]


def _activated(inputs: KdaInputs, x: dict[str, Exact]) -> tuple[Exact, Exact, Exact, Exact]:
    q, k, g, beta = x["q"], x["k"], x["g"], x["beta"]
    if inputs.use_qk_l2norm_in_kernel:
        q, k = _normalised(q), _normalised(k)
    if inputs.use_gate_in_kernel:
        slope = exp(x["A_log"])[:, None] if "A_log" in x else mpmath.mpf(1)
        shifted = g + x["dt_bias"].reshape(g.shape[2:]) if "dt_bias" in x else g
        g = (
            -slope * log1p(exp(shifted))
            if inputs.lower_bound is None
            else mpmath.mpf(inputs.lower_bound) / (1 + exp(-slope * shifted))
        )
    if inputs.use_beta_sigmoid_in_kernel:
        beta = (2 if inputs.allow_neg_eigval else 1) / (1 + exp(-beta))
    return q, k, g, beta


def _normalised(x: Exact) -> Exact:
    root = np.frompyfunc(mpmath.sqrt, 1, 1)
    return x / root((x * x).sum(-1, keepdims=True) + mpmath.mpf(L2_EPSILON))  # type: ignore[no-any-return]

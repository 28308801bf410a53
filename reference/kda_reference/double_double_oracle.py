"""The equations once more at 106 bits, forward and backward: the judge of the float64 code at full size.

Like :mod:`kda_reference.oracle`, it shares nothing with the float64 code but the contract, and is as direct: loops over sequences
and tokens, on arrays of all value heads. Its own tests compare it with 60 digits.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from kda_reference.contract import check_inputs
from kda_reference.double_double import (
    DoubleDouble,
    exp,
    inverse_root,
    sigmoid,
    softplus,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kda_reference.contract import KdaInputs

L2_EPSILON = DoubleDouble.nearest(Fraction(1, 10**6))


def double_double_kda(
    inputs: KdaInputs, do: Tensor | None = None, dfinal_state: Tensor | None = None
) -> dict[str, DoubleDouble]:
    """Evaluate a call, and with cotangents its gradients, on the very numbers it was given.

    Parameters
    ----------
    inputs
        The arguments of the call.
    do, dfinal_state
        Cotangents of the outputs, in their layouts: both or neither; neither means outputs only.

    Returns
    -------
    dict[str, DoubleDouble]
        ``o`` and ``final_state``, and the gradients by the names and in the layouts of :class:`kda_reference.Certified`.

    Raises
    ------
    KdaError
        If the arguments contradict the contract.

    Notes
    -----
    About 5 ms a token at K = V = 128; memory 16 T K V bytes per head with gradients.

    References
    ----------
    [KL] Kimi Linear technical report, Eqs. (1), (10).
    """
    check_inputs(inputs)
    run = _Run(inputs)
    cotangents = None if do is None or dfinal_state is None else (_doubles(do), _matrix(inputs, dfinal_state))
    found = run.empty_results(backward=cotangents is not None)
    for n, row, first, last in _sequences(inputs):
        states = [run.initial[n]]
        for t in range(first, last):
            states.append(run.step(row, t, states[-1]))
            _put(found["o"], (row, t), run.read(row, t, states[-1]))
            if cotangents is None:
                states = states[-1:]
        _put(found["final_state"], n, states[-1])
        if cotangents is not None:
            do_TGV, lam = cotangents[0][row], DoubleDouble.of(cotangents[1][n])
            for t in range(last - 1, first - 1, -1):
                around = (states[t - first], states[t - first + 1])
                lam = run.step_back(found, row, t, around, DoubleDouble.of(do_TGV[t]), lam)
            _put(found["dinitial_state"], n, lam)
    if cotangents is not None:
        run.pull_back(found)
    return run.in_call_layout(found)


class _Run:
    """The operands of one call, one q and k per value head ``[B, T, G, *]``."""

    def __init__(self, inputs: KdaInputs) -> None:
        self.inputs = inputs
        self.group = inputs.v.shape[2] // inputs.q.shape[2]
        self.raw_q, self.raw_k = (DoubleDouble.of(_doubles(x).repeat(self.group, 2)) for x in (inputs.q, inputs.k))
        self.q, self.k, self.v = self.raw_q, self.raw_k, DoubleDouble.of(_doubles(inputs.v))
        self.g, self.beta = DoubleDouble.of(_doubles(inputs.g)), DoubleDouble.of(_doubles(inputs.beta))
        if inputs.use_qk_l2norm_in_kernel:
            self.q, self.k = (x * _inverse_norm(x) for x in (self.raw_q, self.raw_k))
        if inputs.use_gate_in_kernel:
            bias = 0.0 if inputs.dt_bias is None else _doubles(inputs.dt_bias).reshape(inputs.g.shape[2:])
            slope = 0.0 if inputs.A_log is None else _doubles(inputs.A_log)[:, None]
            self.shifted, self.slope = self.g + bias, exp(DoubleDouble.of(slope))
            if inputs.lower_bound is None:
                self.g = -(self.slope * softplus(self.shifted))
            else:
                self.g = sigmoid(self.slope * self.shifted) * inputs.lower_bound
        if inputs.use_beta_sigmoid_in_kernel:
            self.logit, self.ceiling = self.beta, 2.0 if inputs.allow_neg_eigval else 1.0
            self.beta = sigmoid(self.logit) * self.ceiling
        self.decay = exp(self.g)
        width = DoubleDouble.of(float(inputs.k.shape[-1]))
        self.scale = inverse_root(width) if inputs.scale is None else DoubleDouble.of(inputs.scale)
        shape = inputs.state_shape
        self.state_shape = (shape[0], shape[1], shape[3], shape[2]) if inputs.state_v_first else shape
        given = inputs.initial_state
        self.initial = DoubleDouble.of(np.zeros(self.state_shape) if given is None else _matrix(inputs, given))

    def empty_results(self, *, backward: bool) -> dict[str, DoubleDouble]:
        shapes = {"o": self.v.hi.shape, "final_state": self.state_shape}
        if backward:
            shapes |= dict.fromkeys(("dq", "dk", "dg"), self.q.hi.shape)
            shapes |= {"dv": self.v.hi.shape, "dbeta": self.beta.hi.shape, "dinitial_state": self.state_shape}
        return {name: DoubleDouble.of(np.zeros(shape)) for name, shape in shapes.items()}

    def in_call_layout(self, found: dict[str, DoubleDouble]) -> dict[str, DoubleDouble]:
        if self.inputs.state_v_first:
            for name in found.keys() & {"final_state", "dinitial_state"}:
                found[name] = DoubleDouble(found[name].hi.swapaxes(2, 3), found[name].lo.swapaxes(2, 3))
        if self.inputs.initial_state is None:
            found.pop("dinitial_state", None)
        return found

    def step(self, row: int, t: int, state: DoubleDouble) -> DoubleDouble:
        decayed = self.decay[row, t, :, :, None] * state
        error = self.v[row, t] - (self.k[row, t, :, :, None] * decayed).sum(1)
        return decayed + self.k[row, t, :, :, None] * (self.beta[row, t, :, None] * error)[:, None, :]

    def read(self, row: int, t: int, state: DoubleDouble) -> DoubleDouble:
        return self.scale * (self.q[row, t, :, :, None] * state).sum(1)

    def step_back(
        self,
        found: dict[str, DoubleDouble],
        row: int,
        t: int,
        states: tuple[DoubleDouble, DoubleDouble],
        do: DoubleDouble,
        lam: DoubleDouble,
    ) -> DoubleDouble:
        """Store the gradients of one token, given the states around it; return the cotangent of the state before."""
        k, beta = self.k[row, t, :, :, None], self.beta[row, t, :, None]
        decayed = self.decay[row, t, :, :, None] * states[0]
        error = self.v[row, t] - (k * decayed).sum(1)
        do = self.scale * do
        _put(found["dq"], (row, t), (states[1] * do[:, None, :]).sum(2))
        lam = lam + self.q[row, t, :, :, None] * do[:, None, :]
        along_key = (k * lam).sum(1)
        _put(found["dv"], (row, t), beta * along_key)
        _put(found["dbeta"], (row, t), (along_key * error).sum(1))
        _put(found["dk"], (row, t), beta * (lam * error[:, None, :] - decayed * along_key[:, None, :]).sum(2))
        lam = lam - k * (beta * along_key)[:, None, :]
        _put(found["dg"], (row, t), (lam * decayed).sum(2))
        return self.decay[row, t, :, :, None] * lam

    def pull_back(self, found: dict[str, DoubleDouble]) -> None:
        """Turn gradients of the operands into those of the arguments."""
        inputs = self.inputs
        if inputs.use_qk_l2norm_in_kernel:
            for name, raw, unit in (("dq", self.raw_q, self.q), ("dk", self.raw_k, self.k)):
                along = (unit * found[name]).sum(3)[..., None]
                found[name] = _inverse_norm(raw) * (found[name] - unit * along)
        for name in ("dq", "dk"):
            grouped = (*inputs.q.shape[:3], self.group, inputs.q.shape[3])
            found[name] = DoubleDouble(found[name].hi.reshape(grouped), found[name].lo.reshape(grouped)).sum(3)
        if inputs.use_gate_in_kernel:
            if inputs.lower_bound is None:
                by_shifted, by_a = -(self.slope * sigmoid(self.shifted)), self.g
            else:
                z = self.slope * self.shifted
                by_z = sigmoid(z) * sigmoid(-z) * inputs.lower_bound
                by_shifted, by_a = self.slope * by_z, by_z * z
            by_a_log = found["dg"] * by_a
            found["dg"] = found["dg"] * by_shifted
            if inputs.A_log is not None:
                found["dA_log"] = by_a_log.sum(3).sum(1).sum(0)
            if inputs.dt_bias is not None:
                total = found["dg"].sum(1).sum(0)
                found["ddt_bias"] = DoubleDouble(total.hi.reshape(-1), total.lo.reshape(-1))
        if inputs.use_beta_sigmoid_in_kernel:
            found["dbeta"] = found["dbeta"] * sigmoid(self.logit) * sigmoid(-self.logit) * self.ceiling


def distance(value: Tensor, truth: DoubleDouble) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return how far float64 values are from 106-bit ones, per element."""
    return np.abs((_doubles(value) - truth.hi) - truth.lo)


def _sequences(inputs: KdaInputs) -> list[tuple[int, int, int, int]]:
    """Return (state, batch row, first token, end) of every sequence."""
    batch, num_tokens = inputs.q.shape[:2]
    if inputs.cu_seqlens is None:
        return [(n, n, 0, num_tokens) for n in range(batch)]
    offsets = inputs.cu_seqlens.tolist()
    return [(n, 0, offsets[n], offsets[n + 1]) for n in range(len(offsets) - 1)]


def _inverse_norm(x: DoubleDouble) -> DoubleDouble:
    return inverse_root((x * x).sum(3) + L2_EPSILON)[..., None]


def _matrix(inputs: KdaInputs, state: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return _doubles(state).swapaxes(2, 3) if inputs.state_v_first else _doubles(state)


def _doubles(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return x.detach().double().cpu().numpy()


def _put(target: DoubleDouble, index: int | tuple[int, int], part: DoubleDouble) -> None:
    target.hi[index], target.lo[index] = part.hi, part.lo

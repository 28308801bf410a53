"""What an implementation promises. Fewer claims skip laws; a false claim fails them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from kda_conformance.arithmetic import CLASSES, DEFAULT_CLASS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ACTIVATIONS = ("gate", "l2norm", "beta_sigmoid")


class UsageError(Exception):
    """The command line, a claims file or a deviations file is wrong; nothing was judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """The part of the contract an implementation claims.

    Attributes
    ----------
    precision
        Arithmetic class by input dtype name, ``{"bfloat16": "bf16"}``; its keys are the dtypes the suite runs.
    devices
        Device types the implementation runs on.
    backward
        Gradients of every differentiable input.
    initial_state, packed, grouped_values, scale, state_v_first
        Support of the arguments of these names (``packed``: ``cu_seqlens``).
    l2norm_in_kernel, gate_in_kernel, bounded_gate, beta_sigmoid_in_kernel, allow_neg_eigval
        Support of the in-kernel activations, of the promise ``safe_gate``, and of doubled write strengths.
    unbounded_decay
        Support of decays without a lower bound: the softplus gate, and log decays without the promise ``safe_gate``.
    wide_gate
        Support of g and beta in float32 beside q, k and v of fewer bits; where it is not claimed, they have the dtype of q.
    only_in_kernel
        Activations that the kernel always applies, of ``gate``, ``l2norm`` and ``beta_sigmoid``: calls that bring them applied already
        are not claimed.
    empty
        Support of T = 0 and of empty packed sequences.
    deterministic
        The same call gives the same bits.
    prefix_causal
        Outputs of a prefix do not change by one bit when later tokens change.
    checks_arguments
        Arguments that contradict the contract are refused with an exception. ``None`` leaves it open: who refuses any call that
        arithmetic does not stumble over must refuse them all, and of who refuses none it is recorded only.
    cumulative_gate_gradient
        The gradient of the gate is summed over the later tokens of its chunk, and carries their rounding even where it has decayed to
        less. Where this is not claimed, it and its reductions are judged without the allowance.
    chunk_size
        ``chunk_size`` may be 32, and changes nothing beyond rounding; claimed for a function that names the argument.
    decode
        A step through a pool of states, for the laws on decoding; see ``kda_conformance.decoding``.
    drafts, new_rows, snapshots
        That a step takes ``num_accepted_tokens``; ``has_initial_state``; ``snapshot_indices`` and ``source_indices``.
    head_widths
        The K and V it accepts; ``None`` means any.
    max_k_width
        Largest K it accepts; ``None`` means any.
    """

    precision: Mapping[str, str] = field(
        default_factory=lambda: {
            DTYPE_NAMES[d]: DEFAULT_CLASS[d] for d in (torch.float32, torch.bfloat16, torch.float16)
        }
    )
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    backward: bool = True
    initial_state: bool = True
    packed: bool = True
    grouped_values: bool = True
    scale: bool = True
    state_v_first: bool = True
    l2norm_in_kernel: bool = True
    gate_in_kernel: bool = True
    bounded_gate: bool = True
    beta_sigmoid_in_kernel: bool = True
    allow_neg_eigval: bool = True
    unbounded_decay: bool = True
    wide_gate: bool = True
    only_in_kernel: frozenset[str] = frozenset()
    empty: bool = True
    deterministic: bool = True
    prefix_causal: bool = True
    checks_arguments: bool | None = None
    cumulative_gate_gradient: bool = True
    chunk_size: bool = False
    decode: bool = False
    drafts: bool = False
    new_rows: bool = False
    snapshots: bool = False
    head_widths: frozenset[int] | None = None
    max_k_width: int | None = None

    def unclaimed_activation(self, *, gate: bool, bounded: bool, l2norm: bool, beta_sigmoid: bool) -> str | None:
        """Return what a call asks of the activations that is not claimed, or ``None``.

        Parameters
        ----------
        gate, l2norm, beta_sigmoid
            Whether the call leaves this activation to the kernel.
        bounded
            Whether its log decay has a lower bound, by the gate or by promise.
        """
        if not bounded and not self.unbounded_decay:
            return "unbounded_decay"
        in_kernel = {"gate": gate, "l2norm": l2norm, "beta_sigmoid": beta_sigmoid}
        left_out = sorted(name for name in self.only_in_kernel if not in_kernel[name])
        return f"{left_out[0]} applied by the caller" if left_out else None

    def describe(self) -> dict[str, Any]:
        """Return the claims as plain JSON values."""
        plain: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            plain[item.name] = (
                sorted(value) if isinstance(value, frozenset) else dict(value) if item.name == "precision" else value
            )
        return plain


FLAGS = tuple(item.name for item in fields(Claims) if str(item.type).startswith("bool"))


def narrow(claims: Claims, changes: Mapping[str, Any], source: str) -> Claims:
    """Return ``claims`` with the given fields replaced.

    Parameters
    ----------
    changes
        Field names and plain values, as a TOML file or the attributes of a callable give them. ``precision`` is either one class name,
        which also decides the only input dtype to run, or a table from input dtype to class.
    source
        Where the changes come from, for messages.

    Raises
    ------
    UsageError
        If a name is no claim, a class or dtype is unknown, or a value has the wrong type.
    """
    known = {item.name for item in fields(Claims)}
    plain = dict(changes)
    if not_claims := sorted(set(plain) - known):
        message = f"{source} must name claims, got {not_claims}; known claims are {sorted(known)}"
        raise UsageError(message)
    if "precision" in plain:
        plain["precision"] = _precision(plain["precision"], source)
    for name, value in plain.items():
        if name in FLAGS and not isinstance(value, bool):
            message = f"{source}: {name} must be true or false, got {value!r}; fix the claim"
            raise UsageError(message)
    for name in ("devices", "head_widths", "only_in_kernel"):
        if plain.get(name) is not None:
            plain[name] = frozenset(plain[name])
    if unknown := sorted(plain.get("only_in_kernel", frozenset()) - set(ACTIVATIONS)):
        message = f"{source}: only_in_kernel must name activations {ACTIVATIONS}, got {unknown}; fix the claim"
        raise UsageError(message)
    return replace(claims, **plain)


def read_claims(path: Path) -> dict[str, Any]:
    """Read a claims file: TOML whose keys are fields of :class:`Claims`.

    Raises
    ------
    UsageError
        If the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        message = f"claims file {path} must be readable TOML, got {error}; fix the file or the option"
        raise UsageError(message) from error


def _precision(value: object, source: str) -> dict[str, str]:
    if isinstance(value, str):
        if value not in CLASSES:
            message = f"{source}: precision must be one of {sorted(CLASSES)}, got {value!r}; name the arithmetic class"
            raise UsageError(message)
        return {DTYPE_NAMES[CLASSES[value].input_dtype]: value}
    if not isinstance(value, dict) or not value:
        message = (
            f"{source}: precision must be a class name or a table dtype = class, got {value!r}; see docs/adopting.md"
        )
        raise UsageError(message)
    for dtype, name in value.items():
        if dtype not in DTYPES or name not in CLASSES:
            message = f"{source}: precision must map {sorted(DTYPES)} to {sorted(CLASSES)}, got {dtype} = {name!r}; fix the entry"
            raise UsageError(message)
    return dict(value)

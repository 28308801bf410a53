"""Workloads: the calls that are timed, what they must at least move and compute, and the inputs they are timed on.

A workload is one shape of a training or prefill step with everything in the kernel: normalisation of q and k, the gate and the
sigmoid of beta, an initial state in and the final state out. Each carries labels, by which a run selects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from kda_reference import KdaInputs

from kda_conformance import regimes
from kda_conformance.cases import Case
from kda_conformance.claims import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

AnyLabelled = TypeVar("AnyLabelled", bound="Labelled")
USUAL_WIDTH, USUAL_CHUNK, USUAL_DTYPE = 128, 64, "bfloat16"
PACKED = (1300, 547, 2048, 963, 271, 3063)
PACKED_MIXES = (PACKED, (512,) * 16, (64,) * 128)
# Long enough that an implementation which cuts a sequence into parts cuts this one too.
LONGEST_JUDGED = 2100
LONGEST_JUDGED_PACKED = 130
MOST_JUDGED_SEQUENCES = 6
JUDGED_HEADS = 2
# Rows of a step from which calls are timed beside graphs: with fewer a call is the host's time, however slow the device.
FILLED = 64
# The report counts the forward only. Every product has two of its size in its reverse.
PASSES = {"forward": 1, "forward-backward": 3, "step": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One timed call, by description.

    Attributes
    ----------
    lengths
        Tokens T of every batch row, or the lengths of packed sequences.
    B, H, width, chunk_size
        Batch rows, heads (G = H), head width d (K = V) in channels, tokens per chunk C.
    dtype
        Of q, k, v, g and beta; a key of ``claims.DTYPES``. Parameters and states are float32, or float64 with it.
    gate
        ``softplus`` or ``bounded``.
    backward
        Whether the gradient of every input is computed as well, from cotangents of both outputs.
    step
        Whether one token of each batch row is decoded: by the step of an implementation that has one, its states in a pool that is
        written in place, and by a forward call of any other. Either reads and writes every state once.
    graph
        Whether replays of a CUDA graph are timed instead of calls.
    labels
        Names of the sets it belongs to.
    """

    lengths: tuple[int, ...]
    H: int
    B: int = 1
    width: int = USUAL_WIDTH
    chunk_size: int = USUAL_CHUNK
    dtype: str = USUAL_DTYPE
    gate: str = "softplus"
    backward: bool = False
    step: bool = False
    graph: bool = False
    labels: frozenset[str] = frozenset()

    @property
    def pass_name(self) -> str:
        """What is computed: a key of ``PASSES``."""
        return "step" if self.step else "forward-backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        """Everything but the labels, in one word; what is usual is left out."""
        lengths = f"{len(self.lengths)}x{self.lengths[0]}" if self.is_even else "+".join(map(str, self.lengths))
        words = [self.pass_name, self.gate, f"T{lengths}", f"H{self.H}"]
        words += [f"B{self.B}"] if self.B > 1 else []
        words += [f"C{self.chunk_size}"] if self.chunk_size != USUAL_CHUNK else []
        words += [f"d{self.width}"] if self.width != USUAL_WIDTH else []
        words += [self.dtype] if self.dtype != USUAL_DTYPE else []
        words += ["graph"] if self.graph else []
        return "-".join(words)

    @property
    def is_packed(self) -> bool:
        """Whether several sequences are packed into one row."""
        return len(self.lengths) > 1

    @property
    def is_even(self) -> bool:
        """Whether packed sequences are equally long."""
        return self.is_packed and len(set(self.lengths)) == 1

    @property
    def tokens(self) -> int:
        """Tokens of the call, over all rows."""
        return self.B * sum(self.lengths)

    @property
    def num_sequences(self) -> int:
        """N, the number of states."""
        return self.B if not self.is_packed else len(self.lengths)

    @property
    def input_bytes(self) -> int:
        """Bytes of all tensor arguments."""
        narrow, wide = DTYPES[self.dtype].itemsize, self._wide.itemsize
        per_token = self.H * (4 * self.width + 1) * narrow
        return self.tokens * per_token + self.H * (1 + self.width) * wide + self._state_bytes

    @property
    def output_bytes(self) -> int:
        """Bytes of ``o`` and the final state."""
        return self.tokens * self.H * self.width * DTYPES[self.dtype].itemsize + self._state_bytes

    @property
    def least_bytes(self) -> int:
        """Bytes that must cross the memory bus: every argument read once, every result written once.

        A backward pass reads the arguments and the cotangents, which are as large as the outputs, and writes the gradients, which are
        as large as the arguments.
        """
        forward = self.input_bytes + self.output_bytes
        return 2 * forward + self.input_bytes if self.backward else forward

    @property
    def flop(self) -> int:
        """Floating-point operations of the chunkwise form, ``6 T d^2 + 3 T C d + T C^2`` a head forward [KL eq. 13], C = 0 for a step."""
        d, C = self.width, 0 if self.step else self.chunk_size
        return PASSES[self.pass_name] * self.H * self.tokens * (6 * d * d + 3 * C * d + C * C)

    @property
    def gate_case(self) -> Case:
        """The small call with the same flags, on which an implementation is judged before it is timed."""
        longest = LONGEST_JUDGED_PACKED if self.is_packed else LONGEST_JUDGED
        lengths = tuple(min(length, longest) for length in self.lengths[:MOST_JUDGED_SEQUENCES])
        heads = min(self.H, JUDGED_HEADS)
        regime = "layer" if self.gate == "softplus" else "uniform"
        return Case(
            T=lengths, B=min(self.B, 2), H=heads, G=heads, K=self.width, V=self.width, gate=regime, gate_form=self.gate,
            gate_dtype="input", l2norm=True, sigmoid=True,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return the fields of a row that say what was called."""
        return {
            "gate": self.gate, "dtype": self.dtype, "chunk_size": self.chunk_size, "lengths": list(self.lengths),
            "shape": {
                "B": self.B, "T": sum(self.lengths), "H": self.H, "G": self.H, "K": self.width, "V": self.width, "N": self.num_sequences,
            },
        }  # fmt: skip

    def inputs(self, seed: int, device: str) -> KdaInputs:
        """Draw the arguments on the device, as a freshly initialised layer would pass them."""
        generator = torch.Generator(device).manual_seed(seed)
        rows = (self.B, sum(self.lengths), self.H)

        def normal(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        a_log, dt_bias = regimes.layer_parameters(regimes.Draw(seed), self.H, self.width)
        offsets = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        return KdaInputs(
            q=normal(*rows, self.width),
            k=normal(*rows, self.width),
            v=normal(*rows, self.width),
            g=normal(*rows, self.width),
            beta=normal(*rows),
            A_log=a_log.to(device, self._wide),
            dt_bias=dt_bias.to(device, self._wide),
            initial_state=normal(*self._state_shape, dtype=self._wide),
            cu_seqlens=torch.tensor(offsets, device=device) if self.is_packed else None,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=self.gate == "bounded",
            lower_bound=regimes.LOWER_BOUND if self.gate == "bounded" else None,
            chunk_size=self.chunk_size,
        )

    def cotangents(self, seed: int, device: str) -> tuple[Tensor, Tensor]:
        """Draw the cotangents of ``o`` and of the final state."""
        generator = torch.Generator(device).manual_seed(seed + 1_000_003)
        shape = (self.B, sum(self.lengths), self.H, self.width)
        do = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[self.dtype])
        return do, torch.randn(self._state_shape, generator=generator, device=device, dtype=self._wide)

    @property
    def _state_shape(self) -> tuple[int, int, int, int]:
        return self.num_sequences, self.H, self.width, self.width

    @property
    def _state_bytes(self) -> int:
        return self.num_sequences * self.H * self.width * self.width * self._wide.itemsize

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32


def _set(label: str, *workloads: Workload) -> list[Workload]:
    return [replace(workload, labels=workload.labels | {label}) for workload in workloads]


def _both(*workloads: Workload) -> list[Workload]:
    """Return each workload forward, and forward and backward."""
    return [replace(workload, backward=backward) for backward in (False, True) for workload in workloads]


def _gpu() -> list[Workload]:
    table = [
        Workload(lengths=lengths, H=heads, gate=gate)
        for lengths, heads in (((8192,), 96), (PACKED, 96), ((8192,), 64), ((8192,), 16), ((65536,), 16))
        for gate in ("softplus", "bounded")
    ]
    by_tokens = [Workload(lengths=(2**i,), H=16) for i in range(6, 17)]
    long_enough = [replace(w, gate=gate) for gate in ("softplus", "bounded") for w in by_tokens if w.tokens >= 2048]  # noqa: PLR2004 - [KL fig. 2]
    small = [Workload(lengths=(2**i,), H=heads) for heads in (16, 32) for i in range(6, 11)]
    steps = [Workload(lengths=(1,), H=32, B=rows, step=True, graph=True) for rows in (1, 8, 64, 256)]
    steps += [replace(step, graph=False) for step in steps if step.B >= FILLED]
    quick = [w for w in table if w.tokens > 8192 or w.H == 96] + [Workload(lengths=(1024,), H=16)]  # noqa: PLR2004
    return [
        *_set("table", *_both(*table)),
        *_set("quick", *quick, Workload(lengths=(1024,), H=16, graph=True)),
        *_set("tokens", *_both(*by_tokens)),
        *_set("operators", *long_enough),
        *_set("heads", *(Workload(lengths=(8192,), H=heads) for heads in (2, 4, 8, 16, 32, 64, 96))),
        *_set("batch", *_both(*(Workload(lengths=(2048,), H=16, B=rows) for rows in (1, 2, 4, 8, 16)))),
        *_set("chunk", *(Workload(lengths=(8192,), H=96, chunk_size=size) for size in (32, 64))),
        *_set("packed", *(Workload(lengths=mix, H=96) for mix in PACKED_MIXES)),
        *_set("decode", *steps),
        *_set("small", *small, *(replace(workload, graph=True) for workload in small)),
    ]


def _cpu() -> list[Workload]:
    exact = [Workload(lengths=(length,), H=2, width=16, dtype="float64") for length in (64, 256)]
    packed = Workload(lengths=(33, 64, 31), H=2, width=16, dtype="float64")
    step = Workload(lengths=(1,), H=2, B=3, width=16, dtype="float64", step=True)
    single = [Workload(lengths=(length,), H=2, width=32, dtype="float32") for length in (128, 256, 512)]
    return [*_set("quick", *_both(exact[0]), packed, step), *_set("tokens", *_both(*exact), *single)]


def catalogue(device: str) -> tuple[Workload, ...]:
    """Return the workloads for a device type: model sizes for ``cuda``, tiny ones for ``cpu``; each once, with all its labels."""
    found: dict[str, Workload] = {}
    for workload in _cpu() if device == "cpu" else _gpu():
        before = found.get(workload.name)
        found[workload.name] = workload if before is None else replace(workload, labels=workload.labels | before.labels)
    return tuple(found.values())


class Labelled(Protocol):
    """What can be selected."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def labels(self) -> frozenset[str]:
        """Names of the sets it belongs to."""
        ...


def select(workloads: Iterable[AnyLabelled], patterns: Sequence[str]) -> list[AnyLabelled]:
    """Return the workloads whose name or one of whose labels matches a shell pattern; all of them where there is no pattern."""
    return [
        workload
        for workload in workloads
        if not patterns
        or any(fnmatchcase(word, pattern) for word in (workload.name, *workload.labels) for pattern in patterns)
    ]

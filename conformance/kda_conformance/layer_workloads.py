"""Workloads of what stands around the operator in a layer: short convolution, gated norm, and attention over latents.

Each is one part at one size, forward, or forward and backward, in the arguments that :mod:`kda_optimized` documents and with its float64
form from :mod:`kda_reference` to judge it by. Dimension letters: B rows, T tokens, D channels, W taps, H heads, R latent width, P width of
the shared key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from kda_reference import normalisation, short_convolution

from kda_conformance.claims import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

CONVOLUTION, CONVOLUTION_STEP, NORM, LATENTS = "convolution", "convolution-step", "norm", "latents"
TAPS, NORM_EPSILON, PAGE = 4, 1e-5, 64
# Of the released model.
RANK, SHARED_KEY, LATENT_SCALE = 512, 64, 192**-0.5
CHANNELS = 12288
LONGEST_JUDGED, MOST_JUDGED_ROWS = 300, 4
# Bytes from which a call takes the device longer than the host.
FILLS_DEVICE = 2**29
PASSES = {False: "forward", True: "forward-backward"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWorkload:
    """One timed call of a part, by description.

    Attributes
    ----------
    part
        ``convolution``, ``convolution-step``, ``norm`` or ``latents``.
    B, T
        Rows and tokens of each: of a step one, of latents the length that is attended to.
    width
        Channels: of the convolution D, of the norm those of one head; of the latents R, beside which the shared key has ``R / 8``.
    H
        Heads, of norm and latents.
    dtype
        Of inputs; a key of ``claims.DTYPES``. Weights are float32.
    backward
        Whether the gradient of every differentiable input is computed as well.
    graph
        Whether replays of a CUDA graph are timed instead of calls.
    labels
        Names of the sets it belongs to.
    """

    part: str
    T: int
    width: int
    B: int = 1
    H: int = 1
    dtype: str = "bfloat16"
    backward: bool = False
    graph: bool = False
    labels: frozenset[str] = frozenset({"layer"})

    @property
    def pass_name(self) -> str:
        """What is computed."""
        return "step" if self.part == CONVOLUTION_STEP else PASSES[self.backward]

    @property
    def name(self) -> str:
        """Everything but the labels, in one word."""
        words = [
            self.part,
            *([] if self.part == CONVOLUTION_STEP else [self.pass_name]),
            f"T{self.T}",
            f"H{self.H}",
            f"B{self.B}",
        ]
        words += (
            [f"d{self.width}"] + ([self.dtype] if self.dtype != "bfloat16" else []) + (["graph"] if self.graph else [])
        )
        return "-".join(words)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        return {CONVOLUTION: ("x", "weight"), NORM: ("x", "gate", "weight")}.get(self.part, ())

    @property
    def input_bytes(self) -> int:
        """Bytes of all tensor arguments."""
        return sum(argument.nbytes for argument in self.inputs(0, "meta").values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the result, and of the tails that a step leaves."""
        arguments = self.inputs(0, "meta")
        shape = (self.B, self.H, self.width) if self.part == LATENTS else next(iter(arguments.values())).shape
        tails = arguments["tails"].nbytes if self.part == CONVOLUTION_STEP else 0
        return math.prod(shape) * DTYPES[self.dtype].itemsize + tails

    @property
    def least_bytes(self) -> int:
        """Bytes that must cross the memory bus, counted as those of :class:`kda_conformance.workloads.Workload`."""
        forward = self.input_bytes + self.output_bytes
        return 2 * forward + self.input_bytes if self.backward else forward

    @property
    def flop(self) -> int:
        """Products and sums of the part's formula; a gate, an activation or a norm counts as none."""
        tokens = self.B * self.T
        per_token = {NORM: 4 * self.H * self.width, LATENTS: 2 * self.H * (2 * self.width + self.width // 8)}
        return (3 if self.backward else 1) * tokens * per_token.get(self.part, 2 * TAPS * self.width)

    @property
    def judged_call(self) -> LayerWorkload:
        """The small call on which a side is judged before it is timed."""
        return replace(self, T=min(self.T, LONGEST_JUDGED), B=min(self.B, MOST_JUDGED_ROWS))

    def describe(self) -> dict[str, Any]:
        """Return the fields of a row that say what was called."""
        return {
            "operator": self.part, "gate": "none", "dtype": self.dtype, "chunk_size": 0, "lengths": [self.T],
            "shape": {"B": self.B, "T": self.T, "H": self.H, "G": self.H, "K": self.width, "V": self.width, "N": self.B},
        }  # fmt: skip

    def inputs(self, seed: int, device: str) -> dict[str, Tensor]:
        """Draw the tensor arguments, by name, in the order in which a function takes them."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        weight = (self.width, TAPS) if self.part in (CONVOLUTION, CONVOLUTION_STEP) else (self.width,)
        if self.part == NORM:
            x, gate = (normal(self.B, self.T, self.H, self.width) for _ in range(2))
            return {"x": x, "gate": gate, "weight": normal(*weight, dtype=torch.float32)}
        if self.part == LATENTS:
            per_row = -(-self.T // PAGE)
            q, pages = (normal(*s, self.width + self.width // 8) for s in ((self.B, self.H), (self.B * per_row, PAGE)))
            order = torch.arange(self.B * per_row, dtype=torch.int32, device=device)
            # Neighbours in a row are no neighbours in memory.
            table = order.view(per_row, self.B).T.contiguous()
            return {"q": q, "pages": pages, "table": table, "lengths": order.new_full((self.B,), self.T)}
        found = {"x": normal(self.B, self.T, self.width), "weight": normal(*weight, dtype=torch.float32)}
        if self.part == CONVOLUTION_STEP:
            slots = torch.arange(self.B - 1, -1, -1, dtype=torch.int32, device=device)
            found |= {"tails": normal(self.B, TAPS - 1, self.width), "tail_indices": slots}
        return found

    def cotangents(self, seed: int, device: str) -> Tensor:
        """Draw the cotangent of the result."""
        x = self.inputs(0, "meta")["x"]
        generator = torch.Generator(device).manual_seed(seed + 1_000_003)
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)

    def expected(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the result by the reference, in the dtype of the arguments."""
        if self.part == NORM:
            return normalisation.gated_rms_norm(inputs["x"], inputs["gate"], inputs["weight"], NORM_EPSILON)
        if self.part == LATENTS:
            return self._attended(**inputs)
        tail = inputs["tails"][inputs["tail_indices"].long()] if self.part == CONVOLUTION_STEP else None
        return torch.nn.functional.silu(short_convolution.short_convolution(inputs["x"], inputs["weight"], tail)[0])

    def _attended(self, q: Tensor, pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        rows = []
        for n, length in enumerate(lengths.tolist()):
            known = pages[table[n].long()].flatten(0, 1)[: int(length)]
            rows.append(torch.softmax(LATENT_SCALE * q[n] @ known.T, -1) @ known[:, : self.width])
        return torch.stack(rows)


def _graph(workload: LayerWorkload) -> LayerWorkload:
    return replace(workload, graph=workload.least_bytes < FILLS_DEVICE)


def _both(workload: LayerWorkload) -> list[LayerWorkload]:
    return [replace(workload, backward=backward) for backward in (False, True)]


def layer_catalogue(device: str) -> tuple[LayerWorkload, ...]:
    """Return the workloads for a device type: those of the released model for ``cuda``, tiny ones for ``cpu``."""
    if device == "cpu":
        tiny = {"dtype": "float32", "labels": frozenset({"layer"})}
        return (
            *_both(LayerWorkload(part=CONVOLUTION, T=17, width=32, **tiny)),  # type: ignore[arg-type]
            LayerWorkload(part=CONVOLUTION_STEP, T=1, B=3, width=32, **tiny),  # type: ignore[arg-type]
            *_both(LayerWorkload(part=NORM, T=9, H=2, width=16, **tiny)),  # type: ignore[arg-type]
            LayerWorkload(part=LATENTS, T=70, B=2, H=2, width=32, **tiny),  # type: ignore[arg-type]
        )
    steps = [LayerWorkload(part=CONVOLUTION_STEP, T=1, B=rows, width=CHANNELS) for rows in (1, 8, 64, 256)]
    lengths = ((1, 2**12), (1, 2**16), (1, 2**20), (8, 2**16), (64, 2**14), (256, 2**11))
    attended = [LayerWorkload(part=LATENTS, T=length, B=rows, H=32, width=RANK) for rows, length in lengths]
    convolution = LayerWorkload(part=CONVOLUTION, T=16384, width=CHANNELS)
    norm = LayerWorkload(part=NORM, T=16384, H=32, width=128)
    return (
        *_both(convolution),
        *_both(norm),
        *(replace(workload, graph=True) for workload in (convolution, norm)),
        *map(_graph, (*steps, *attended)),
    )

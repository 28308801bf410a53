"""Time launch configurations on this machine's GPU and write its launch table: ``python -m kda_optimized.tune [FILE]``.

Each kernel is timed alone, on the launches of a training call, for every candidate that fits the device. The file is named after the
architecture and goes where :mod:`kda_optimized.launch_config` looks, unless a path is given. Run the conformance suite afterwards: a
faster configuration that a compiler gets wrong is not unheard of.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kda_reference.contract import KdaInputs
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from kda_optimized.backward import chunk_backward
from kda_optimized.chunkwise import chunk_forward, recurrent_forward
from kda_optimized.compiled import attend, decode, layer
from kda_optimized.launch import recorded
from kda_optimized.launch_config import DEFAULT, Table, architecture, fits, table, using

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES = ((2, 64), (2, 128), (2, 256), (4, 64), (4, 128), (4, 256))
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3)
BLOCKS = (16, 32, 64, 128)
TOKENS, HEADS, DECODE_BATCH = 8192, 16, 64


def candidates(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every configuration of the tiles that a rule names."""
    blocks = [name for name in ("block_k", "block_v") if name in rule]
    for warps, stages, *widths in product(WARPS, STAGES, *(BLOCKS for _ in blocks)):
        if all(width <= rule["max_width"] for width in widths):
            yield rule | {"num_warps": warps, "num_stages": stages} | dict(zip(blocks, widths, strict=True))


def training_call(operand_bytes: int, width: int) -> KdaInputs:
    """Return a call with every activation in the kernel, on the GPU."""
    dtype = torch.bfloat16 if operand_bytes == 2 else torch.float32  # noqa: PLR2004 - bytes of a half

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda")

    per_channel = (1, TOKENS, HEADS, width)
    return KdaInputs(
        q=normal(*per_channel), k=normal(*per_channel), v=normal(*per_channel), g=normal(*per_channel), beta=normal(1, TOKENS, HEADS),
        A_log=normal(HEADS, dtype=torch.float32), dt_bias=normal(HEADS * width, dtype=torch.float32),
        initial_state=normal(1, HEADS, width, width, dtype=torch.float32),
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip


def decoding_call(inputs: KdaInputs) -> KdaInputs:
    """Return one token of many sequences, as the recurrence meets in decoding."""
    rows = {name: getattr(inputs, name)[0, :DECODE_BATCH, None].contiguous() for name in ("q", "k", "v", "g", "beta")}
    state = inputs.initial_state
    return inputs.replace(
        **rows, initial_state=None if state is None else state.expand(DECODE_BATCH, -1, -1, -1).contiguous()
    )


def milliseconds(kernel: str, inputs: KdaInputs, rules: Table) -> float:
    """Return the median time of a kernel's launches in one call under a table; infinite where the device lacks the resources."""
    with using(rules), recorded() as launches:
        if kernel.startswith("kda_recurrent"):
            recurrent_forward(decoding_call(inputs))
        elif kernel in ("kda_decode_step_kernel", "kda_convolution_step_kernel"):
            decode(inputs)
        elif kernel.startswith("kda_latent"):
            attend(inputs)
        elif kernel.startswith(("kda_convolution", "kda_norm")):
            layer(inputs)
        elif "_fwd_" in kernel:
            chunk_forward(inputs)
        else:
            chunk_backward(inputs, torch.ones_like(inputs.v), None)
    try:
        return float(sum(do_bench(launch.start, return_mode="median") for launch in launches if launch.name == kernel))
    except OutOfResources:
        return math.inf


def applicable(rules: list[dict[str, Any]], operand_bytes: int, width: int) -> dict[str, Any]:
    """Return the rule to tune for a class, narrowed to it."""
    rule = next(rule for rule in rules if fits(rule, operand_bytes, width))
    return rule | {"max_operand_bytes": operand_bytes, "max_width": width}


def tuned(name: str) -> Table:
    """Return the fastest rule of every kernel and class, starting from the table of an architecture."""
    found: Table = {kernel: [] for kernel in table(DEFAULT)}
    for operand_bytes, width in CLASSES:
        inputs = training_call(operand_bytes, width)
        for kernel in found:
            start = applicable(table(name)[kernel], operand_bytes, width)
            times = [(milliseconds(kernel, inputs, table(name) | {kernel: [rule]}), rule) for rule in candidates(start)]
            best, rule = min(times, key=lambda entry: entry[0])
            print(f"{kernel} {operand_bytes} bytes width {width}: {best:.4f} ms {rule}", flush=True)  # noqa: T201 - the program's output
            found[kernel].append(rule)
    return found


def written(rules: Table) -> str:
    """Return a table as a file holds it: one rule a line."""
    kernels = []
    for kernel, entries in rules.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        kernels.append(f'  "{kernel}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main() -> None:
    """Tune this machine's GPU."""
    name = architecture(torch.device("cuda"))
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "configs" / f"{name}.json"
    path.write_text(written(tuned(name)))


if __name__ == "__main__":
    main()

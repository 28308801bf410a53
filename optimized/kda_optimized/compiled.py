"""Compile the kernels for real targets on any machine, and read what the compiler made of them.

No device is needed: launches of calls on tensors without storage are recorded and compiled. ``TRITON_INTERPRET=0 python -m
kda_optimized.compiled sm_90`` prints one JSON object per kernel and call, with the registers, spilled bytes and shared memory that decide
how a kernel runs; ``kda compile`` keeps them and compares them with what was accepted before.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import triton
from kda_reference.contract import KdaInputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kda_optimized.backward import chunk_backward
from kda_optimized.chunkwise import chunk_forward, recurrent_forward
from kda_optimized.convolution import convolution_backward, convolution_forward, short_convolution_step
from kda_optimized.decoding import kda_decode_step
from kda_optimized.gated_norm import norm_backward, norm_forward
from kda_optimized.latent_attention import latent_decode
from kda_optimized.launch import Launch, recorded, warp_products
from kda_optimized.launch_config import table, using
from kda_optimized.machine_code import resources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TYPE_NAMES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Between them these meet every rule of the launch table; a test says so.
SAMPLES = (
    (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256),
    (torch.float32, 32), (torch.float32, 64), (torch.float32, 128), (torch.float32, 256),
)  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
TAPS = 4


def sample(dtype: torch.dtype, width: int) -> KdaInputs:
    """Return a training call without storage: every activation in the kernel, packed, with states."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, g = new(1, 2048, 16, width), new(16, dtype=torch.float32)
    return KdaInputs(
        q=q, k=q, v=q, g=q, beta=new(1, 2048, 16), A_log=g, dt_bias=new(16 * width, dtype=torch.float32),
        initial_state=new(1, 16, width, width, dtype=torch.float32),
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip


def decode(inputs: KdaInputs) -> None:
    """Advance 64 rows by one token each: convolution and operator, through a table of slots."""
    rows, device = 64, inputs.q.device
    tokens: dict[str, Any] = {name: getattr(inputs, name)[0, :rows, None] for name in ("q", "k", "v", "g", "beta")}
    slots = torch.empty(rows, dtype=torch.int32, device=device)
    pool = torch.empty(rows, *inputs.state_shape[1:], device=device)
    flags = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "A_log", "dt_bias")
    options: dict[str, Any] = {name: getattr(inputs, name) for name in flags}
    kda_decode_step(**tokens, state=pool, state_indices=slots, **options)
    x = tokens["q"].flatten(2)
    tails = torch.empty(rows, TAPS - 1, x.shape[-1], dtype=x.dtype, device=device)
    short_convolution_step(x, x.new_empty(x.shape[-1], TAPS), tails, tail_indices=slots)


def layer(inputs: KdaInputs) -> None:
    """Run the convolution and the norm of a layer, forward and backward, with everything that they take."""
    x, offsets = inputs.q.flatten(2), (0, inputs.q.shape[1])
    weight, tail = x.new_empty(x.shape[-1], TAPS), x.new_empty(1, TAPS - 1, x.shape[-1])
    convolution_forward(x, weight, tail, offsets, silu=True, output_final_tail=True)
    convolution_backward(x, weight, tail, x, tail, offsets, silu=True)
    channels = inputs.v.new_empty(inputs.v.shape[-1], dtype=torch.float32)
    norm_forward(inputs.v, inputs.v, channels, 1e-5, swish=False)
    norm_backward(inputs.v, inputs.v, channels, inputs.v, 1e-5, swish=False)


def attend(inputs: KdaInputs) -> None:
    """Attend to the paged latents of the released model with one token of each of 4 rows."""
    width, rank, device = 576, 512, inputs.q.device
    q, pages = inputs.q.new_empty(4, 32, width), inputs.q.new_empty(1024, 64, width)
    table, lengths = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((4, 256), (4,)))
    latent_decode(q, pages, table, lengths, latent_width=rank, scale=192**-0.5)


def launches(inputs: KdaInputs, target: str) -> dict[str, list[Launch]]:
    """Return what each pass launches on a target such as ``sm_90``."""
    state = torch.empty(inputs.state_shape, device="meta")
    do, half = torch.empty_like(inputs.v), inputs.replace(q=inputs.q[:, :, ::2], k=inputs.k[:, :, ::2])
    passes: dict[str, Callable[[], object]] = {
        "forward": lambda: chunk_forward(inputs),
        "backward": lambda: chunk_backward(inputs, do, state),
        "shared heads": lambda: chunk_backward(half, do, state),
        "recurrence": lambda: recurrent_forward(inputs),
        "decode": lambda: decode(inputs),
        "layer": lambda: layer(inputs),
        "latents": lambda: attend(inputs),
    }
    found = {}
    with using(table(target)):
        for name, run in passes.items():
            with recorded() as started:
                run()
            found[name] = started
    # Value heads that share queries and keys need one kernel more.
    names = {launch.name for launch in found["backward"]}
    found["backward"] += [launch for launch in found.pop("shared heads") if launch.name not in names]
    return found


def source_of(launch: Launch) -> ASTSource:
    """Return what the compiler takes, specialised as a launch would be: constants, ones and multiples of sixteen."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value, place = launch.arguments[parameter.name], (index,)
        plain = isinstance(value, int) and not isinstance(value, bool) and not parameter.is_constexpr
        if parameter.is_constexpr or value is None or (plain and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[place] = TYPE_NAMES[value.dtype], ALIGNED
        elif plain:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[place] = ALIGNED
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def gpu_target(name: str) -> GPUTarget:
    """Return what Triton compiles for.

    Raises
    ------
    ValueError
        If the name is none of an NVIDIA architecture (``sm_90``) or an AMD one (``gfx942``).
    """
    if re.fullmatch(r"sm_\d+", name):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    if re.fullmatch(r"gfx9\w+", name):
        return GPUTarget("hip", name, 64)
    message = f"target must be like sm_90 or gfx942, got {name!r}; {', '.join(TARGETS)} are compiled for by default"
    raise ValueError(message)


def compile_launch(launch: Launch, target: GPUTarget) -> dict[str, Any]:
    """Compile one launch for a target and return what it needs."""
    with warp_products():
        found = triton.compile(source_of(launch), target=target, options=dict(launch.options))
    return {**launch.options, "shared_bytes": found.metadata.shared, **resources(found.asm)}


def compile_all(target: str) -> Iterator[dict[str, Any]]:
    """Compile every kernel in every configuration of the launch table; a row each, also for what does not compile.

    A kernel that one call launches several times, with other constants, has a row for each of its launches.
    """
    gpu = gpu_target(target)
    for dtype, width in SAMPLES:
        for name, started in launches(sample(dtype, width), target).items():
            order: Counter[str] = Counter()
            for launch in started:
                row = {
                    "target": target,
                    "triton": triton.__version__,
                    "dtype": str(dtype).removeprefix("torch."),
                    "shape": {"K": width, "V": width},
                    "pass": name,
                    "kernel": launch.name,
                    "launch": order[launch.name],
                }
                order[launch.name] += 1
                try:
                    found = {"outcome": "compiled", "message": "", **compile_launch(launch, gpu)}
                except Exception as error:  # noqa: BLE001 - whatever a compiler raises is what the row says
                    found = {"outcome": "error", "message": f"{type(error).__name__}: {error}"}
                yield row | found


def main(targets: Sequence[str]) -> None:
    """Print a JSON object for each launch on each target."""
    for target in targets or TARGETS:
        for row in compile_all(target):
            print(json.dumps(row), flush=True)  # noqa: T201 - the program's output


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")

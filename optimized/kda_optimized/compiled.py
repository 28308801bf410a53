"""Compile the kernels for a real target on any machine, and read what the compiler made of them.

No device is needed: launches of calls on tensors without storage are recorded and compiled. ``TRITON_INTERPRET=0 python -m
kda_optimized.compiled 90`` prints one JSON object per kernel and call, with the registers, spilled bytes and shared memory that decide
how a kernel runs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from kda_reference.contract import KdaInputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kda_optimized.backward import chunk_backward
from kda_optimized.chunkwise import chunk_forward, recurrent_forward
from kda_optimized.launch import Launch, recorded, warp_products
from kda_optimized.launch_config import table, using

if TYPE_CHECKING:
    from collections.abc import Iterator

TYPE_NAMES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


def sample(dtype: torch.dtype, width: int) -> KdaInputs:
    """Return a training call without storage: every activation in the kernel, packed, with states."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, g = new(1, 1024, 16, width), new(16, dtype=torch.float32)
    return KdaInputs(
        q=q, k=q, v=q, g=q, beta=new(1, 1024, 16), A_log=g, dt_bias=new(16 * width, dtype=torch.float32),
        initial_state=new(1, 16, width, width, dtype=torch.float32),
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip


def launches(inputs: KdaInputs, arch: int) -> list[Launch]:
    """Return the launches of one forward, one backward and one recurrence, on an architecture given as 90 for ``sm_90``."""
    state, do = torch.empty(inputs.state_shape, device="meta"), torch.empty_like(inputs.v)
    with using(table(f"sm_{arch}")), recorded() as found:
        chunk_forward(inputs)
        chunk_backward(inputs, do, state)
        recurrent_forward(inputs)
    # Value heads that share queries and keys need one kernel more.
    half = inputs.replace(q=inputs.q[:, :, ::2], k=inputs.k[:, :, ::2])
    with using(table(f"sm_{arch}")), recorded() as shared:
        chunk_backward(half, do, state)
    names = {launch.name for launch in found}
    return found + [launch for launch in shared if launch.name not in names]


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


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile one launch for ``sm_<arch>`` and return what it needs."""
    with warp_products():
        found = triton.compile(source_of(launch), target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    return {
        "kernel": launch.name,
        "arch": arch,
        **launch.options,
        "shared_bytes": found.metadata.shared,
        **resources(found.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Read registers, bytes of stack (spills) and the matrix instructions from a cubin, with the tools that Triton carries."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(  # noqa: S603 - a tool of Triton's, on a file of ours
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603 - likewise
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        message = f"cuobjdump must report REG and STACK, got {usage!r}; adapt kda_optimized.compiled to this Triton"
        raise RuntimeError(message)
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(stack[1]),
        "hgmma": len(re.findall(r"\bHGMMA", code)),
        "hmma": len(re.findall(r"\bHMMA", code)),
    }


def compile_all(arch: int) -> Iterator[dict[str, Any]]:
    """Compile every kernel of the calls that matter; a kernel launched twice with other constants appears twice."""
    for dtype, width in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128)):
        for launch in launches(sample(dtype, width), arch):
            yield {"dtype": str(dtype).removeprefix("torch."), "width": width, **compile_launch(launch, arch)}


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["90"]:
        for row in compile_all(int(argument)):
            print(json.dumps(row), flush=True)  # noqa: T201 - the program's output

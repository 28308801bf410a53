"""Compile the kernels for a real target on any machine, and read what the compiler made of them.

No device is needed. Run as ``TRITON_INTERPRET=0 python -m kda_optimized.compiled``; it prints one JSON object per kernel and configuration, with the
shared memory, registers and spills that decide how a kernel runs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kda_optimized.backward_chunk import kda_chunk_bwd_chunk_kernel
from kda_optimized.backward_walk import kda_chunk_bwd_walk_kernel
from kda_optimized.forward_prepare import kda_chunk_fwd_prepare_kernel
from kda_optimized.forward_walk import kda_chunk_fwd_walk_kernel
from kda_optimized.launch_config import table
from kda_optimized.recurrent import kda_recurrent_fwd_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

POINTERS_FP32 = {"a_log", "dt_bias", "initial_state", "final_state", "chunk_decay", "dfinal_state", "dinitial_state", "da_parts", "dbias_parts"}
POINTERS_INDEX = {"chunk_table": "*i32", "cu_seqlens": "*i64", "chunk_offsets": "*i64"}
SCALARS = {"scale": "fp32", "lower_bound": "fp32"}
KERNELS = {
    "prepare": kda_chunk_fwd_prepare_kernel,
    "walk": kda_chunk_fwd_walk_kernel,
    "backward_walk": kda_chunk_bwd_walk_kernel,
    "backward_chunk": kda_chunk_bwd_chunk_kernel,
    "recurrent": kda_recurrent_fwd_kernel,
}
HEADS = 16


def constants(width: int, operand_bytes: int, bv: int) -> dict[str, Any]:
    """Return the compile-time constants of a training call with every activation in the kernel."""
    length = next(e for e in table()["default"]["chunk"] if operand_bytes <= e["max_operand_bytes"] and width <= e["max_width"])["length"]
    plain = "tf32" if operand_bytes == 2 else "ieee"  # noqa: PLR2004 - bytes of a half
    return {
        "H": HEADS, "G": HEADS, "K": width, "V": width, "BT": length, "BK": width, "BV": bv or width, "NV": width // (bv or width),
        "LEVELS": length.bit_length() - 1, "L2NORM": True, "USE_GATE": True, "BOUNDED": False, "HAS_A": True, "HAS_BIAS": True,
        "SIGMOID": True, "CEILING": 1.0, "SCORE_PRECISION": plain, "SUM_PRECISION": "tf32x3" if operand_bytes == 2 else "ieee",
        "PRECISION": plain, "STATE_STRIDE_K": width, "STATE_STRIDE_V": 1, "HAS_INITIAL": True, "STORE_FINAL": True, "STORE_STATES": True,
        "HAS_DFINAL": True, "STORE_DINITIAL": True,
    }  # fmt: skip


def compile_kernel(name: str, arch: int, width: int, operand_bytes: int) -> dict[str, Any]:
    """Compile one kernel for ``sm_<arch>`` and return what it needs."""
    kernel = KERNELS[name]
    entries = table().get(f"sm_{arch}", table()["default"])[name]
    entry = next(e for e in entries if operand_bytes <= e["max_operand_bytes"] and width <= e["max_width"])
    half = "*bf16" if operand_bytes == 2 else "*fp32"  # noqa: PLR2004 - bytes of a half
    values = constants(width, operand_bytes, entry.get("bv", 0))
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument], constexprs[(position,)] = "constexpr", values[argument]
        elif argument in SCALARS:
            signature[argument] = SCALARS[argument]
        else:
            signature[argument] = POINTERS_INDEX.get(argument) or ("*fp32" if argument in POINTERS_FP32 else half)
    source = ASTSource(kernel, signature, constexprs=constexprs)
    options = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"]}
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        "kernel": name, "arch": arch, "width": width, "operand_bytes": operand_bytes, **options,
        "shared_bytes": found.metadata.shared, **_resources(found.asm["cubin"]),
    }  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """Read registers, stack and the mix of matrix instructions from a cubin, with the tools that Triton carries."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    return {
        "registers": int(registers[1]) if registers else -1,
        "stack_bytes": int(stack[1]) if stack else -1,
        "hgmma": code.count("HGMMA"),
        "hmma": code.count(" HMMA"),
    }


def all_compiled(arch: int) -> Iterator[dict[str, Any]]:
    """Compile every kernel for the widths and operand sizes that matter."""
    for operand_bytes, width in ((2, 128), (2, 64), (4, 128)):
        for name in KERNELS:
            yield compile_kernel(name, arch, width, operand_bytes)


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["90"]:
        for row in all_compiled(int(argument)):
            print(json.dumps(row), flush=True)  # noqa: T201 - the program's output

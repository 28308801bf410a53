"""What a compiled kernel needs of a GPU, read from its machine code: registers, spills, shared memory, size, matrix instructions.

NVIDIA's code is read with the tools that Triton carries, AMD's from the assembly that Triton keeps beside it. The numbers of the two have
the same names and are never compared with each other.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton

if TYPE_CHECKING:
    from collections.abc import Mapping

# HMMA is an instruction of a warp, HGMMA (wgmma) one of a warp group on Hopper, UTC*MMA (tcgen05) one of Blackwell's tensor memory.
NVIDIA_MATRIX = re.compile(r"\b((?:UTC)?[A-Z]{1,2}MMA(?:\.[A-Z0-9_]+)*)\b")
NVIDIA_ADDRESS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/", re.MULTILINE)
NVIDIA_LOCAL = re.compile(r"\b(?:STL|LDL)\b")
NVIDIA_INSTRUCTION_BYTES = 16
AMD_MATRIX = re.compile(r"\b(v_s?mfmac?_\w+)\b")
AMD_SCRATCH = re.compile(r"; \d+-byte Folded (?:Spill|Reload)")


def resources(asm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a compiled kernel needs.

    Parameters
    ----------
    asm
        What Triton compiled, with ``cubin`` or ``amdgcn`` among it.

    Returns
    -------
    dict[str, Any]
        ``registers`` a thread (of AMD: vector registers), ``spilled_bytes`` of memory that a thread keeps in place of registers,
        ``spill_instructions`` that move them, ``code_bytes``, and ``matrix_instructions`` in the code by kind.

    Raises
    ------
    RuntimeError
        If the code does not say what it needs in the form that is known here.
    """
    return _amd(asm["amdgcn"]) if "amdgcn" in asm else _nvidia(asm["cubin"])


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", file.name)
    addresses = NVIDIA_ADDRESS.findall(code)
    if not addresses:
        raise _unknown("nvdisasm", "addresses", code)
    return {
        "registers": _number(r"REG:(\d+)", usage, "cuobjdump"),
        "spilled_bytes": _number(r"STACK:(\d+)", usage, "cuobjdump"),
        "spill_instructions": len(NVIDIA_LOCAL.findall(code)),
        "code_bytes": int(addresses[-1], 16) + NVIDIA_INSTRUCTION_BYTES,
        "matrix_instructions": _counted(NVIDIA_MATRIX.findall(code)),
    }


def _amd(assembly: str) -> dict[str, Any]:
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly, "the assembly"),
        "spilled_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly, "the assembly"),
        "spill_instructions": len(AMD_SCRATCH.findall(assembly)),
        "code_bytes": _number(r"codeLenInByte = (\d+)", assembly, "the assembly"),
        "matrix_instructions": _counted(AMD_MATRIX.findall(assembly)),
    }


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout  # noqa: S603 - a tool of Triton's, on a file of ours


def _counted(kinds: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))


def _number(pattern: str, text: str, source: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise _unknown(source, pattern, text)
    return int(found[1])


def _unknown(source: str, what: str, text: str) -> RuntimeError:
    message = f"{source} must report {what}, got {text[:200]!r}; adapt kda_optimized.machine_code to Triton {triton.__version__}"
    return RuntimeError(message)
